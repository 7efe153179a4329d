"""Asynchronous successive halving that pauses and promotes, as its authors describe it
(Li et al. 2018, arXiv 1810.05934, algorithm 2).

Rung k lies at r_k = grace * factor^k steps. A trial that reaches one waits there, unless it is
already among the best floor(n / factor) of the n that have reached it; it goes on as soon as it is.
Ray Tune's own scheduler never waits: there the first trials of every rung run on whatever they are
worth, and what was stopped never comes back.

What differs from the paper: a sweep has a last trial. Once there is none to start, ceil(n / factor)
of a rung may go on, since nothing better can take their slots; so one always reaches the end.
Diverged trials count as the worst of the rung that was ahead of them. In the end neither they nor
failed ones keep a place from those that wait.
"""

from __future__ import annotations

import math

from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler

from rayft.sweeps.trial import SCORE, TuneResult


class PromotingScheduler(FIFOScheduler):
    """To Tune, pausing is stopping: `paused` tells the two apart, and a trial that is promoted is a
    new one to Tune, under the same name.

    Args:
        most, grace: steps of a trial, and of the first rung.
        factor: one in so many is promoted.
        mode: min or max: which scores are better.

    Attributes:
        paused: trial id -> the rung that it waits at, from 0.
    """

    def __init__(self, most: int, grace: int, factor: float, mode: str) -> None:
        super().__init__()
        self._metric = SCORE
        self._sign = 1 if mode == "min" else -1
        self._factor = factor
        self.milestones = [grace]
        while (ahead := self.milestones[-1] * factor) < most:
            self.milestones.append(math.ceil(ahead))
        self._rungs: list[dict[str, float]] = [{} for _ in self.milestones]
        self._ahead: dict[str, int] = {}  # trial id -> the next rung
        self.paused: dict[str, int] = {}
        self._lost: set[str] = set()  # diverged or failed

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: object) -> bool:
        """Both were given when it was made."""
        return metric is None and mode is None

    def on_trial_result(self, tune_controller: object, trial: Trial, result: TuneResult) -> str:
        """STOP at a rung where it has to wait."""
        name = trial.trial_id
        rung = self._reached(name, int(result["step"]))
        if rung is None:
            return self.CONTINUE
        self._enter(name, rung, self._sign * result[SCORE])
        if name in self._best(rung, final=False):
            return self.CONTINUE
        self.paused[name] = rung
        return self.STOP

    def on_trial_complete(self, tune_controller: object, trial: Trial, result: TuneResult) -> None:
        """An end of its own; that of one that only waits changes nothing."""
        name, status = trial.trial_id, result.get("status")
        if status == "diverged":
            self._lost.add(name)
            rung = self._ahead.get(name, 0)
            if rung < len(self._rungs):
                self._enter(name, rung, math.inf)
        elif status == "done":
            rung = self._reached(name, int(result["step"]))
            if rung is not None:
                self._enter(name, rung, self._sign * result[SCORE])

    def on_trial_remove(self, tune_controller: object, trial: Trial) -> None:
        """It failed."""
        self.paused.pop(trial.trial_id, None)
        self._lost.add(trial.trial_id)

    def promotable(self, *, final: bool) -> str | None:
        """The trial that goes on next, of the highest rung first; None without one.

        Args:
            final: there are no more trials to start.
        """
        for rung in reversed(range(len(self._rungs))):
            for name in self._best(rung, final=final):
                if self.paused.get(name) == rung:
                    return name
        return None

    def promote(self, trial: str) -> None:
        """It waits no more."""
        self.paused.pop(trial, None)

    def _reached(self, name: str, step: int) -> int | None:
        """The highest rung that the trial has come to since its last one."""
        rungs = range(self._ahead.get(name, 0), len(self._rungs))
        return max((rung for rung in rungs if step >= self.milestones[rung]), default=None)

    def _enter(self, name: str, rung: int, score: float) -> None:
        self._rungs[rung][name] = score
        self._ahead[name] = rung + 1

    def _best(self, rung: int, *, final: bool) -> list[str]:
        """Who may go on: the best share; of equals, who was there first."""
        told = self._rungs[rung]
        share = len(told) / self._factor
        order = sorted(told, key=lambda name: told[name])
        if not final:
            return order[: int(share)]
        return [name for name in order if name not in self._lost][: math.ceil(share)]
