"""The training loop. It sees terms, counts, groups and hooks; never the name of a technique.

One step: take this rank's micro-batches, and the counts of the rows of all ranks, which the data
alone says; run forward and backward with every row already divided by its global count, then one
optimizer step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rayft.compose.gradient_check import GradientCheck, dead_graphs_named
from rayft.core.batch import Batch
from rayft.core.errors import DivergedError
from rayft.core.protocols import BatchStream, Engine, Method, Objective
from rayft.core.reduce import RankSum, counts, reduce_rows, scales
from rayft.records.run_progress import RunProgress


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, the same numbers on every rank."""

    loss: float  # nats per counted unit, before the update
    grad_norm: float
    lrs: dict[str, float]
    tokens: int  # trained targets
    tokens_seen: int  # all real tokens, prompts included


def check_finite(step: int, loss: float, norm: float) -> None:
    """Raises DivergedError where either is not a number any more."""
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise DivergedError(
            f"loss {loss:g}, gradient norm {norm:g}: not a number any more",
            where=f"step {step}",
            cause="learning rate too high, or a broken batch; this update was not applied",
            fix="lower optim.lr or optim.clip; the last checkpoint is intact",
        )


@dataclass(frozen=True)
class StepRunner:
    """Runs single optimizer steps, each with one all-reduce beside those of the gradients, and one
    look at the device, at its end (DeepSpeed looks at its norm by itself)."""

    engine: Engine
    objective: Objective
    stream: BatchStream
    lrs: Callable[[int], Mapping[str, float]]  # step (1-based) -> learning rate by group name
    check: GradientCheck
    methods: tuple[Method, ...] = ()
    ahead: dict[int, list[Batch]] = field(default_factory=dict)  # {step: its window}, one at most

    def run(self, step: int, stop: Callable[[], bool], *, more: bool) -> tuple[StepResult, bool]:
        """One step, and whether any rank wants to stop after it. `more`: another one follows."""
        engine = self.engine
        window, facts = self._window(step), self.stream.facts(step)
        totals = counts(self.objective, [facts])
        for method in self.methods:
            method.before(step, engine.full)
        loss = torch.zeros((), dtype=torch.float64, device=engine.device)
        with dead_graphs_named(f"rank {engine.rank}, step {step}"):
            for index, batch in enumerate(window):
                loss += self._micro(batch, totals, last=index == len(window) - 1)
        self.check.after_backward(step)
        if more:  # a GPU still works through the backward passes
            self.ahead[step + 1] = self._window(step + 1)
        # On its way while the optimizer works. The flag travels with the loss, so every rank leaves
        # the loop at the same step.
        shared = RankSum.begun(torch.stack([loss, torch.full_like(loss, float(stop()))]))
        norm = engine.step(self.lrs(step))
        numbers = torch.cat([shared.finished(), norm.double().view(1)])
        total, stops, value = numbers.tolist()  # the one time a step waits for the device
        check_finite(step, total, value)
        tokens, seen = int(facts.trained.sum()), int(facts.lengths.sum())
        self.check.after_update(step, engine.lrs(), tokens)
        return StepResult(total, value, engine.lrs(), tokens, seen), stops > 0

    def _window(self, step: int) -> list[Batch]:
        """This rank's micro-batches of `step`."""
        if step in self.ahead:
            return self.ahead.pop(step)
        return self.stream.window(step, self.engine.rank, self.engine.world)

    def _micro(self, batch: Batch, totals: Tensor, last: bool) -> Tensor:
        """Forward and backward of one micro-batch; this rank's part of the loss, on the
        device: reading it here would make every micro-batch wait for the last one."""
        batch = batch.to(self.engine.device)
        scale = scales(self.objective, batch, totals)
        loss = reduce_rows(self.engine.forward(batch, scale), scale)
        self.engine.backward(loss, last=last)
        return loss.detach().double()


@dataclass(frozen=True)
class StepSchedule:
    """When to evaluate and save."""

    total: int
    eval_every: int | None
    save_every: int | None

    def evaluates(self, step: int) -> bool:
        """After this step?"""
        return step == self.total or bool(self.eval_every and step % self.eval_every == 0)

    def saves(self, step: int) -> bool:
        """After this step?"""
        every = self.save_every or self.eval_every
        return step == self.total or bool(every and step % every == 0)


@dataclass(frozen=True)
class LoopHooks:
    """What happens around steps. All are called on every rank."""

    stop: Callable[[], bool]
    log: Callable[[int, StepResult, float], None]  # step, result, seconds of the step
    evaluate: Callable[[int], bool]  # step -> is it the best so far
    save: Callable[[int, bool], None]  # step, is it the best so far


def train(
    stepper: StepRunner, schedule: StepSchedule, progress: RunProgress, hooks: LoopHooks
) -> str:
    """Run from progress.step to the end; "done" or "interrupted". Both leave a saved state
    behind.

    Whether to stop is asked once per step, when its gradients are there: a stop asked for up to
    then ends the loop after this step, one asked for before the first step too.
    """
    while progress.step < schedule.total:
        began = time.perf_counter()
        step = progress.step + 1
        result, stopping = stepper.run(step, hooks.stop, more=step < schedule.total)
        progress.step = step
        progress.tokens += result.tokens
        hooks.log(step, result, time.perf_counter() - began)
        best = schedule.evaluates(step) and hooks.evaluate(step)
        if best or stopping or schedule.saves(step):
            hooks.save(step, best)
        if stopping and step < schedule.total:
            return "interrupted"
    return "done"
