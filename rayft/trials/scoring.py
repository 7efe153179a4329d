"""Held-out loss of several trials through one base: `compose.evaluate`, once for all of them; and
what follows from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rayft.compose.evaluate import EvalTally, evaluate
from rayft.core.batch import Batch
from rayft.core.errors import DivergedError, RayftError
from rayft.trials.forward import PackedModel
from rayft.trials.rank_bucket import TrialAdapter
from rayft.trials.slot import TrialSlot
from rayft.trials.step import isolated


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

    def judge(
        self,
        model: PackedModel,
        due: Sequence[TrialSlot],
        limits: tuple[float, float],
        broken: dict[TrialSlot, RayftError],
    ) -> set[TrialSlot]:
        """Evaluate and log; those whose state is their best so far. A loss too far above the base's
        goes to `broken`.

        Args:
            limits: loss of the base model, and how many times as much is too much.
        """
        if not due or not self.batches:
            return set()
        better: set[TrialSlot] = set()
        start, times = limits
        scores = self.score(model, [slot.adapter for slot in due])
        for slot, found in zip(due, scores, strict=True):
            with isolated(slot, broken):
                if slot.session.judge(slot.step, found):
                    better.add(slot)
                if not found["eval_loss"] <= times * start:
                    raise DivergedError(
                        f"held-out loss {found['eval_loss']:.4g}, the base model has {start:.4g}",
                        where=f"step {slot.step}",
                        cause=f"above {times:g} times the base model's",
                        fix="lower optim.lr or optim.clip",
                    )
        return better
