"""Held-out loss per task: sums over rows and ranks, divided once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from rayft.core.batch import Batch
from rayft.core.protocols import Evaluator, Objective
from rayft.core.reduce import counts, sum_over_ranks


def evaluate(
    engine: Evaluator, objective: Objective, batches: Sequence[Batch], tasks: Sequence[str]
) -> dict[str, float]:
    """Evaluation metrics over this and all other ranks' batches.

    Args:
        batches: this rank's; every rank holds the same number (ZeRO-3 gathers on every forward).
        tasks: task names, by `Batch.task`.

    Returns:
        {"eval_loss", "eval_ppl", "eval_tokens"} over everything and, with several tasks,
        {"eval_loss/<task>", "eval_ppl/<task>"}; losses in nats per trained token.
    """
    sums = torch.zeros(len(objective.terms), len(tasks), dtype=torch.float64)
    totals = torch.zeros_like(sums)
    with engine.evaluating():
        for batch in batches:
            by_task = replace(batch, trial=batch.task)  # the reduction groups by trial: here, tasks
            totals += counts(objective, [by_task.facts()], trials=len(tasks))
            moved = batch.to(engine.device)
            one = torch.ones(batch.rows, device=engine.device)
            ones = dict.fromkeys(objective.terms, one)
            rows = engine.forward(moved, ones)
            for index, term in enumerate(objective.terms):
                sums[index].index_add_(0, batch.task, rows[term].to("cpu", torch.float64))
    both = sum_over_ranks(torch.stack([sums, totals]), engine.device)
    return metrics_of(both[0], both[1], tasks)


def metrics_of(sums: torch.Tensor, totals: torch.Tensor, tasks: Sequence[str]) -> dict[str, float]:
    """(terms, tasks) sums and counts -> named metrics. Several terms add up, as they do in
    training."""

    def named(suffix: str, numerator: torch.Tensor, denominator: torch.Tensor) -> dict[str, float]:
        loss = float((numerator / denominator.clamp(min=1)).sum())
        return {f"eval_loss{suffix}": loss, f"eval_ppl{suffix}": math.exp(min(loss, 700.0))}

    out = named("", sums.sum(dim=1), totals.sum(dim=1))
    out["eval_tokens"] = float(totals[0].sum())
    if len(tasks) > 1:
        for index, task in enumerate(tasks):
            if totals[0, index] > 0:
                out |= named(f"/{task}", sums[:, index], totals[:, index])
    return out
