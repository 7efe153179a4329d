"""TokenTable: all documents of a split, flat, and what was counted while they were made.

How it lies on storage: `cache.py`.

Legend: D documents, N tokens of all documents.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from rayft.core.batch import Column


@dataclass(frozen=True)
class BadRowEntry:
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
class TableCounts:
    """rows = documents + dropped + bad; `cut` documents are among the documents; `trained` tokens
    are targets."""

    rows: int = 0
    documents: int = 0
    tokens: int = 0
    trained: int = 0
    cut: int = 0
    dropped: int = 0
    bad: int = 0

    def __add__(self, other: TableCounts) -> TableCounts:
        mine, theirs = asdict(self), asdict(other)
        return TableCounts(**{key: mine[key] + theirs[key] for key in mine})


@dataclass(frozen=True)
class TokenTable:
    """Documents and counts.

    ids (N,) int32, mask (N,) bool (True: trained), offsets (D + 1,) int64, source (D,) int32 index
    into `sources`, row (D,) int64 number in the source, task (D,) int32 index into the run's task
    names. `values` holds what `columns` declare, by name: (D,), or (N,) per token.
    """

    ids: NDArray[np.int32]
    mask: NDArray[np.bool_]
    offsets: NDArray[np.int64]
    source: NDArray[np.int32]
    row: NDArray[np.int64]
    task: NDArray[np.int32]
    sources: tuple[str, ...]
    counts: tuple[TableCounts, ...]
    bad: tuple[BadRowEntry, ...] = ()
    digest: str = ""
    columns: tuple[Column, ...] = ()
    values: Mapping[str, NDArray[np.generic]] = field(default_factory=dict)

    @property
    def documents(self) -> int:
        """D."""
        return len(self.offsets) - 1

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """(D,) tokens."""
        return np.diff(self.offsets)

    @cached_property
    def trained(self) -> NDArray[np.int64]:
        """(D,) targets: trained tokens, less the first of a document, which nothing predicts."""
        filled = self.lengths > 0
        starts = self.offsets[:-1][filled]
        counted = np.zeros(self.documents, dtype=np.int64)
        counted[filled] = np.add.reduceat(self.mask, starts, dtype=np.int64) - self.mask[starts]
        return counted

    @property
    def total(self) -> TableCounts:
        """Over all sources."""
        return sum(self.counts, TableCounts())

    def length(self, index: int) -> int:
        """Tokens of one document."""
        return int(self.offsets[index + 1] - self.offsets[index])

    def document(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """(ids, mask) of one document, views."""
        start, stop = self.offsets[index], self.offsets[index + 1]
        return self.ids[start:stop], self.mask[start:stop]

    def column(self, column: Column, index: int) -> NDArray[np.generic]:
        """(T,) of one document, or () where the column is per row; a view."""
        values = self.values[column.name]
        if column.per == "row":
            return values[index : index + 1].reshape(())
        return values[self.offsets[index] : self.offsets[index + 1]]

    def summary(self) -> dict[str, object]:
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
    counts: Sequence[TableCounts],
    sources: Sequence[str],
    bad: Sequence[BadRowEntry] = (),
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
    """Tables of the same sources and columns one after another; `rows[i]` is added to the row
    numbers of the i-th."""
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
            sum((table.counts[index] for table in tables), TableCounts())
            for index in range(len(tables[0].sources))
        ),
        bad=tuple(bad),
        columns=tables[0].columns,
        values={
            column.name: np.concatenate([table.values[column.name] for table in tables])
            for column in tables[0].columns
        },
    )
