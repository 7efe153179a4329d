"""The training loop. It sees terms, counts, groups and hooks; never the name of a technique.

One step: take this rank's micro-batches, add up the counts over micro-batches and ranks, then run
forward and
backward with every row already divided by its global count, then one optimizer step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rayft.compose.gradient_check import GradientCheck, dead_graphs_named
from rayft.core.batch import Batch
from rayft.core.errors import DivergedError
from rayft.core.protocols import BatchStream, Engine, Method, Objective
from rayft.core.reduce import counts, reduce_rows, scales, sum_over_ranks
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
    """Runs single optimizer steps."""

    engine: Engine
    objective: Objective
    stream: BatchStream
    lrs: Callable[[int], Mapping[str, float]]  # step (1-based) -> learning rate by group name
    check: GradientCheck
    methods: tuple[Method, ...] = ()

    def run(self, step: int, stop: bool) -> StepResult | None:
        """One step; None, and nothing done, when any rank asked for a stop."""
        engine = self.engine
        window = self.stream.window(step, engine.rank, engine.world)
        totals, tokens, seen, stopped = self._totals(window, stop)
        if stopped:
            return None
        for method in self.methods:
            method.before(step, engine.full)
        loss = torch.zeros((), dtype=torch.float64, device=engine.device)
        with dead_graphs_named(f"rank {engine.rank}, step {step}"):
            for index, batch in enumerate(window):
                loss += self._micro(batch, totals, last=index == len(window) - 1)
        self.check.after_backward(step)
        norm = engine.step(self.lrs(step))
        loss = float(sum_over_ranks(loss, engine.device))
        check_finite(step, loss, norm)
        self.check.after_update(step, engine.lrs(), tokens)
        return StepResult(loss, norm, engine.lrs(), tokens, seen)

    def _totals(self, window: list[Batch], stop: bool) -> tuple[Tensor, int, int, bool]:
        """Global (terms, trials) counts, trained and seen tokens, and whether any rank wants to
        stop.

        One all-reduce for all of them: the stop flag travels with the counts, so every rank leaves
        the loop at the same step.
        """
        own = counts(self.objective, window)
        extra = torch.tensor(
            [
                sum(float(batch.tokens().sum()) for batch in window),
                sum(float(batch.lengths.sum()) for batch in window),
                float(stop),
            ],
            dtype=torch.float64,
        )
        summed = sum_over_ranks(torch.cat([own.flatten(), extra]), self.engine.device)
        totals = summed[: own.numel()].view_as(own)
        tokens, seen, stopped = summed[own.numel() :].tolist()
        return totals, int(tokens), int(seen), stopped > 0

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
    behind."""
    while progress.step < schedule.total:
        began = time.perf_counter()
        step = progress.step + 1
        result = stepper.run(step, hooks.stop())
        if result is None:
            hooks.save(progress.step, False)
            return "interrupted"
        progress.step = step
        progress.tokens += result.tokens
        hooks.log(step, result, time.perf_counter() - began)
        best = schedule.evaluates(step) and hooks.evaluate(step)
        if best or schedule.saves(step):
            hooks.save(step, best)
    return "done"
