"""Files, local or on an object store: found by path, folder, glob or URI; opened; fingerprinted.

A file is named by an absolute local path, or by a URI (s3://, gs://, file://) that keeps its query,
so that pyarrow's options travel with it: `s3://bucket/a.jsonl?endpoint_override=...&scheme=http`.
"""

from __future__ import annotations

import difflib
import glob
import hashlib
import io
import re
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pyarrow as pa
from pyarrow import fs

from rayft.core.address import redact, shown
from rayft.core.errors import ConfigError, DataError, StorageError
from rayft.storage.remote import connect

SCHEMES = ("s3", "gs", "gcs", "file")
FORMATS = {
    ".jsonl": "lines",
    ".ndjson": "lines",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".ipc": "arrow",
    ".txt": "text",
}
COMPRESSIONS = (".gz", ".bz2", ".zst", ".lz4")
_MAGIC = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class DataFile:
    """One input file. `size` in bytes as stored; `mtime_ns` 0 where the store has none."""

    uri: str
    size: int
    mtime_ns: int = 0

    @property
    def local(self) -> bool:
        """Whether `uri` is a path of this machine."""
        return not _is_uri(self.uri)

    @property
    def name(self) -> str:
        """What people are shown: the URI without its query."""
        return self.uri.split("?")[0] if _is_uri(self.uri) else self.uri

    @property
    def format(self) -> str | None:
        """A value of FORMATS, None for an unknown suffix."""
        return FORMATS.get(_suffix(self.name))

    @property
    def compressed(self) -> bool:
        """Whether bytes must be decompressed before lines can be found."""
        return PurePosixPath(self.name).suffix.lower() in COMPRESSIONS

    def stream(self) -> io.BufferedReader:
        """Sequential bytes, decompressed by suffix. Raises DataError when it cannot be opened."""
        return io.BufferedReader(_opened(self.uri, "stream"))

    def random(self) -> pa.NativeFile:
        """Random access, for parquet and arrow. Raises DataError when it cannot be opened."""
        return _opened(self.uri, "file")

    def digest(self) -> str:
        """sha256 of a local file's bytes; of name, size and mtime on an object store, where reading
        everything once more would cost as much as the tokenisation."""
        if not self.local:
            return hashlib.sha256(f"{self.name}\n{self.size}\n{self.mtime_ns}".encode()).hexdigest()
        with readable(self.name), Path(self.uri).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def find(path: str, base: Path | None = None) -> list[DataFile]:
    """The files behind a path, folder, glob or URI, sorted by name.

    Raises:
        ConfigError: an unknown scheme.
        DataError: nothing is there (with the nearest existing name), it cannot be read or listed,
            or a folder holds no file of a known format.
    """
    if _is_uri(path):
        return _find_remote(path)
    local = Path(path).expanduser()
    local = ((base or Path()) / local).absolute()
    with readable(path):
        return _find_local(path, local)


@contextmanager
def readable(name: str) -> Generator[None]:
    """What the system says about a file that cannot be read, as a DataError."""
    try:
        yield
    except OSError as error:
        raise DataError(f"cannot read {name}", cause=str(error.strerror or error)) from error


def _find_local(path: str, local: Path) -> list[DataFile]:
    if local.is_file():
        return [_local(local)]
    if local.is_dir():
        return _known(path, (_local(item) for item in local.rglob("*") if item.is_file()), local)
    if _MAGIC.search(path):
        # pathlib's glob wants a relative pattern, glob's takes any
        hits = [Path(hit) for hit in glob.glob(str(local), recursive=True)]  # noqa: PTH207
        files = sorted((_local(hit) for hit in hits if hit.is_file()), key=lambda file: file.uri)
        if files:
            return files
        raise DataError(f"no file matches {path}", where=str(local))
    raise missing(path, local)


def missing(path: str, local: Path) -> DataError:
    """The error for a path that does not exist, with the nearest name that does."""
    parent = local.parent
    while not parent.is_dir() and parent != parent.parent:
        parent = parent.parent
    wanted = local.relative_to(parent).parts[0]
    near = difflib.get_close_matches(wanted, [item.name for item in parent.iterdir()], 1, 0.5)
    hint = f"did you mean {parent / near[0]}?" if near else f"{parent} has nothing like it"
    return DataError(f"no such file or folder: {path}", where=str(local), fix=hint)


def exists(path: str) -> bool:
    """Whether a local path is there."""
    with readable(path):
        return not _is_uri(path) and Path(path).expanduser().exists()


def looks_like_file(path: str) -> bool:
    """Whether a path that is not there was meant as a file or folder, not as a hub id."""
    return (
        _is_uri(path)
        or bool(_MAGIC.search(path))
        or path.startswith(("/", ".", "~"))
        or path.count("/") > 1
        or _suffix(path) in FORMATS
    )


