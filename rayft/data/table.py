"""TokenTable: all documents of a split, flat, and what was counted while they were made.

On storage it is a folder: `tokens-<id>.arrow` (Arrow IPC file, one record batch: source int32, row
int64, ids large_list<int32>, mask large_list<uint8>), `bad_rows.jsonl`, and `meta.json`, which is
written last, names the file and makes the folder valid. Local files are memory-mapped, so all
processes of a machine share one copy; a file is never written again, so that two runs that make the
same table at the same time cannot pull it from under each other.

Legend: D documents, N tokens of all documents.
"""

from __future__ import annotations

import io
import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import IO, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rayft.core.storage import Storage

META, BAD_ROWS = "meta.json", "bad_rows.jsonl"


@dataclass(frozen=True)
class Bad:
    """A row that was not used, as listed in bad_rows.jsonl. `row` counts from 0 in its source,
    `line` from 1 in its file (null where the format has no lines)."""

    source: str
    row: int
    file: str
    line: int | None
    reason: str
    preview: str

    @property
    def place(self) -> str:
        """file:line, or file and row."""
        return f"{self.file}:{self.line}" if self.line else f"{self.file}, row {self.row}"


@dataclass(frozen=True)
class Counts:
    """rows = documents + dropped + bad; `cut` documents are among the documents; `trained` tokens
    are targets."""

    rows: int = 0
    documents: int = 0
    tokens: int = 0
    trained: int = 0
    cut: int = 0
    dropped: int = 0
    bad: int = 0

    def __add__(self, other: Counts) -> Counts:
        mine, theirs = asdict(self), asdict(other)
        return Counts(**{key: mine[key] + theirs[key] for key in mine})


@dataclass(frozen=True)
class TokenTable:
    """Documents and counts.

    ids (N,) int32, mask (N,) bool (True: trained), offsets (D + 1,) int64, source (D,) int32 index
    into `sources`, row (D,) int64 number in the source, task (D,) int32 index into the run's task
    names.
    """

    ids: NDArray[np.int32]
    mask: NDArray[np.bool_]
    offsets: NDArray[np.int64]
    source: NDArray[np.int32]
    row: NDArray[np.int64]
    task: NDArray[np.int32]
    sources: tuple[str, ...]
    counts: tuple[Counts, ...]
    bad: tuple[Bad, ...] = ()
    digest: str = ""

    @property
    def documents(self) -> int:
        """D."""
        return len(self.offsets) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(D,) tokens."""
        return np.diff(self.offsets)

    @property
    def total(self) -> Counts:
        """Over all sources."""
        return sum(self.counts, Counts())

    def length(self, index: int) -> int:
        """Tokens of one document."""
        return int(self.offsets[index + 1] - self.offsets[index])

    def document(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """(ids, mask) of one document, views."""
        start, stop = self.offsets[index], self.offsets[index + 1]
        return self.ids[start:stop], self.mask[start:stop]

    def summary(self) -> dict[str, Any]:
        """For run.json: {"total": counts, "sources": {"0 path": counts}, "hash": ...}."""
        named = {
            f"{index} {name}": asdict(count)
            for index, (name, count) in enumerate(zip(self.sources, self.counts, strict=True))
        }
        return {"hash": self.digest, "total": asdict(self.total), "sources": named}

    def with_tasks(self, tasks: Sequence[int]) -> TokenTable:
        """The same documents; `tasks[i]` is the task of source i."""
        return replace(self, task=np.asarray(tasks, dtype=np.int32)[self.source])

    def bad_rows_jsonl(self) -> bytes:
        """One line per bad row: {"source","row","file","line","reason","preview"}."""
        return b"".join(json.dumps(asdict(item)).encode() + b"\n" for item in self.bad)


def from_documents(
    documents: Sequence[tuple[NDArray[np.int32], NDArray[np.bool_]]],
    rows: Sequence[int],
    *,
    source: int,
    counts: Sequence[Counts],
    sources: Sequence[str],
    bad: Sequence[Bad] = (),
) -> TokenTable:
    """A table of documents of one source; all have task 0 until
    `TokenTable.with_tasks`."""
    offsets = np.zeros(len(documents) + 1, dtype=np.int64)
    np.cumsum([len(ids) for ids, _ in documents], out=offsets[1:])
    return TokenTable(
        ids=np.concatenate([np.zeros(0, np.int32), *(ids for ids, _ in documents)]),
        mask=np.concatenate([np.zeros(0, np.bool_), *(mask for _, mask in documents)]),
        offsets=offsets,
        source=np.full(len(documents), source, dtype=np.int32),
        row=np.asarray(rows, dtype=np.int64),
        task=np.zeros(len(documents), dtype=np.int32),
        sources=tuple(sources),
        counts=tuple(counts),
        bad=tuple(bad),
    )


def joined(tables: Sequence[TokenTable], rows: Sequence[int]) -> TokenTable:
    """Tables of the same sources one after another; `rows[i]` is added to the row numbers of the
    i-th."""
    first = np.cumsum([0, *(len(table.ids) for table in tables)])
    bad = [
        replace(item, row=item.row + base)
        for table, base in zip(tables, rows, strict=True)
        for item in table.bad
    ]
    return TokenTable(
        ids=np.concatenate([table.ids for table in tables]),
        mask=np.concatenate([table.mask for table in tables]),
        offsets=np.concatenate(
            [[0], *(table.offsets[1:] + base for table, base in zip(tables, first, strict=False))]
        ).astype(np.int64),
        source=np.concatenate([table.source for table in tables]),
        row=np.concatenate(
            [table.row + base for table, base in zip(tables, rows, strict=True)]
        ).astype(np.int64),
        task=np.concatenate([table.task for table in tables]),
        sources=tables[0].sources,
        counts=tuple(
            sum((table.counts[index] for table in tables), Counts())
            for index in range(len(tables[0].sources))
        ),
        bad=tuple(bad),
    )


# --- on storage ---


class _Sink(io.RawIOBase):
    """A storage file with all that pyarrow asks of a Python file."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._file.write(data)
        return len(memoryview(data))


