"""rayft's searcher as Ray Tune asks it: trials of the ledger first, then new ones.

The ledger is the searcher's only state: a new one, built from it, goes on where the last one was.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

from ray.tune.search import Searcher

from rayft.config.run import Run
from rayft.config.sweep import GridSpec, OptunaSpec
from rayft.records.ledger import LedgerContents, LedgerTrial, TrialParams
from rayft.search.samplers import (
    GridSampler,
    PriorSweep,
    RandomSampler,
    Sampler,
    TriedParams,
)
from rayft.search.tpe import TpeSampler


def name_for(number: int) -> str:
    """t0001, t0002, ..."""
    return f"t{number:04d}"


class Waiting(Protocol):
    """Trials that a scheduler holds back at a rung: `sweeps.scheduler_replay`."""

    @property
    def paused(self) -> Collection[str]:
        """Who waits."""
        ...

    def promote(self, *, final: bool) -> str | None:
        """Who goes on now, and waits no more; None without one.

        Args:
            final: there are no more trials to start.
        """
        ...


class _StatelessSearcher(Searcher):
    """Tune wants to save its searcher, for a restore that rayft never asks for."""

    def __init__(self) -> None:
        super().__init__()
        self._names: dict[str, str] = {}  # Tune's trial id -> ours

    def name_of(self, tune_id: str) -> str:
        """Our id of the trial that Tune calls `tune_id`."""
        return self._names[tune_id]

    def save(self, checkpoint_path: str) -> None:
        """See ray.tune.search.Searcher."""

    def restore(self, checkpoint_path: str) -> None:
        """See ray.tune.search.Searcher."""

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """See ray.tune.search.Searcher."""


class FixedSearcher(_StatelessSearcher):
    """Given trials, in their order.

    Args:
        wanted: {trial id: params}.
    """

    def __init__(self, wanted: Mapping[str, TrialParams]) -> None:
        super().__init__()
        self._wanted = iter(list(wanted.items()))

    def suggest(  # pyright: ignore[reportIncompatibleMethodOverride]  # Tune's hint lacks FINISHED
        self, trial_id: str
    ) -> TrialParams | str:
        found = next(self._wanted, None)
        if found is None:
            return self.FINISHED
        self._names[trial_id] = found[0]
        return dict(found[1])


class SpaceSearcher(_StatelessSearcher):
    """The search of a sweep block: `suggest` gives {path of a config field: value}.

    Args:
        run: with a sweep block.
        ledger: what the ledger says. Unfinished trials come first, under their own ids and with
            their own params; then new ones until `sweep.count` ids are in use.
        waiting: trials that wait at a rung come when they are promoted, before new ones.
        prior: earlier sweeps, which `optuna` learns from.

    Attributes:
        exhausted: a finite space has no combination left (it may have fewer than trials).
    """

    def __init__(
        self,
        run: Run,
        ledger: LedgerContents,
        waiting: Waiting | None = None,
        prior: Sequence[PriorSweep] = (),
    ) -> None:
        super().__init__()
        sweep = run.swept
        self._waiting, self._spent = waiting, False
        self._under_way: set[str] = set()  # Tune's ids
        self._metric_name = sweep.metric
        self.exhausted = False
        known = {t.id: t for t in ledger.trials.values() if not t.origin}
        held = () if waiting is None else waiting.paused
        self._again = iter([t.id for t in known.values() if not t.over and t.id not in held])
        numbers = range(1, sweep.count + 1)
        self._numbers = iter([number for number in numbers if name_for(number) not in known])
        self._params = {trial.id: trial.params for trial in known.values()}
        self._status: dict[str, str] = {trial.id: trial.status for trial in known.values()}
        self._curves = {trial.id: self._told(trial) for trial in known.values()}
        taken = list(self._params.values())
        self._sampler: Sampler
        if isinstance(sweep.search, OptunaSpec):
            self._sampler = TpeSampler(run, taken, prior)
        else:
            grid = isinstance(sweep.search, GridSpec)
            self._sampler = (GridSampler if grid else RandomSampler)(run, taken)

    def suggest(  # pyright: ignore[reportIncompatibleMethodOverride]  # Tune's hint lacks FINISHED
        self, trial_id: str
    ) -> TrialParams | str | None:
        """See ray.tune.search.Searcher.

        Raises:
            ConfigError: the space gives no valid config.
        """
        name = next(self._again, None) or self._promoted() or self._fresh() or self._promoted()
        if name is None:
            # whoever is under way may yet reach a rung and let another one go on
            waits = self._waiting is not None and bool(self._under_way)
            return None if waits else self.FINISHED
        self._names[trial_id] = name
        self._under_way.add(trial_id)
        self._status[name] = "running"
        return dict(self._params[name])

    def _promoted(self) -> str | None:
        return None if self._waiting is None else self._waiting.promote(final=self._spent)

    def _fresh(self) -> str | None:
        number = None if self._spent else next(self._numbers, None)
        params = None if number is None else self._sampler.ask(number, self._tried())
        if number is None or params is None:
            self.exhausted, self._spent = self.exhausted or number is not None, True
            return None
        name = name_for(number)
        self._params[name], self._curves[name] = params, {}
        return name

    def _tried(self) -> list[TriedParams]:
        return [
            TriedParams(self._params[name], self._status[name], self._curves[name])
            for name in sorted(self._status)
        ]

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        self._keep(self._names[trial_id], result)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """A trial that was still running was stopped."""
        name = self._names[trial_id]
        self._under_way.discard(trial_id)
        if result:
            self._keep(name, result)
        status = "failed" if error else str((result or {}).get("status", "running"))
        self._status[name] = "stopped" if status == "running" else status

    def _keep(self, name: str, result: Mapping[str, Any]) -> None:
        value = result.get(self._metric_name)
        if isinstance(value, int | float) and math.isfinite(value):
            self._curves[name][int(result.get("step", 0))] = float(value)

    def _told(self, trial: LedgerTrial) -> dict[int, float]:
        told = {report.step: report.metrics.get(self._metric_name) for report in trial.reports}
        return {s: v for s, v in told.items() if v is not None and math.isfinite(v)}
