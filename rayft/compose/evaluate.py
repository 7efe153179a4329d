"""Held-out loss per task: sums over rows and ranks, divided once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rayft.core.batch import Batch
from rayft.core.protocols import Evaluator, Objective
from rayft.core.reduce import sum_over_ranks


class EvalTally:
    """Sums and counts of evaluated rows, by trial and task.

    Args:
        objective: whose measures they are.
        tasks: task names, by `Batch.task`.
        trials: models that are evaluated side by side.
    """

    def __init__(self, objective: Objective, tasks: Sequence[str], trials: int = 1) -> None:
        self._objective, self._tasks, self._trials = objective, tuple(tasks), trials
        self._found: dict[str, Tensor] = {}  # name: (trials, 2, tasks) float64, sums and counts

    def add(
        self, measured: Mapping[str, tuple[Tensor, Tensor]], task: Tensor, first: int = 0
    ) -> None:
        """Rows of trials [first, first + n): each measure is (n, B) sums and (n, B) counts, or (B,)
        of one trial; `task` (B,)."""
        for name, pair in measured.items():
            rows = torch.stack(pair, dim=-2).to("cpu", torch.float64)  # (n, 2, B)
            rows = rows.view(-1, 2, len(task))
            empty = torch.zeros(self._trials, 2, len(self._tasks), dtype=torch.float64)
            found = self._found.setdefault(name, empty)
            found[first : first + len(rows)].index_add_(2, task.cpu(), rows)

    def sum_over_ranks(self, device: torch.device) -> None:
        """Add up what all ranks found; each has the same names."""
        summed = sum_over_ranks(torch.stack(list(self._found.values())), device)
        self._found = dict(zip(self._found, summed, strict=True))

    def metrics(self, trial: int = 0) -> dict[str, float]:
        """{"eval_loss", "eval_tokens", ...} over everything and, with several tasks, each but the
        tokens as "eval_<name>/<task>". Losses in nats; "eval_ppl" where the objective declares it.
        """
        first = self._found[next(iter(self._objective.terms))][trial, 1]  # counts of the first term
        out = self._named("", trial, slice(None))
        out["eval_tokens"] = float(first.sum())
        if len(self._tasks) > 1:
            for index, task in enumerate(self._tasks):
                if first[index] > 0:
                    out |= self._named(f"/{task}", trial, slice(index, index + 1))
        return out

    def _named(self, suffix: str, trial: int, tasks: slice) -> dict[str, float]:
        means: dict[str, float] = {}
        for name, found in self._found.items():
            total, count = found[trial, :, tasks].sum(dim=1)
            means[name] = float(total / count) if count > 0 else 0.0
        terms = self._objective.terms
        loss = math.fsum(means[term] * weight for term, weight in terms.items())
        out = {f"eval_loss{suffix}": loss}
        if "ppl" in self._objective.metrics:
            out[f"eval_ppl{suffix}"] = math.exp(min(loss, 700.0))
        rest = {name: mean for name, mean in means.items() if name not in terms}
        return out | {f"eval_{name}{suffix}": mean for name, mean in rest.items()}


def evaluate(
    engine: Evaluator, objective: Objective, batches: Sequence[Batch], tasks: Sequence[str]
) -> dict[str, float]:
    """Evaluation metrics over this and all other ranks' batches; see EvalTally.metrics.

    Args:
        batches: this rank's; every rank holds the same number (ZeRO-3 gathers on every forward).
        tasks: task names, by `Batch.task`.
    """
    tally = EvalTally(objective, tasks)
    with engine.evaluating():
        for batch in batches:
            tally.add(engine.measure(batch.to(engine.device)), batch.task)
    tally.sum_over_ranks(engine.device)
    return tally.metrics()