def line_blocks(file: DataFile, size: int) -> list[tuple[int, int, int]]:
    """(start, stop, first line number) of pieces of about `size` bytes that end at line ends."""
    blocks, line = [], 1
    with readable(file.name), Path(file.uri).open("rb") as source:
        while True:
            start = source.tell()
            chunk = source.read(size)
            if not chunk:
                return blocks
            tail = b"" if chunk.endswith(b"\n") else source.readline()
            blocks.append((start, source.tell(), line))
            line += chunk.count(b"\n") + tail.count(b"\n")


def _is_uri(path: str) -> bool:
    return "://" in path


def _suffix(path: str) -> str:
    pure = PurePosixPath(path)
    if pure.suffix.lower() in COMPRESSIONS:
        pure = pure.with_suffix("")
    return pure.suffix.lower()


def _local(path: Path) -> DataFile:
    stat = path.stat()
    return DataFile(str(path.absolute()), stat.st_size, stat.st_mtime_ns)


def _known(path: str, files: Iterable[DataFile], root: Path | None = None) -> list[DataFile]:
    """Files of known formats, sorted; hidden ones (. or _) and JSON descriptions are left out."""
    found = []
    for file in files:
        parts = (Path(file.uri).relative_to(root) if root else PurePosixPath(file.name)).parts
        hidden = any(part.startswith((".", "_")) for part in (parts if root else parts[-1:]))
        if file.format and not hidden and parts[-1] != "dataset_info.json":
            found.append(file)
    if not found:
        raise DataError(f"{path} holds no data file", fix=f"known suffixes: {' '.join(FORMATS)}")
    return sorted(found, key=lambda file: file.uri)


def _opened(uri: str, how: str) -> pa.NativeFile:
    try:
        system, path = _system(uri) if _is_uri(uri) else (fs.LocalFileSystem(), uri)
        return system.open_input_file(path) if how == "file" else system.open_input_stream(path)
    except (OSError, pa.ArrowException, StorageError) as error:
        raise DataError(f"cannot open {shown(uri)}", cause=_first_line(error)) from error


def _system(uri: str) -> tuple[fs.FileSystem, str]:
    return fs.FileSystem.from_uri(uri) if uri.startswith("file:") else connect(uri)


def _find_remote(uri: str) -> list[DataFile]:
    scheme = uri.split("://")[0]
    if scheme not in SCHEMES:
        known = ", ".join(f"{name}://" for name in SCHEMES)
        raise ConfigError(f"cannot read {scheme}:// ({uri})", fix=f"known: {known}, paths, hub ids")
    head, mark, query = uri.partition("?")
    magic = re.search(r"[*\[]", head)
    fixed = head[: magic.start()].rsplit("/", 1)[0] if magic else head
    try:
        system, path = _system(fixed + mark + query)
        infos = _infos(system, path)
    except (OSError, pa.ArrowException, StorageError) as error:
        raise DataError(f"cannot list {fixed}", cause=_first_line(error)) from error
    prefix = f"{scheme}://" if scheme != "file" else "file://"
    files = [
        DataFile(f"{prefix}{info.path}{mark}{query}", info.size, info.mtime_ns or 0)
        for info in infos
        if info.type == fs.FileType.File
    ]
    if fixed != head:
        wanted = re.compile(_pattern(head))
        files = [file for file in files if wanted.fullmatch(file.name)]
        if not files:
            raise DataError(f"no file matches {head}", where=fixed)
        return sorted(files, key=lambda file: file.uri)
    if not files:
        raise _missing_remote(system, path, head)
    return files if files[0].name == prefix + path else _known(head, files)


def _infos(system: fs.FileSystem, path: str) -> list[fs.FileInfo]:
    info = system.get_file_info(path)
    if info.type == fs.FileType.Directory:
        return system.get_file_info(fs.FileSelector(path, recursive=True))
    return [info] if info.type == fs.FileType.File else []


def _missing_remote(system: fs.FileSystem, path: str, shown: str) -> DataError:
    parent, _, name = path.rpartition("/")
    listed = system.get_file_info(fs.FileSelector(parent, allow_not_found=True)) if parent else []
    near = difflib.get_close_matches(name, [info.base_name for info in listed], 1, 0.5)
    fix = f"did you mean {near[0]}?" if near else ""
    return DataError(f"no such object or folder: {shown}", where=parent, fix=fix)


def _pattern(text: str) -> str:
    """A regular expression for a glob; `*` stays inside one folder, `**/` crosses folders."""
    out = ""
    for piece in re.split(r"(\*\*/|\*\*|\*|\[[^\]]+\])", text):
        if piece.startswith("[") and piece.endswith("]"):
            out += piece
        else:
            out += {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*"}.get(piece, re.escape(piece))
    return out


def _first_line(error: Exception) -> str:
    text = redact(error.what if isinstance(error, StorageError) else str(error))
    return text.strip().splitlines()[0][:300] if text.strip() else type(error).__name__
