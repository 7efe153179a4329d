"""The token cache: a TokenTable on storage, checked whenever it is opened.

    <cache>/<hash>/tokens-<id>.arrow     Arrow IPC file, one record batch: source int32, row int64,
                                         ids large_list<int32>, mask large_list<uint8>, and each
                                         column, per row plain, per token a large_list
                   bad_rows-<id>.jsonl
                   meta.json             written last: names both files, their sizes and crc32, and
                                         the counts; carries a checksum itself

Everybody who builds an entry does so under an id of its own and then points to it: builders of the
same table neither mix their files nor pull them from under each other, and the last one counts.

Local files are memory-mapped, so that all processes of a machine share one copy. Opening reads all
bytes once per process, which also brings them into the page cache that training reads from. It
costs 40 ms for 100 MB on a quiet Zen 4 core (2.6 GB/s; sha256: 59 ms), measured with
`python -m timeit -s "import os, zlib; b = os.urandom(100 << 20)" "zlib.crc32(b)"`. No single bit
and no burst of up to 32 escapes a crc32, and of larger damages one in 4e9.
"""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import IO, Any
from uuid import uuid4

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rayft.core.batch import COLUMN, Column
from rayft.data.table import BadRowEntry, TableCounts, TokenTable
from rayft.storage.folder import Storage
from rayft.storage.sealed import BadRecord, seal, unseal

META = "meta.json"

_checked: set[tuple[object, ...]] = set()
"""Local files whose bytes this process has verified: (path, inode, size, time of change, crc32)."""


class DamagedCache(Exception):
    """An entry is not what was written; the text names the file and what is wrong."""


class _HashingFile(io.RawIOBase):
    """A storage file with all that pyarrow asks of a Python file; counts and sums what it takes."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.size = self.crc = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._file.write(data)
        self.crc, size = zlib.crc32(data, self.crc), len(memoryview(data))
        self.size += size
        return size


def save(table: TokenTable, meta: Mapping[str, object], storage: Storage) -> str:
    """Write the table as the entry in the folder `storage`; where its bad rows are listed.

    Raises:
        StorageError: it cannot be written.
    """
    offsets = pa.array(table.offsets)
    batch = pa.record_batch(
        {
            "source": pa.array(table.source),
            "row": pa.array(table.row),
            "ids": pa.LargeListArray.from_arrays(offsets, pa.array(table.ids)),
            "mask": pa.LargeListArray.from_arrays(offsets, pa.array(table.mask.view(np.uint8))),
            **{COLUMN + one.name: _arrow(one, table, offsets) for one in table.columns},
        }
    )
    mark, bad = uuid4().hex[:8], table.bad_rows_jsonl()
    tokens, bad_rows = f"tokens-{mark}.arrow", f"bad_rows-{mark}.jsonl"

    def write() -> _HashingFile:
        with storage.open_output(tokens) as file:
            sink = _HashingFile(file)
            with pa.ipc.new_file(sink, batch.schema) as writer:
                writer.write_batch(batch)
        return sink

    sink = storage.attempt("write", tokens, write)
    storage.write_bytes(bad_rows, bad)
    facts = {
        **meta,
        "tokens_file": {"name": tokens, "size": sink.size, "crc32": f"{sink.crc:08x}"},
        "bad_rows_file": {"name": bad_rows, "size": len(bad), "crc32": f"{zlib.crc32(bad):08x}"},
        "documents": table.documents,
        "tokens": len(table.ids),
        "counts": [asdict(count) for count in table.counts],
        "columns": [asdict(column) for column in table.columns],
    }
    storage.write_text(META, seal(facts))
    return storage.shown(bad_rows)


def read_meta(storage: Storage) -> dict[str, Any] | None:
    """meta.json of an entry; None when there is no entry.

    Raises:
        DamagedCache: it is not what was written.
    """
    try:
        meta = unseal(storage.read_bytes(META))
    except FileNotFoundError:
        return None
    except BadRecord as error:
        raise DamagedCache(f"{META}: {error}") from error
    if "tokens_file" not in meta:
        raise DamagedCache(f"{META}: of an older rayft, without checksums")
    return meta


def load(
    storage: Storage, sources: Sequence[str], digest: str, tasks: Sequence[int]
) -> TokenTable | None:
    """The table in the folder `storage`; None when there is none.

    `tasks[i]` is the task of source i: tags and weights are no part of what is cached.

    Raises:
        DamagedCache: a byte of it differs from what was written, or a file is gone.
    """
    meta = read_meta(storage)
    if meta is None:
        return None
    if meta["hash"] != digest:
        raise DamagedCache(f"{META}: of the entry {meta['hash']}")
    batch = pa.ipc.open_file(_verified(storage, meta["tokens_file"])).get_batch(0)
    ids, mask, source = batch.column("ids"), batch.column("mask"), batch.column("source").to_numpy()
    columns = tuple(Column(**item) for item in meta.get("columns", ()))
    lines = _verified(storage, meta["bad_rows_file"]).to_pybytes().splitlines()
    return TokenTable(
        ids=ids.values.to_numpy(),
        mask=mask.values.to_numpy().view(np.bool_),
        offsets=ids.offsets.to_numpy(),
        source=source,
        row=batch.column("row").to_numpy(),
        task=np.asarray(tasks, dtype=np.int32)[source],
        sources=tuple(sources),
        counts=tuple(_counts(item) for item in meta["counts"]),
        bad=tuple(BadRowEntry(**json.loads(line)) for line in lines),
        digest=digest,
        columns=columns,
        values={one.name: _values(one, batch.column(COLUMN + one.name)) for one in columns},
    )


def _arrow(column: Column, table: TokenTable, offsets: pa.Array) -> pa.Array:
    values = pa.array(table.values[column.name])
    return values if column.per == "row" else pa.LargeListArray.from_arrays(offsets, values)


def _values(column: Column, stored: pa.Array) -> NDArray[np.generic]:
    values = stored if column.per == "row" else stored.values
    return values.to_numpy(zero_copy_only=False)  # truth values are bits in Arrow


def listing(storage: Storage) -> str:
    """Where the bad rows of a good entry are listed."""
    meta = read_meta(storage)
    return storage.shown(meta["bad_rows_file"]["name"]) if meta else ""


def _counts(raw: Mapping[str, int]) -> TableCounts:
    return TableCounts(**{item.name: raw[item.name] for item in fields(TableCounts)})


def _verified(storage: Storage, wanted: Mapping[str, Any]) -> pa.Buffer:
    """The bytes of a file: mapped where it is local, read where it is not."""
    name = wanted["name"]
    local, key = storage.local_path(name), ()
    try:
        if local is None:
            data = pa.py_buffer(storage.read_bytes(name))
        else:
            seen = local.stat()
            key = (str(local), seen.st_ino, seen.st_size, seen.st_mtime_ns, wanted["crc32"])
            # An empty file cannot be mapped.
            data = pa.memory_map(str(local)).read_buffer() if seen.st_size else pa.py_buffer(b"")
    except FileNotFoundError as error:
        raise DamagedCache(f"{name} is gone") from error
    if key and key in _checked:
        return data
    if data.size != wanted["size"]:
        raise DamagedCache(f"{name} has {data.size} bytes of {wanted['size']}")
    if f"{zlib.crc32(data):08x}" != wanted["crc32"]:
        raise DamagedCache(f"{name}: its checksum does not match")
    if key:
        _checked.add(key)
    return data
