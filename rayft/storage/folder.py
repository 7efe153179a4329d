"""Run storage: a local path, NFS, s3:// or gs://, with atomic writes, retries, one kind of error.

Paths given to a `Storage` are relative to it, with forward slashes. Transient errors (5xx, resets,
EIO, stale NFS handles) are tried again with exponential back-off and full jitter, a bounded number
of times; what remains is a StorageError (exit 6) that names the place. A missing file is
FileNotFoundError.
"""

from __future__ import annotations

import logging
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import IO, TypeVar
from urllib.parse import unquote, urlsplit

from rayft.core.address import below, clean, shown
from rayft.core.errors import PermanentStorageError, StorageError
from rayft.storage.backends import FolderEntry, ObjectBackend, PosixBackend, StorageBackend
from rayft.storage.remote import connect
from rayft.storage.retry import RetryPolicy

log = logging.getLogger(__name__)
T = TypeVar("T")


class Storage:
    """A folder on storage."""

    def __init__(
        self, backend: StorageBackend, root: str, uri: str, retry: RetryPolicy | None = None
    ) -> None:
        self._backend, self._root, self.uri = backend, root, uri
        self._retry = retry or RetryPolicy()

    @staticmethod
    def open(uri: str, retry: RetryPolicy | None = None) -> Storage:
        """The folder `uri`; it need not exist.

        Object stores take options in the query, on MinIO, Ceph or R2 for example
        `s3://bucket/path?endpoint_override=host:9000&scheme=http` (`rayft.storage.remote`).

        Raises:
            StorageError: the URI means nothing, or its options are wrong.
        """
        uri = clean(uri)
        if "://" not in uri or uri.startswith("file://"):
            raw = unquote(urlsplit(uri).path) if "://" in uri else uri
            path = Path(raw).expanduser().resolve()
            return Storage(PosixBackend(), str(path), str(path), retry)
        fs, path = connect(uri)
        return Storage(ObjectBackend(fs), path, uri, retry)

    def __repr__(self) -> str:
        return f"Storage({shown(self.uri)!r})"

    def __reduce__(self):
        return Storage.open, (self.uri, self._retry)

    @property
    def is_local(self) -> bool:
        """A mounted file system of this machine (which may be NFS)."""
        return isinstance(self._backend, PosixBackend)

    def child(self, *parts: str) -> Storage:
        """The folder below."""
        tail = "/".join(parts)
        uri = self._path(tail) if self.is_local else below(self.uri, tail)
        return Storage(self._backend, self._path(tail), uri, self._retry)

    def existing(self) -> Storage:
        """The same folder, which must be there from now on: a write does not make it again.

        So a run whose folder is deleted, or whose file system is not mounted any more, fails
        (PermanentStorageError) and leaves nothing in another place.
        """
        if not self.is_local:
            return self
        return Storage(PosixBackend(Path(self._root)), self._root, self.uri, self._retry)

    def hasty(self) -> Storage:
        """The same folder, for a first look: what does not answer is not asked again (an
        object store's client has tried three times by then), but what answers that it is busy."""
        return Storage(self._backend, self._root, self.uri, RetryPolicy(silent=False))

    def shown(self, path: str = "") -> str:
        """The full address for people: without credentials and options. In a command, which must
        work when it is pasted, `uri` is the right one."""
        return "/".join(filter(None, (shown(self.uri).rstrip("/"), path)))

    def attempt(self, doing: str, path: str, action: Callable[[], T]) -> T:
        """`action()`, again after transient errors (`RetryPolicy.run`): safe to repeat."""
        return self._retry.run(doing, self.shown(path), action)

    def exists(self, path: str = "") -> bool:
        """Whether a file or folder is there."""
        return self._do("look at", path, self._backend.entry) is not None

    def read_bytes(self, path: str) -> bytes:
        """The whole file."""
        return self._do("read", path, self._backend.read)

    def read_text(self, path: str) -> str:
        """The whole file, UTF-8."""
        return self.read_bytes(path).decode()

    def write_bytes(self, path: str, data: bytes) -> None:
        """Replace the file, atomically; on return it is durable."""
        self._do("write", path, lambda full: self._backend.write(full, data))

    def write_text(self, path: str, text: str) -> None:
        """`write_bytes` in UTF-8."""
        self.write_bytes(path, text.encode())

    def open_input(self, path: str) -> IO[bytes]:
        """A seekable file for reading; reads raise OSError."""
        return self._do("open", path, self._backend.open_input)

    def open_output(self, path: str) -> IO[bytes]:
        """A stream for writing in place: durable after `close`, NOT atomic. Use it for files that
        something else (a manifest) declares valid. Writes raise OSError."""
        return self._do("create", path, self._backend.open_output)

    def list(self, path: str = "", recursive: bool = False) -> list[FolderEntry]:
        """Entries by name; nothing when the folder is missing. Names are relative to `path`."""
        found = self._do("list", path, lambda full: self._backend.entries(full, recursive))
        return sorted(found, key=lambda entry: entry.name)

    def delete(self, path: str = "") -> None:
        """A file, or a folder with all below; nothing when it is missing."""
        self._do("delete", path, self._backend.delete)

    def local_path(self, path: str = "") -> Path | None:
        """Where it lies on this machine; None on an object store."""
        return Path(self._path(path)) if self.is_local else None

    def download(self, path: str, to: Path) -> Path:
        """Copy one file to the local file `to`."""

        def copy(full: str) -> None:
            to.parent.mkdir(parents=True, exist_ok=True)
            with self._backend.open_input(full) as source, to.open("wb") as target:
                shutil.copyfileobj(source, target, 4 << 20)

        self._do("download", path, copy)
        return to

    def upload(self, source: Path, path: str) -> None:
        """Copy the local file `source` to `path`."""

        def copy(full: str) -> None:
            with source.open("rb") as data, self._backend.open_output(full) as target:
                shutil.copyfileobj(data, target, 4 << 20)

        self._do("upload", path, copy)

    def _path(self, path: str) -> str:
        return f"{self._root}/{path}".rstrip("/") if path else self._root

    def _do(self, doing: str, path: str, action: Callable[[str], T]) -> T:
        return self.attempt(doing, path, lambda: action(self._path(path)))


def folder_gone(storage: Storage) -> PermanentStorageError:
    """The folder was there, and is not any more."""
    return PermanentStorageError(
        f"the folder {storage.shown()} is gone",
        cause="somebody deleted it, or its file system is not mounted any more",
    )


def reachable(storage: Storage) -> None:
    """Raises StorageError, within seconds, when storage does not answer at all."""
    try:
        storage.hasty().exists()
    except StorageError as error:
        raise type(error)(
            f"storage {storage.shown()} is not usable: {error.what}",
            cause=error.cause or "nobody answers there: a wrong address, or no network",
            fix=error.fix or "check storage: in the config, and that this machine may reach it",
        ) from error


def probe(storage: Storage) -> None:
    """Write, read back and delete a small file.

    Raises:
        StorageError: naming the URI and the system's reason.
    """
    name = f".probe-{os.getpid()}-{random.getrandbits(32):08x}"
    try:
        storage.write_bytes(name, name.encode())
        back = storage.read_bytes(name)
        storage.delete(name)
    except (StorageError, FileNotFoundError) as error:
        own = error if isinstance(error, StorageError) else StorageError(str(error))
        raise type(own)(
            f"storage {storage.shown()} is not usable: {own.what}",
            cause=own.cause,
            fix=own.fix
            or "check that every worker may write there, or set storage: to another place",
        ) from error
    if back != name.encode():
        raise StorageError(f"storage {storage.shown()} does not read back what was written")
