"""The tree-structured Parzen estimator as a way to draw: Optuna, driven by ask and tell."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import TrialState

from rayft.config.run import Run
from rayft.config.sweep import Domain, OptunaSpec
from rayft.records.ledger import TrialParams
from rayft.search.samplers import RandomSampler, TrialOutcome, picks_of

WORST = 1e9  # the value of a diverged trial where nothing finite is known


class TpeSampler(RandomSampler):
    """Optuna's multivariate tree-structured Parzen estimator, driven by ask and tell.

    Trials under way count as bad ones (constant liar), so that parallel draws spread. Stopped
    trials are told as pruned, with their last metric at their step; diverged ones with a value as
    bad as the worst that was seen, so that the region is avoided. Every draw has a seed of its own,
    made of the run's seed and the trial's number: a continued sweep does not draw the same again.
    """

    def __init__(self, run: Run, taken: Sequence[TrialParams]) -> None:
        super().__init__(run, taken)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._sign = 1 if self._sweep.mode == "min" else -1
        self._study = optuna.create_study(direction="minimize")  # of sign * metric
        self._labels = {n: _labels(d) for n, d in self._space.items() if _listed(d)}
        self._asks = {n: self._distribution(n, d) for n, d in self._space.items()}
        self._asked: optuna.Trial | None = None
        self._running: dict[str, optuna.Trial] = {}
        self._worst = -math.inf  # of sign * metric

    def bind(self, trial: str) -> None:
        if self._asked is not None:
            self._running[trial], self._asked = self._asked, None

    def resume(self, trial: str, params: TrialParams) -> None:
        picks = picks_of(self._space, params)
        if picks is not None:
            self._force(picks)
            self.bind(trial)

    def tell_past(self, params: TrialParams, outcome: TrialOutcome) -> None:
        """Those that diverged come last: what the worst is, is known then."""
        picks = picks_of(self._space, params)
        if picks is None:
            return
        self._see(outcome)
        state, value = self._state(outcome)
        last = outcome.last if state is TrialState.PRUNED else None
        self._study.add_trial(
            optuna.trial.create_trial(
                state=state,
                value=value,
                params=self._labelled(picks),
                distributions=self._asks,
                intermediate_values={} if last is None else {outcome.step: self._sign * last},
            )
        )

    def tell(self, trial: str, outcome: TrialOutcome) -> None:
        asked = self._running.pop(trial, None)
        self._see(outcome)
        if asked is None:
            return
        state, value = self._state(outcome)
        if state is TrialState.PRUNED and outcome.last is not None:
            asked.report(self._sign * outcome.last, outcome.step)
        self._study.tell(asked, value, state)

    def _see(self, outcome: TrialOutcome) -> None:
        for value in (outcome.worst, outcome.best):
            self._worst = max(self._worst, -math.inf if value is None else self._sign * value)

    def _state(self, outcome: TrialOutcome) -> tuple[TrialState, float | None]:
        if outcome.status == "stopped":
            return TrialState.PRUNED, None
        if outcome.status == "diverged":
            return TrialState.COMPLETE, self._penalty(outcome)
        if outcome.status == "done" and outcome.best is not None:
            return TrialState.COMPLETE, self._sign * outcome.best
        return TrialState.FAIL, None

    def _penalty(self, outcome: TrialOutcome) -> float:
        if math.isfinite(self._worst):
            return self._worst
        known = outcome.base is not None and self._sign > 0
        return outcome.base * self._sweep.divergence if known and outcome.base else WORST

    def _pick(self, number: int, attempt: int) -> TrialParams:
        self._study.sampler = self._sampler(number, attempt)
        self._asked = self._study.ask(self._asks)
        given = self._asked.params
        return {n: self._labels[n][given[n]] if n in self._labels else given[n] for n in self._asks}

    def _drop(self) -> None:
        if self._asked is not None:
            self._study.tell(self._asked, state=TrialState.FAIL)
            self._asked = None

    def _force(self, picks: TrialParams) -> None:
        self._study.enqueue_trial(self._labelled(picks))
        self._asked = self._study.ask(self._asks)

    def _labelled(self, picks: TrialParams) -> TrialParams:
        return {n: _label(v) if n in self._labels else v for n, v in picks.items()}

    def _sampler(self, number: int, attempt: int) -> optuna.samplers.BaseSampler:
        search = self._sweep.search
        startup = search.startup if isinstance(search, OptunaSpec) else 0
        seed = random.Random(f"{self._run.seed}/{number}/{attempt}").randrange(2**32)
        return optuna.samplers.TPESampler(
            seed=seed, n_startup_trials=startup, multivariate=True, constant_liar=True
        )

    def _distribution(self, name: str, domain: Domain) -> BaseDistribution:
        if domain.uniform is not None:
            return FloatDistribution(*domain.uniform)
        if domain.loguniform is not None:
            return FloatDistribution(*domain.loguniform, log=True)
        if domain.integers is not None:
            return IntDistribution(*domain.integers)
        return CategoricalDistribution(tuple(self._labels[name]))


def _listed(domain: Domain) -> bool:
    return bool(domain.choice or domain.grid or domain.paired)


def _label(value: object) -> str:
    """What Optuna knows a listed value by: text that tells 1, 1.0 and true apart."""
    return json.dumps(value, sort_keys=True)


def _labels(domain: Domain) -> TrialParams:
    return {_label(value): value for value in domain.values or ()}
