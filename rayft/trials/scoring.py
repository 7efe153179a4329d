"""Held-out loss of several trials through one base: `compose.evaluate`, once for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rayft.compose.evaluate import EvalTally, evaluate
from rayft.core.batch import Batch
from rayft.trials.forward import PackedModel
from rayft.trials.rank_bucket import TrialAdapter


@dataclass(frozen=True)
class HeldOut:
    """The held-out batches of a pack; none of them without held-out data."""

    batches: tuple[Batch, ...]
    tasks: tuple[str, ...]

    def base(self, model: PackedModel) -> dict[str, float]:
        """Of the base model; {} without held-out data."""
        if not self.batches:
            return {}
        return evaluate(model, model.objective, self.batches, self.tasks)

    def score(self, model: PackedModel, adapters: Sequence[TrialAdapter]) -> list[dict[str, float]]:
        """Of every trial of `adapters`."""
        tally = EvalTally(model.objective, self.tasks, trials=len(adapters))
        with model.evaluating():
            for batch in self.batches:
                # never more at once than training, which keeps activations too
                fit = max(1, model.most_tokens // batch.input_ids.numel())
                for first in range(0, len(adapters), fit):
                    some = adapters[first : first + fit]
                    tally.add(model.measure_trials(some, batch), batch.task, first)
        return [tally.metrics(index) for index in range(len(adapters))]
