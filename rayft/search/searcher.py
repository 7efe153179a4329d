"""rayft's searcher as Ray Tune asks it: trials of the ledger first, then new ones.

The ledger is the searcher's only state: a new one, built from it, goes on where the last one was.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ray.tune.search import Searcher

from rayft.config.run import Run
from rayft.config.sweep import GridSpec, OptunaSpec
from rayft.records.ledger import LedgerContents, LedgerTrial, TrialParams
from rayft.search.samplers import GridSampler, RandomSampler, Sampler, TrialOutcome
from rayft.search.tpe import TpeSampler


def name_for(number: int) -> str:
    """t0001, t0002, ..."""
    return f"t{number:04d}"


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

    Attributes:
        exhausted: a finite space has no combination left (it may have fewer than trials).
    """

    def __init__(self, run: Run, ledger: LedgerContents) -> None:
        super().__init__()
        sweep = run.swept
        self._metric_name, self._sign = sweep.metric, 1 if sweep.mode == "min" else -1
        self.exhausted = False
        known = {t.id: t for t in ledger.trials.values() if not t.origin}
        self._again = iter([trial for trial in known.values() if not trial.over])
        numbers = range(1, sweep.count + 1)
        self._numbers = iter([number for number in numbers if name_for(number) not in known])
        kinds: dict[type[object], type[RandomSampler]] = {
            OptunaSpec: TpeSampler,
            GridSpec: GridSampler,
        }
        kind = kinds.get(type(sweep.search), RandomSampler)
        self._sampler: Sampler = kind(run, [trial.params for trial in known.values()])
        self._seen: dict[str, dict[int, dict[str, float]]] = {}  # id -> step -> metrics
        over = [trial for trial in known.values() if trial.over]
        # What diverged is told last, when the worst of the others is known.
        for trial in sorted(over, key=lambda trial: trial.status == "diverged"):
            seen = _seen(trial)
            self._sampler.tell_past(trial.params, self._outcome(trial.status, trial.step, seen))

    def suggest(  # pyright: ignore[reportIncompatibleMethodOverride]  # Tune's hint lacks FINISHED
        self, trial_id: str
    ) -> TrialParams | str:
        """See ray.tune.search.Searcher.

        Raises:
            ConfigError: the space gives no valid config.
        """
        trial = next(self._again, None)
        if trial is not None:
            self._names[trial_id], self._seen[trial.id] = trial.id, _seen(trial)
            self._sampler.resume(trial.id, trial.params)
            return dict(trial.params)
        found = self._fresh()
        if found is None:
            return self.FINISHED
        self._names[trial_id], params = found
        return params

    def _fresh(self) -> tuple[str, TrialParams] | None:
        number = next(self._numbers, None)
        params = None if number is None else self._sampler.ask(number)
        if number is None or params is None:
            self.exhausted = number is not None
            return None
        self._sampler.bind(name_for(number))
        return name_for(number), params

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        self._keep(self._names[trial_id], result)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """A trial that was still running was stopped."""
        name = self._names[trial_id]
        if result:
            self._keep(name, result)
        status = "failed" if error else str((result or {}).get("status", "running"))
        status = "stopped" if status == "running" else status
        seen = self._seen.pop(name, {})
        self._sampler.tell(name, self._outcome(status, max(seen, default=0), seen))

    def _keep(self, name: str, result: Mapping[str, Any]) -> None:
        wanted = (self._metric_name, "base_loss")
        found = {n: float(result[n]) for n in wanted if isinstance(result.get(n), int | float)}
        if found:
            self._seen.setdefault(name, {})[int(result.get("step", 0))] = found

    def _outcome(self, status: str, step: int, seen: dict[int, dict[str, float]]) -> TrialOutcome:
        told = [(at, seen[at].get(self._metric_name, math.nan)) for at in sorted(seen)]
        values = [value for _, value in told if math.isfinite(value)]
        base = [found["base_loss"] for found in seen.values() if "base_loss" in found]
        known = base and self._metric_name == "eval_loss" and math.isfinite(base[0])
        return TrialOutcome(
            status,
            step,
            best=min(values, key=lambda value: self._sign * value, default=None),
            last=values[-1] if values else None,
            worst=max(values, key=lambda value: self._sign * value, default=None),
            base=base[0] if known else None,
        )


def _seen(trial: LedgerTrial) -> dict[int, dict[str, float]]:
    return {report.step: dict(report.metrics) for report in trial.reports}
