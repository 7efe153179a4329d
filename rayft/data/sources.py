"""SourceSpec -> rows. What a path means, first match wins:

    a name in `dataset_info`        LLaMA-Factory's description of a data set
    builtin:NAME                    rayft.data.builtin
    s3://, gs://, file://           objects, folders (known suffixes below them), globs
    an existing file or folder      also a folder written by `datasets.save_to_disk`
    a glob, or what looks like one  local files
    org/name or name                a data set of the Hugging Face hub

Every kind of rows can be split into blocks, read block by block on any machine that sees the path,
and fingerprinted by content.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rayft.config.data import SourceSpec
from rayft.core.address import redact
from rayft.core.errors import ConfigError, DataError
from rayft.data import builtin, files, llamafactory, readers
from rayft.data.files import DataFile
from rayft.data.readers import RawRow
from rayft.data.shapes import RowLayout


@dataclass(frozen=True)
class SourceBlock:
    """A part of a source: of its n-th file, from `start` to `stop` in units of the format."""

    part: int = 0
    start: int = 0
    stop: int = -1
    line: int = 1


class RowReader(Protocol):
    """Rows that can be read in blocks."""

    def blocks(self, size: int) -> list[SourceBlock]:
        """Blocks of about `size` bytes, in order."""
        ...

    def read(self, block: SourceBlock) -> Iterator[RawRow]:
        """The rows of one block, in order."""
        ...

    def place(self, block: SourceBlock) -> str:
        """The file a block belongs to, for people."""
        ...

    def digests(self) -> dict[str, str]:
        """{name: hash of the content}."""
        ...


@dataclass(frozen=True)
class FileRows:
    """Rows of files."""

    files: tuple[DataFile, ...]

    def blocks(self, size: int) -> list[SourceBlock]:
        """Files in the order of their names, large ones in pieces."""
        return [
            SourceBlock(part, *piece)
            for part, file in enumerate(self.files)
            for piece in readers.blocks(file, size)
        ]

    def read(self, block: SourceBlock) -> Iterator[RawRow]:
        return readers.read(self.files[block.part], (block.start, block.stop, block.line))

    def place(self, block: SourceBlock) -> str:
        """Path or URI."""
        return self.files[block.part].name

    def digests(self) -> dict[str, str]:
        """sha256 of every file."""
        return {file.name: file.digest() for file in self.files}


@dataclass(frozen=True)
class DatasetRows:
    """A data set of the hub, or (`folder`) one that `datasets.save_to_disk` wrote."""

    path: str
    subset: str | None = None
    split: str | None = None
    data_dir: str | None = None
    folder: bool = False

    def load(self) -> Any:
        """The datasets.Dataset. Raises DataError when it is not there or has no such split."""
        import datasets

        split = self.split or "train"
        try:
            if not self.folder:
                return datasets.load_dataset(
                    self.path, self.subset, split=split, data_dir=self.data_dir
                )
            found = datasets.load_from_disk(self.path)
            return found[split] if isinstance(found, datasets.DatasetDict) else found
        except (OSError, ValueError, KeyError) as error:
            reason = redact(str(error)).strip().splitlines()[:1] or [type(error).__name__]
            kind = "folder" if self.folder else "hub data set"
            raise DataError(
                f"cannot load the {kind} {self.path!r}, split {split!r}",
                cause=reason[0][:300],
                fix="a local file or folder of that name does not exist either"
                if not self.folder
                else "",
            ) from error

    def blocks(self, size: int) -> list[SourceBlock]:
        """Ranges of rows."""
        found = self.load()
        rows = len(found)
        step = max(1, rows * size // max(found.data.nbytes, size)) if rows else 1
        return [SourceBlock(0, start, min(start + step, rows)) for start in range(0, rows, step)]

    def read(self, block: SourceBlock) -> Iterator[RawRow]:
        """Rows of the range, converted batch by batch."""
        found = self.load()
        stop = len(found) if block.stop < 0 else block.stop
        for start in range(block.start, stop, 1024):
            part = found.select(range(start, min(start + 1024, stop))).with_format("arrow")
            for batch in part[:].to_batches():
                yield from readers.batch_rows(batch)

    def place(self, block: SourceBlock) -> str:
        """The id or folder."""
        return self.path

    def digests(self) -> dict[str, str]:
        """sha256 of the Arrow files the data set consists of here."""
        found = self.load()
        hashes = []
        for item in found.cache_files:
            with Path(item["filename"]).open("rb") as file:
                hashes.append(hashlib.file_digest(file, "sha256").hexdigest())
        return {self.path: "+".join([*hashes, str(len(found))])}


@functools.lru_cache(maxsize=2)
def _builtin(name: str, split: str) -> tuple[dict[str, str], ...]:
    """Reading the standard library takes seconds: once per process, for hash and rows alike."""
    return tuple(builtin.rows(name, split))


@dataclass(frozen=True)
class BuiltinRows:
    """A corpus of rayft.data.builtin; its rows are made, not read."""

    name: str
    split: str

    def blocks(self, size: int) -> list[SourceBlock]:
        """One."""
        return [SourceBlock()]

    def read(self, block: SourceBlock) -> Iterator[RawRow]:
        """All rows. Raises ConfigError for an unknown name or split."""
        try:
            return (RawRow(row) for row in _builtin(self.name, self.split))
        except ValueError as error:
            raise ConfigError(str(error)) from error
        except FileNotFoundError as error:
            raise DataError(str(error), where=self.place(block)) from error

    def place(self, block: SourceBlock) -> str:
        """builtin:NAME."""
        return f"builtin:{self.name}"

    def digests(self) -> dict[str, str]:
        """Of what makes the rows: this Python's build and `builtin.py`. Hashing the rows would cost
        seconds at every start."""
        total = hashlib.sha256(sys.version.encode())
        total.update(Path(builtin.__file__).read_bytes())
        total.update(f"{self.name}/{self.split}".encode())
        return {f"builtin:{self.name}/{self.split}": total.hexdigest()}


@dataclass(frozen=True)
class DataSource:
    """One source, found and described. `name` is what the user wrote."""

    name: str
    task: str
    weight: float
    layout: RowLayout
    samples: int | None
    rows: RowReader

    def blocks(self, size: int) -> list[SourceBlock]:
        """Blocks to read in parallel; one part after another where only the first rows are wanted,
        so that a limit means the same rows everywhere."""
        return self.rows.blocks(size) if self.samples is None else [SourceBlock(part=-1)]

    def read(self, block: SourceBlock) -> Iterator[tuple[str, RawRow]]:
        """(file, row) of one block."""
        if block.part >= 0:
            place = self.rows.place(block)
            return ((place, raw) for raw in self.rows.read(block))
        whole = (
            (self.rows.place(part), raw)
            for part in self.rows.blocks(1 << 40)
            for raw in self.rows.read(part)
        )
        return itertools.islice(whole, self.samples)

    def peek(self, count: int) -> list[RawRow]:
        """The first rows."""
        first = itertools.islice(self.rows.blocks(1 << 20), 4)
        rows = (raw for block in first for raw in self.rows.read(block))
        return list(itertools.islice(rows, count))


def resolve(spec: SourceSpec, *, heldout: bool = False) -> DataSource:
    """Find what a SourceSpec names. `heldout`: a builtin without a split gives its held-out one.

    Raises:
        ConfigError: the path, name, column mapping or scheme means nothing.
        DataError: a store or folder cannot be listed.
    """
    if spec.dataset_info is not None:
        return _from_entry(spec, llamafactory.entry(spec))
    layout = RowLayout(spec.shape, dict(spec.columns))
    layout.check()
    return _source(spec, layout, _rows(spec, heldout))


def _source(
    spec: SourceSpec, layout: RowLayout, rows: RowReader, samples: int | None = None
) -> DataSource:
    return DataSource(spec.path, spec.task, spec.weight, layout, spec.samples or samples, rows)


def _rows(spec: SourceSpec, heldout: bool) -> RowReader:
    path = spec.path
    if path.startswith("builtin:"):
        split = spec.split or ("heldout" if heldout else "train")
        rows = BuiltinRows(path.removeprefix("builtin:"), split)
        rows.read(SourceBlock())  # an unknown name is refused here
        return rows
    if files.exists(path) or files.looks_like_file(path):
        return _local(path, spec.split)
    return DatasetRows(path, spec.subset, spec.split)


def _local(path: str, split: str | None, base: Path | None = None) -> RowReader:
    folder = Path(path).expanduser()
    folder = folder if base is None else base / folder
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        return DatasetRows(str(folder.absolute()), split=split, folder=True)
    return FileRows(tuple(files.find(path, base)))


def _from_entry(spec: SourceSpec, entry: llamafactory.DatasetEntry) -> DataSource:
    """What the config says (shape, columns, split, samples) is stronger than dataset_info.json."""
    layout = entry.layout
    if spec.columns or spec.shape != "auto":
        shape = layout.shape if spec.shape == "auto" else spec.shape
        layout = RowLayout(shape, {**layout.columns, **spec.columns}, layout.roles)
        layout.check()
    split = spec.split or entry.split
    if entry.hub:
        rows: RowReader = DatasetRows(entry.path, spec.subset or entry.subset, split, entry.folder)
    else:
        rows = _local(entry.path, split, entry.base)
    return _source(spec, layout, rows, entry.samples)
