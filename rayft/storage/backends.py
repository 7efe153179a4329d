"""Where bytes lie: a POSIX folder (local disk, NFS) or an object store (s3://, gs://).

Both offer the same few operations on absolute paths and raise plain OSError; `rayft.storage.folder`
adds names, retries and messages. A `write` is atomic: a reader sees the old file or the new one.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, cast

from rayft.storage import failpoints
from rayft.storage.retry import RootGone


@dataclass(frozen=True)
class FolderEntry:
    """One thing in a folder: its path below the listed folder, its size in bytes."""

    name: str
    size: int
    folder: bool = False


class StorageBackend(Protocol):
    """Operations on absolute paths; every one may raise OSError."""

    def entry(self, path: str) -> FolderEntry | None: ...
    def read(self, path: str) -> bytes: ...
    def write(self, path: str, data: bytes) -> None: ...
    def open_input(self, path: str) -> IO[bytes]: ...
    def open_output(self, path: str) -> IO[bytes]: ...
    def entries(self, path: str, recursive: bool) -> list[FolderEntry]: ...
    def delete(self, path: str) -> None: ...


def sync_folder(folder: Path) -> None:
    """Put the names in `folder` on disk (a rename is durable only after this)."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(folder: Path) -> None:
    """`folder` and its missing parents, each name on disk."""
    missing = []
    here = folder
    while not here.is_dir():
        missing.append(here)
        here = here.parent
    for new in reversed(missing):
        if new.is_file():
            raise NotADirectoryError(errno.ENOTDIR, f"{new} is a file")
        new.mkdir(exist_ok=True)
        sync_folder(new.parent)


def open_for_append(path: Path) -> IO[bytes]:
    """Unbuffered, for reading too."""
    make_folder(path.parent)
    return path.open("a+b", buffering=0)


class DurableFile:
    """A file opened for writing whose `close` returns after the bytes are on disk."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("wb")

    def write(self, data: Any) -> int:
        return self._file.write(data)

    def close(self) -> None:
        if self._file.closed:
            return
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        finally:
            self._file.close()
        sync_folder(self._path.parent)

    def __enter__(self) -> DurableFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self._file.close()


class PosixBackend:
    """A mounted file system.

    Args:
        root: a folder that must exist already whenever something is written.
    """

    def __init__(self, root: Path | None = None) -> None:
        self._root = root

    def entry(self, path: str) -> FolderEntry | None:
        place = Path(path)
        try:
            info = place.stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return FolderEntry(place.name, info.st_size, place.is_dir())

    def read(self, path: str) -> bytes:
        return Path(path).read_bytes()

    def write(self, path: str, data: bytes) -> None:
        """Temporary file in the same folder, fsync, rename, fsync of the folder."""
        place = Path(path)
        failpoints.hit("storage.write.open")
        self._make(place.parent)
        temporary = place.with_name(f".{place.name}.{secrets.token_hex(4)}.tmp")
        try:
            with temporary.open("wb") as file:
                half = len(data) // 2
                file.write(data[:half])
                file.flush()
                failpoints.hit("storage.write.data")
                file.write(data[half:])
                file.flush()
                failpoints.hit("storage.write.sync")
                os.fsync(file.fileno())
            failpoints.hit("storage.write.rename")
            temporary.replace(place)
        except BaseException:  # whatever ended the write, nothing half-written stays
            temporary.unlink(missing_ok=True)
            raise
        failpoints.hit("storage.write.done")
        sync_folder(place.parent)

    def open_input(self, path: str) -> IO[bytes]:
        return Path(path).open("rb")

    def open_output(self, path: str) -> IO[bytes]:
        self._make(Path(path).parent)
        return cast("IO[bytes]", DurableFile(Path(path)))  # has what a writer calls

    def entries(self, path: str, recursive: bool) -> list[FolderEntry]:
        root = Path(path)
        found: list[FolderEntry] = []
        if not root.is_dir():
            return found
        for place in root.rglob("*") if recursive else root.iterdir():
            if place.name.startswith(".") and place.name.endswith(".tmp"):
                continue  # what a killed `write` left behind
            try:
                size = place.stat().st_size
            except FileNotFoundError:
                continue  # deleted while we look
            found.append(FolderEntry(place.relative_to(root).as_posix(), size, place.is_dir()))
        return found

    def delete(self, path: str) -> None:
        place = Path(path)
        while place.is_dir() and not place.is_symlink():
            with suppress(FileNotFoundError):  # a file in it that was replaced while we look
                shutil.rmtree(place)
        place.unlink(missing_ok=True)
        if place.parent.is_dir():
            sync_folder(place.parent)

    def _make(self, folder: Path) -> None:
        if self._root is not None and not self._root.is_dir():
            raise RootGone(f"the folder {self._root} is gone")
        make_folder(folder)


class ObjectBackend:
    """A pyarrow file system over an object store; paths are `bucket/key`."""

    def __init__(self, fs: Any) -> None:
        self._fs = fs

    def entry(self, path: str) -> FolderEntry | None:
        from pyarrow.fs import FileType

        info = self._fs.get_file_info(path)
        if info.type == FileType.NotFound:
            return None
        return FolderEntry(info.base_name, info.size or 0, info.type == FileType.Directory)

    def read(self, path: str) -> bytes:
        with self._fs.open_input_stream(path) as file:
            return file.read()

    def write(self, path: str, data: bytes) -> None:
        """The object appears when the upload completes, whole or not at all (pyarrow uses a
        multipart upload even for small objects, completed by `close`)."""
        failpoints.hit("storage.write.open")
        file = self._fs.open_output_stream(path)
        file.write(data)
        file.close()
        failpoints.hit("storage.write.done")

    def open_input(self, path: str) -> IO[bytes]:
        return self._fs.open_input_file(path)

    def open_output(self, path: str) -> IO[bytes]:
        return self._fs.open_output_stream(path)

    def entries(self, path: str, recursive: bool) -> list[FolderEntry]:
        from pyarrow.fs import FileSelector, FileType

        selector = FileSelector(path, recursive=recursive, allow_not_found=True)
        skip = len(path.rstrip("/")) + 1
        return [
            FolderEntry(info.path[skip:], info.size or 0, info.type == FileType.Directory)
            for info in self._fs.get_file_info(selector)
            if len(info.path) > skip
        ]

    def delete(self, path: str) -> None:
        entry = self.entry(path)
        if entry is None:
            return
        if entry.folder:
            self._fs.delete_dir(path)
        else:
            self._fs.delete_file(path)
