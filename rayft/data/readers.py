"""One file -> rows. A row that cannot be read becomes a bad row with its line, never an exception.

.jsonl .ndjson       one object per line, blank lines skipped
.json                a list of objects; one object; or objects by line, as many tools write
.csv .tsv            header line; quoted fields may span lines
.parquet             .arrow .feather .ipc (IPC file or stream)
.txt                 one document per line, blank lines skipped: what `datasets`' text loader
                     and LLaMA-Factory do with such a file
"""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rayft.core.errors import DataError
from rayft.data.files import DataFile, line_blocks, readable

PREVIEW = 160  # characters of a bad row that are kept
INVALID_UTF8 = "invalid UTF-8"
_FIELD_LIMIT = 2**31 - 1  # csv refuses fields above 128 KiB unless told otherwise

Row = dict[str, Any]
Block = tuple[int, int, int]  # (start, stop, first line): bytes of lines, row groups of parquet
WHOLE: Block = (0, -1, 1)


@dataclass(frozen=True)
class RawRow:
    """A row as read, or why it could not be read (`row` None)."""

    row: Row | None
    line: int | None = None
    reason: str = ""
    preview: str = ""


def preview(value: object) -> str:
    """The first characters of a row, safe to print and to write as UTF-8."""
    if isinstance(value, bytes):
        text = value[: 4 * PREVIEW].decode("utf-8", "replace")
    else:
        text = value if isinstance(value, str) else repr(value)
    return text[:PREVIEW].encode("utf-8", "replace").decode("utf-8")


def blocks(file: DataFile, size: int) -> list[Block]:
    """How a file can be split into pieces of about `size` bytes; [WHOLE] where it cannot."""
    if file.format in ("lines", "text") and file.local and not file.compressed:
        return line_blocks(file, size) if file.size > size else [WHOLE]
    if file.format == "parquet":
        return _row_groups(file, size)
    return [WHOLE]


def read(file: DataFile, block: Block = WHOLE) -> Iterator[RawRow]:
    """The rows of a file, or of one of its blocks.

    Raises:
        DataError: the file as a whole is not what its suffix says.
    """
    return _READERS[file.format or "unknown"](file, block)


def _row_groups(file: DataFile, size: int) -> list[Block]:
    meta = _parquet(file).metadata
    groups, start, filled = [], 0, 0
    for index in range(meta.num_row_groups):
        filled += meta.row_group(index).total_byte_size
        if filled >= size or index == meta.num_row_groups - 1:
            groups.append((start, index + 1, 1))
            start, filled = index + 1, 0
    return groups or [WHOLE]


# --- lines ---


def _numbered(file: DataFile, block: Block) -> Iterator[tuple[int, bytes]]:
    """(line number, bytes without the line end) of non-blank lines."""
    start, stop, number = block
    if stop < 0:
        source: Iterable[bytes] = file.stream()
    else:
        with readable(file.name), Path(file.uri).open("rb") as whole:
            whole.seek(start)
            source = io.BytesIO(whole.read(stop - start))
    for place, line in enumerate(_guarded(file, source)):
        if place == 0 and number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if line.strip():
            yield number + place, line.rstrip(b"\r\n")


def _guarded(file: DataFile, source: Iterable[bytes]) -> Iterator[bytes]:
    """Lines; a store that fails or a broken archive names the file."""
    try:
        yield from source
    except (OSError, EOFError, pa.ArrowException) as error:
        raise DataError(f"cannot read {file.name}", cause=str(error)[:300]) from error


def _decoded(number: int, line: bytes) -> str | RawRow:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        return RawRow(None, number, f"{INVALID_UTF8} at byte {error.start}", preview(line))


def _json_lines(file: DataFile, block: Block) -> Iterator[RawRow]:
    for number, line in _numbered(file, block):
        text = _decoded(number, line)
        yield text if isinstance(text, RawRow) else _object(text, number)


def _object(text: str, number: int) -> RawRow:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        return RawRow(None, number, f"not JSON: {str(error)[:120]}", preview(text))
    return _checked(value, number)


def _checked(value: object, number: int | None) -> RawRow:
    if isinstance(value, dict):
        return RawRow(value, number)
    return RawRow(None, number, f"not an object but {type(value).__name__}", preview(value))


