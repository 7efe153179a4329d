"""The single reduction of rayft: sum, then divide once, by global counts.

Objectives return sums per row, and counts that depend on the data alone. Counts are added over all
rows of a step, those of other ranks too, *before* the first backward pass, so every row is
multiplied by 1 / (global count of its term and trial):

    loss = sum_term weight[term] sum_row  sums[term][row] / totals[term][trial[row]]

Gradient accumulation, data parallelism, packing and packed trials are then exact by construction:
regrouping rows changes nothing but the order of additions. The data is a pure function of the step,
so to know the global counts takes no communication.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from rayft.core.batch import Batch, to_device
from rayft.core.protocols import Objective
from rayft.core.row_facts import RowFacts


def counts(objective: Objective, rows: Iterable[RowFacts], trials: int = 1) -> Tensor:
    """(terms, trials) float64: what all of `rows` count together."""
    totals = torch.zeros(len(objective.terms), trials, dtype=torch.float64)
    for some in rows:
        counted = objective.count(some)
        for index, term in enumerate(objective.terms):
            totals[index].index_add_(0, some.trial, counted[term])
    return totals


def scales(objective: Objective, batch: Batch, totals: Tensor) -> dict[str, Tensor]:
    """{term: (B,) float32} the factor of each row: weight / totals[term, trial], 0 where nothing
    counts."""
    inverse = torch.where(totals > 0, 1.0 / totals, torch.zeros_like(totals))
    trial = batch.trial
    return {
        term: to_device((inverse[index] * weight).to(torch.float32), trial.device)[trial]
        for index, (term, weight) in enumerate(objective.terms.items())
    }


def reduce_rows(rows: Mapping[str, Tensor], scale: Mapping[str, Tensor]) -> Tensor:
    """Scalar: this rank's part of the global loss of one micro-batch."""
    return torch.stack([(rows[term] * scale[term]).sum() for term in rows]).sum()


def trial_losses(
    rows: Mapping[str, Tensor], scale: Mapping[str, Tensor], trial: Tensor, trials: int
) -> Tensor:
    """(trials,): `reduce_rows` of every trial alone; their sum is what a pack goes backward from.
    `trial` (B,) is the trial of each row."""
    total = torch.stack([rows[term] * scale[term] for term in rows]).sum(dim=0)  # (B,)
    return torch.zeros(trials, dtype=total.dtype, device=total.device).index_add(0, trial, total)


def sum_over_ranks(values: Tensor, device: torch.device) -> Tensor:
    """`values` added up over all ranks, on CPU; itself when there is one rank."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return values
    moved = values.to(device)
    dist.all_reduce(moved)
    return moved.cpu()


@dataclass(frozen=True)
class RankSum:
    """A sum over all ranks that is under way while this rank goes on; on the device of its
    values."""

    values: Tensor
    under_way: dist.Work | None  # None: there is one rank

    @staticmethod
    def begun(values: Tensor) -> RankSum:
        """Start to add up `values`, which nobody else may use any more."""
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return RankSum(values, None)
        work = dist.all_reduce(values, async_op=True)
        if values.is_cuda and work is not None:
            # DeepSpeed's collectives follow on a group of its own, and two nccl groups must not be
            # under way at once. Here the device's stream waits, not the host.
            work.wait()
            work = None
        return RankSum(values, work)

    def finished(self) -> Tensor:
        """The sum."""
        if self.under_way is not None:
            self.under_way.wait()
        return self.values
