"""The order of the training data, as a pure function of (seed, step); and the evaluation batches.

Epoch e is a permutation of documents drawn from (seed, e): a source of weight w appears floor(w)
times, and a fresh random part of it of size w - floor(w) once more. With packing the permuted
documents are packed per task, and the rows are permuted again. Epochs follow each other without a
break; step s is rows [(s - 1) G, s G) of that endless list, so a global batch may lie across two
epochs, and a resumed run needs its step number only.

Inside a step rows are sorted by length and cut into micro-batches that are dealt to the ranks in
turn: neighbours are padded little, and ranks get similar lengths. How a step is cut never changes
which rows it has.

Legend: D documents, G rows of a global batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from rayft.core.batch import Batch
from rayft.core.errors import DataError
from rayft.core.row_facts import RowFacts
from rayft.data.collate import collate, dummy
from rayft.data.packing import pack
from rayft.data.table import TokenTable


@dataclass(frozen=True)
class RowPlan:
    """Rows of an epoch or of a step: row r holds documents[offsets[r]:offsets[r + 1]]."""

    documents: NDArray[np.int64]
    offsets: NDArray[np.int64]

    @property
    def rows(self) -> int:
        """How many."""
        return len(self.offsets) - 1

    def row(self, index: int) -> NDArray[np.int64]:
        """Documents of one row."""
        return self.documents[self.offsets[index] : self.offsets[index + 1]]

    def part(self, first: int, last: int) -> RowPlan:
        """Rows [first, last)."""
        offsets = self.offsets[first : last + 1]
        return RowPlan(self.documents[offsets[0] : offsets[-1]], offsets - offsets[0])

    def sums(self, per_document: NDArray[np.int64]) -> NDArray[np.int64]:
        """(rows,) sums over the documents of each row; `per_document` is indexed by document."""
        up_to = np.concatenate([[0], np.cumsum(per_document[self.documents])])
        return up_to[self.offsets[1:]] - up_to[self.offsets[:-1]]


@dataclass(frozen=True)
class TrainStream:
    """Micro-batches by step (core.protocols.BatchStream).

    Args:
        table: the documents.
        weights: passes per epoch of each source of the table.
        seed: of the order.
        global_batch: rows per step over all ranks; packed: rows of max_length.
        micro_batch: rows per forward pass, at most.
        max_length: tokens per row at most.
        packing: whether rows hold several documents.
        pad_id: id of padding tokens.
        epochs: where the data ends (the last step may be smaller); None: it never does.
        multiple: widths are rounded up to a multiple of it.
    """

    table: TokenTable
    weights: tuple[float, ...]
    seed: int
    global_batch: int
    micro_batch: int
    max_length: int
    packing: bool
    pad_id: int
    epochs: float | None = None
    multiple: int = 1

    def __post_init__(self) -> None:
        # caches of a frozen object: what they hold follows from the fields
        object.__setattr__(self, "_plans", {})
        object.__setattr__(self, "_starts", [0])  # _starts[e]: rows before epoch e
        if not self.plan(0).rows:
            raise DataError("an epoch of the training data has no row: weights too small?")

    def window(self, step: int, rank: int, world: int) -> list[Batch]:
        """This rank's micro-batches of `step` (1-based), longest rows first; the same number on
        every rank. A rank without rows gets a batch that trains nothing."""
        plan = self.step_plan(step)
        parts = split_rows(plan.sums(self.table.lengths), self.micro_batch, world)
        return [
            collate(
                self.table,
                [plan.row(index).tolist() for index in part],
                pad_id=self.pad_id,
                packed=self.packing,
                multiple=self.multiple,
            )
            if len(part)
            else dummy(pad_id=self.pad_id, packed=self.packing, columns=self.table.columns)
            for part in parts[rank::world]
        ]

    def facts(self, step: int) -> RowFacts:
        """Of the global batch of `step`, rank by rank the same; no token is read."""
        plan, table = self.step_plan(step), self.table
        first = plan.documents[plan.offsets[:-1]]  # a row is of one task
        return RowFacts(
            trained=torch.from_numpy(plan.sums(table.trained)).double(),
            lengths=torch.from_numpy(plan.sums(table.lengths)),
            task=torch.from_numpy(table.task[first]).long(),
            trial=torch.zeros(plan.rows, dtype=torch.int64),
            columns={
                one.name: torch.from_numpy(table.values[one.name][first])
                for one in table.columns
                if one.per == "row"
            },
        )

    def step_plan(self, step: int) -> RowPlan:
        """The global batch of a step. Fewer than G rows at the end of the data, none after it."""
        if step < 1:
            raise ValueError(f"steps count from 1, got {step}")
        first, last = (step - 1) * self.global_batch, step * self.global_batch
        if self.epochs is not None:
            last = min(last, self.rows_in(self.epochs))
        parts: list[RowPlan] = []
        epoch = 0
        while first < last:
            while self._start(epoch + 1) <= first:
                epoch += 1
            plan, base = self.plan(epoch), self._start(epoch)
            end = min(last, base + plan.rows)
            parts.append(plan.part(first - base, end - base))
            first = end
        return _joined(parts)

    def steps_for(self, epochs: float) -> int:
        """Steps that `epochs` passes take; the last one may be smaller."""
        return math.ceil(self.rows_in(epochs) / self.global_batch)

    def rows_in(self, epochs: float) -> int:
        """Rows of the first `epochs` passes; at least 1."""
        whole = int(epochs)
        rows, part = self._start(whole), epochs - whole
        if part > 0:
            rows += round(part * (self._start(whole + 1) - rows))
        return max(1, rows)

    def plan(self, epoch: int) -> RowPlan:
        """The rows of an epoch; the last two are kept."""
        plans: dict[int, RowPlan] = self.__dict__["_plans"]
        if epoch not in plans:
            while len(plans) > 1:
                del plans[next(iter(plans))]
            plans[epoch] = self._plan(epoch)
        return plans[epoch]

    # --- inside ---

    def _plan(self, epoch: int) -> RowPlan:
        rng = np.random.default_rng([self.seed, epoch])
        chosen = [
            _passes(np.flatnonzero(self.table.source == index), weight, rng)
            for index, weight in enumerate(self.weights)
        ]
        documents = rng.permutation(np.concatenate(chosen))
        if not self.packing:
            return RowPlan(documents, np.arange(len(documents) + 1))
        lengths, task = self.table.lengths, self.table.task[documents]
        orders, sizes = [], []
        for value in np.unique(task):
            members = documents[task == value]
            order, offsets = pack(lengths[members], self.max_length)
            orders.append(members[order])
            sizes.append(np.diff(offsets))
        return _shuffled(np.concatenate(orders), np.concatenate(sizes), rng)

    def _start(self, epoch: int) -> int:
        """Rows before `epoch`. Without fractional weights every epoch has the rows of the first:
        packing sees the same lengths, whatever their order."""
        starts: list[int] = self.__dict__["_starts"]
        if all(weight == int(weight) for weight in self.weights) or not self.packing:
            return epoch * self.plan_rows
        while len(starts) <= epoch:
            starts.append(starts[-1] + self.plan(len(starts) - 1).rows)
        return starts[epoch]

    @property
    def plan_rows(self) -> int:
        """Rows of epoch 0."""
        if "_rows" not in self.__dict__:
            object.__setattr__(self, "_rows", self.plan(0).rows)
        return self.__dict__["_rows"]


def split_rows(lengths: NDArray[np.int64], micro_batch: int, world: int) -> list[NDArray[np.int64]]:
    """Cut rows of these lengths, longest first, into as few micro-batches of at most `micro_batch`
    as give every rank the same number; their sizes differ by at most one, and a row short of it
    some are empty. Micro-batch i belongs to rank i % world."""
    order = np.argsort(-lengths, kind="stable")
    each = max(1, math.ceil(len(order) / (micro_batch * world)))
    return np.array_split(order, each * world)


def _passes(
    documents: NDArray[np.int64], weight: float, rng: np.random.Generator
) -> NDArray[np.int64]:
    """`weight` passes over the documents of a source."""
    whole = int(weight)
    extra = round((weight - whole) * len(documents))
    part = rng.choice(documents, size=extra, replace=False) if extra else documents[:0]
    return np.concatenate([np.tile(documents, whole), part])


def _joined(parts: Sequence[RowPlan]) -> RowPlan:
    """Rows one after another."""
    sizes = [np.diff(part.offsets) for part in parts]
    none = np.zeros(0, np.int64)
    return RowPlan(
        np.concatenate([none, *(part.documents for part in parts)]),
        np.concatenate([[0], np.cumsum(np.concatenate([none, *sizes]))]),
    )


def _shuffled(
    documents: NDArray[np.int64], sizes: NDArray[np.int64], rng: np.random.Generator
) -> RowPlan:
    """Packed rows in random order."""
    order = rng.permutation(len(sizes))
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    offsets = np.concatenate([[0], np.cumsum(sizes[order])])
    # position in the new list -> position in the old one
    take = np.arange(offsets[-1]) - np.repeat(offsets[:-1] - starts[order], sizes[order])
    return RowPlan(documents[take], offsets)


@dataclass(frozen=True)
class EvalSet:
    """Every held-out document once: unpacked, per task, sorted by length.

    Args:
        table: the documents.
        batch: rows per forward pass at most.
        pad_id: id of padding tokens.
        limit: take only so many documents, spread evenly over the table.
    """

    table: TokenTable
    batch: int
    pad_id: int
    limit: int | None = None

    def batches(self, rank: int, world: int) -> list[Batch]:
        """This rank's batches, each of one task; the same number on every rank, filled up with
        batches that count nothing."""
        chosen = np.arange(self.table.documents)
        if self.limit is not None and self.limit < len(chosen):
            chosen = np.linspace(0, len(chosen) - 1, self.limit).astype(np.int64)
        groups = []
        for task in np.unique(self.table.task[chosen]):
            members = chosen[self.table.task[chosen] == task]
            members = members[np.argsort(-self.table.lengths[members], kind="stable")]
            groups += [members[i : i + self.batch] for i in range(0, len(members), self.batch)]
        mine = [
            collate(self.table, [[int(one)] for one in group], pad_id=self.pad_id, packed=False)
            for group in groups[rank::world]
        ]
        missing = math.ceil(len(groups) / world) - len(mine)
        filler = dummy(pad_id=self.pad_id, packed=False, columns=self.table.columns)
        return mine + [filler] * missing
