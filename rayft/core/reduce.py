"""The single reduction of rayft: sum, then divide once, by global counts.

Objectives return sums per row, and counts that depend on the batch alone. Counts are added over all
micro-batches of a
step and over all ranks *before* the first backward pass, so every row is multiplied by 1 / (global
count of its term and trial):

    loss = sum_term weight[term] sum_row  sums[term][row] / totals[term][trial[row]]

Gradient accumulation, data parallelism, packing and packed trials are then exact by construction:
regrouping rows
changes nothing but the order of additions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from rayft.core.batch import Batch
from rayft.core.protocols import Objective


def counts(objective: Objective, window: Iterable[Batch], trials: int = 1) -> Tensor:
    """(terms, trials) float64: this rank's counts over the micro-batches of one step."""
    totals = torch.zeros(len(objective.terms), trials, dtype=torch.float64)
    for batch in window:
        rows = objective.count(batch)
        for index, term in enumerate(objective.terms):
            totals[index].index_add_(0, batch.trial.cpu(), rows[term].cpu())
    return totals


def scales(objective: Objective, batch: Batch, totals: Tensor) -> dict[str, Tensor]:
    """{term: (B,) float32} the factor of each row: weight / totals[term, trial], 0 where nothing
    counts."""
    inverse = torch.where(totals > 0, 1.0 / totals, torch.zeros_like(totals))
    trial = batch.trial
    return {
        term: (inverse[index] * weight).to(torch.float32).to(trial.device)[trial]
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
