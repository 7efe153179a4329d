"""Batch: the one thing that travels from data to objective.

Shape legend, used everywhere: B rows of a micro-batch, T tokens of a row, V vocabulary, H hidden
size. A row holds one document, or several packed ones; all documents of a row belong to one task
and one trial.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from rayft.core.row_facts import RowFacts

IGNORE = -100  # the label of a position that is not trained, as in torch's cross_entropy
COLUMN = "column."  # before a column's name, where tensors travel as one plain dict

Inputs = tuple[dict[str, Tensor], dict[str, int]]
"""A batch as wrappers (DDP, DeepSpeed) carry it best: tensors by name, and plain numbers."""


@dataclass(frozen=True)
class Column:
    """What a row or a token has beside its ids: a reference's log-probability, a class, a score.

    Attributes:
        name: unique in a table.
        per: "row": (B,), or "token": (B, T).
        dtype: as numpy and torch name it, e.g. "float32".
        fill: where there is nothing: padding, rows that train nothing.
    """

    name: str
    per: Literal["row", "token"]
    dtype: str = "float32"
    fill: float = 0.0

    def empty(self, rows: int, length: int) -> Tensor:
        """(B,) or (B, T) of `fill`."""
        shape = (rows,) if self.per == "row" else (rows, length)
        return torch.from_numpy(np.full(shape, self.fill, dtype=self.dtype))

    def padded(self, values: Tensor, length: int) -> Tensor:
        """(B, T) made (B, `length`) by `fill` on the right; (B,) as it is."""
        more = length - values.shape[-1]
        if self.per == "row" or more == 0:
            return values
        return functional.pad(values, (0, more), value=self.fill)


@dataclass(frozen=True)
class Batch:
    """One micro-batch of token rows, padded on the right.

    `labels[b, t]` is the token that position t itself holds where it is trained, IGNORE elsewhere
    (the Hugging Face convention: the loss predicts labels[:, t] from position t - 1). The first
    token of a document is never a label, so nothing is predicted across a document border.
    """

    input_ids: Tensor  # (B, T) int64
    labels: Tensor  # (B, T) int64
    position_ids: Tensor  # (B, T) int64, restarts at 0 with every packed document
    lengths: Tensor  # (B,) int64, real tokens of each row (the rest is padding)
    task: Tensor  # (B,) int64, index into the run's task names
    trial: Tensor  # (B,) int64, slot of a pack; 0 in a solo run
    packed: bool  # True: rows may hold several documents, attention must not cross them
    columns: Mapping[str, Tensor] = field(default_factory=dict)  # (B,) or (B, T), by Column.name
    part: int = 0  # of the objective that all its rows belong to; 0 where it has one part
    declared: tuple[Column, ...] = ()  # `columns`, as the table has them; wrappers leave it behind
    predicting: Tensor | None = None  # (N,) int64, `trained_positions` of a batch that was moved

    @property
    def rows(self) -> int:
        """B."""
        return self.input_ids.shape[0]

    def targets(self) -> Tensor:
        """(B, T - 1) int64: what positions 0..T-2 must predict."""
        return self.labels[:, 1:]

    def tokens(self) -> Tensor:
        """(B,) float64: trained targets per row. float64 counts exactly and sums exactly."""
        return (self.targets() != IGNORE).sum(dim=1).to(torch.float64)

    def facts(self) -> RowFacts:
        """What an objective counts from; of a batch in host memory."""
        columns = {one.name: self.columns[one.name] for one in self.declared if one.per == "row"}
        return RowFacts(self.tokens(), self.lengths, self.task, self.trial, columns)

    def trained_positions(self) -> Tensor:
        """(N,) int64: where in the flattened (B T) positions something is predicted. How many
        there are the host must know: looking for them on a device would make it wait."""
        if self.predicting is not None:
            return self.predicting
        following = functional.pad(self.targets(), (0, 1), value=IGNORE).flatten()
        return (following != IGNORE).nonzero().squeeze(1)

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`; the host does not wait."""
        found = replace(self, predicting=self.trained_positions())
        tensors, numbers = found.inputs()
        moved = {name: to_device(one, device) for name, one in tensors.items()}
        return replace(Batch.of((moved, numbers)), declared=self.declared)

    def inputs(self) -> Inputs:
        """What a forward pass needs of it, as `of` takes it."""
        tensors = {
            "input_ids": self.input_ids,
            "labels": self.labels,
            "position_ids": self.position_ids,
            "lengths": self.lengths,
            "task": self.task,
            "trial": self.trial,
        }
        if self.predicting is not None:
            tensors["predicting"] = self.predicting
        columns = {COLUMN + name: values for name, values in self.columns.items()}
        return tensors | columns, {"packed": int(self.packed), "part": self.part}

    @classmethod
    def of(cls, inputs: Inputs) -> Batch:
        """The batch that `inputs` gave."""
        tensors, numbers = inputs
        return cls(
            input_ids=tensors["input_ids"],
            labels=tensors["labels"],
            position_ids=tensors["position_ids"],
            lengths=tensors["lengths"],
            task=tensors["task"],
            trial=tensors["trial"],
            packed=bool(numbers["packed"]),
            columns={
                name.removeprefix(COLUMN): one
                for name, one in tensors.items()
                if name.startswith(COLUMN)
            },
            part=numbers["part"],
            predicting=tensors.get("predicting"),
        )

    def widened(self, length: int) -> Batch:
        """T raised to `length` by padding on the right, which neither attention nor loss sees: one
        more document where rows are packed (see data/collate.py)."""
        have = self.input_ids.shape[1]
        more = length - have
        if more == 0:
            return self
        rest = torch.arange(more) if self.packed else torch.arange(have, length)
        return replace(
            self,
            input_ids=functional.pad(self.input_ids, (0, more)),
            labels=functional.pad(self.labels, (0, more), value=IGNORE),
            position_ids=torch.cat([self.position_ids, rest.expand(self.rows, -1)], dim=1),
            columns={one.name: one.padded(self.columns[one.name], length) for one in self.declared},
            predicting=None,
        )


def joined_batch(batches: Sequence[Batch]) -> Batch:
    """The rows of all of them, as long as the longest; `trial` is the number of the batch that a
    row comes from.

    Raises:
        ValueError: they have other columns, or belong to several parts: one forward pass cannot
            serve them.
    """
    if len({(batch.part, batch.declared) for batch in batches}) > 1:
        raise ValueError("rows of several parts, or with other columns, in one batch")
    length = max(batch.input_ids.shape[1] for batch in batches)
    # where in the whole something is predicted, no batch of them knows
    wide = [replace(b.widened(length), predicting=None).inputs()[0] for b in batches]
    sizes = torch.tensor([batch.rows for batch in batches])
    tensors = {name: torch.cat([one[name] for one in wide]) for name in wide[0]}
    tensors["trial"] = torch.repeat_interleave(torch.arange(len(batches)), sizes)
    packed = any(batch.packed for batch in batches)
    joined = Batch.of((tensors, {"packed": packed, "part": batches[0].part}))
    return replace(joined, declared=batches[0].declared)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`. A copy from pageable memory waits until the GPU has done all that was
    asked of it before, whatever `non_blocking` says; one from pinned memory does not."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