def save(table: TokenTable, meta: Mapping[str, Any], storage: Storage) -> None:
    """Write the table into the folder `storage`; meta.json, written last, declares it valid.

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
        }
    )

    name = f"tokens-{uuid.uuid4().hex[:8]}.arrow"

    def write() -> None:
        with (
            storage.open_output(name) as file,
            pa.ipc.new_file(_Sink(file), batch.schema) as writer,
        ):
            writer.write_batch(batch)

    storage.attempt("write", name, write)
    storage.write_bytes(BAD_ROWS, table.bad_rows_jsonl())
    counts = [asdict(count) for count in table.counts]
    size = {"documents": table.documents, "tokens": len(table.ids)}
    facts = {**meta, "file": name, **size, "counts": counts}
    storage.write_text(META, json.dumps(facts, indent=1) + "\n")


def load(
    storage: Storage, sources: Sequence[str], digest: str, tasks: Sequence[int]
) -> TokenTable | None:
    """The table in the folder `storage`; None when there is none, or not a whole one.

    `tasks[i]` is the task of source i: tags and weights are no part of what is cached.
    """
    if not storage.exists(META):
        return None
    meta = json.loads(storage.read_bytes(META))
    batch = _batch(storage, meta["file"])
    if batch is None or batch.num_rows != meta["documents"] or not storage.exists(BAD_ROWS):
        return None
    ids, mask, source = batch.column("ids"), batch.column("mask"), batch.column("source").to_numpy()
    lines = storage.read_bytes(BAD_ROWS).splitlines()
    return TokenTable(
        ids=ids.values.to_numpy(),
        mask=mask.values.to_numpy().view(np.bool_),
        offsets=ids.offsets.to_numpy(),
        source=source,
        row=batch.column("row").to_numpy(),
        task=np.asarray(tasks, dtype=np.int32)[source],
        sources=tuple(sources),
        counts=tuple(_counts(item) for item in meta["counts"]),
        bad=tuple(Bad(**json.loads(line)) for line in lines),
        digest=digest,
    )


def _counts(raw: Mapping[str, int]) -> Counts:
    return Counts(**{item.name: raw[item.name] for item in fields(Counts)})


def _batch(storage: Storage, name: str) -> pa.RecordBatch | None:
    """The one record batch: mapped where the file is local, read where it is not; None where it is
    missing or torn."""
    local = storage.local_path(name)
    try:
        if local is not None:
            return pa.ipc.open_file(pa.memory_map(str(local))).get_batch(0)
        return pa.ipc.open_file(pa.py_buffer(storage.read_bytes(name))).get_batch(0)
    except (FileNotFoundError, pa.ArrowInvalid):
        return None