def _text_lines(file: DataFile, block: Block) -> Iterator[RawRow]:
    for number, line in _numbered(file, block):
        text = _decoded(number, line)
        yield text if isinstance(text, RawRow) else RawRow({"text": text}, number)


def _json(file: DataFile, block: Block) -> Iterator[RawRow]:
    lines = list(itertools.islice(_numbered(file, WHOLE), 2))
    if not lines:
        return
    first = lines[0][1].lstrip()
    if first.startswith(b"{") and len(lines) > 1 and _object(_lenient(first), 1).row is not None:
        yield from _json_lines(file, WHOLE)
        return
    # an undecodable byte becomes a lone surrogate, which only the row that holds it fails on later
    text = _lenient(b"".join(_guarded(file, file.stream())))
    try:
        value = json.loads(text.removeprefix("\ufeff"))
    except json.JSONDecodeError as error:
        yield RawRow(None, error.lineno, f"not JSON: {error.msg}", preview(text[error.pos - 40 :]))
    except (ValueError, RecursionError) as error:
        yield RawRow(None, None, f"not JSON: {str(error)[:120]}", preview(text))
    else:
        for item in value if isinstance(value, list) else [value]:
            yield _checked(item, None)


def _lenient(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


# --- tables ---


def _csv(file: DataFile, block: Block) -> Iterator[RawRow]:
    csv.field_size_limit(_FIELD_LIMIT)
    lines = (_lenient(line) for line in _guarded(file, file.stream()))
    reader = csv.reader(lines, delimiter="\t" if file.format == "tsv" else ",")
    header, number = None, 1
    while True:
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield RawRow(None, number, f"not CSV: {error}")
            fields = []
        if header is None and fields:
            header = [fields[0].removeprefix("\ufeff"), *fields[1:]]
        elif fields and header is not None:
            if len(fields) == len(header):
                yield RawRow(dict(zip(header, fields, strict=True)), number)
            else:
                reason = f"{len(fields)} fields where the header has {len(header)}"
                yield RawRow(None, number, reason, preview(fields))
        number = reader.line_num + 1


def _parquet(file: DataFile) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file.random())
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"not a parquet file: {file.name}", cause=str(error)[:300]) from error


def _parquet_rows(file: DataFile, block: Block) -> Iterator[RawRow]:
    groups = None if block[1] < 0 else list(range(block[0], block[1]))
    yield from _table_rows(file, _parquet(file).iter_batches(1024, row_groups=groups))


def _arrow_rows(file: DataFile, block: Block) -> Iterator[RawRow]:
    source = file.random()
    try:
        reader = pa.ipc.open_file(source)
        batches = (reader.get_batch(index) for index in range(reader.num_record_batches))
    except (OSError, pa.ArrowException):
        source.seek(0)
        try:
            batches = iter(pa.ipc.open_stream(source))
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"not an arrow file: {file.name}", cause=str(error)[:300]) from error
    yield from _table_rows(file, batches)


def _table_rows(file: DataFile, batches: Iterable[pa.RecordBatch]) -> Iterator[RawRow]:
    try:
        for batch in batches:
            yield from batch_rows(batch)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{file.name} is damaged", cause=str(error)[:300]) from error


def batch_rows(batch: pa.RecordBatch) -> Iterator[RawRow]:
    """Rows of a record batch; one by one where a string in it is not UTF-8."""
    try:
        yield from [RawRow(row) for row in batch.to_pylist()]
        return
    except UnicodeDecodeError:
        pass
    for index in range(batch.num_rows):
        try:
            yield RawRow(batch.slice(index, 1).to_pylist()[0])
        except UnicodeDecodeError as error:
            yield RawRow(None, None, INVALID_UTF8, preview(bytes(error.object)))


def _unknown(file: DataFile, block: Block) -> Iterator[RawRow]:
    raise DataError(f"unknown file format: {file.name}", fix="rename it, or convert it to .jsonl")


_READERS = {
    "lines": _json_lines,
    "text": _text_lines,
    "json": _json,
    "csv": _csv,
    "tsv": _csv,
    "parquet": _parquet_rows,
    "arrow": _arrow_rows,
    "unknown": _unknown,
}
