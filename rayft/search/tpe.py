"""The tree-structured Parzen estimator as a way to draw: Optuna, driven by ask and tell.

What the estimator needs of trials is which are the better ones, nothing else; so it is told ranks.
Curves are comparable at equal steps only. A trial that has not run to its end therefore counts at
the last rung that it has reached, with its metric there: first those that came to their end, by
their best value; then the others, by rung and value; last those that diverged. (Optuna ranks pruned
trials the same way, by step and value, but at any step; and it ranks a diverged trial before every
pruned one if it is told a bad value of it.) A trial under way counts as soon as it has a value at a
rung; until then it counts as a bad one (constant liar), so that parallel draws spread.

Earlier sweeps (sweep.search.prior) may have had another model, other data, other lengths. Their
losses say nothing here, but which of their own settings were better does: so every sweep is ranked
by itself, and ranks are told as shares, (rank + 1/2) / trials. An offset between sweeps, or any
other monotone change of the metric, changes nothing.
"""

from __future__ import annotations

import json
import math
import random
from bisect import bisect_left, bisect_right
from collections.abc import Sequence

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import FrozenTrial, TrialState, create_trial

from rayft.config.run import Run
from rayft.config.sweep import AshaSpec, Domain, MedianSpec, OptunaSpec
from rayft.records.ledger import TrialParams
from rayft.search.samplers import PriorSweep, RandomSampler, TriedParams, picks_of

FACTOR = 3.0  # between two rungs where the scheduler has none


class TpeSampler(RandomSampler):
    """Optuna's multivariate tree-structured Parzen estimator.

    A study is made anew for every trial, of all trials in their order: what is drawn depends on the
    run's seed, the trial's number and what is known of the others, not on how it became known.

    Args:
        prior: earlier sweeps; their trials count as the oldest ones.
    """

    def __init__(
        self,
        run: Run,
        taken: Sequence[TrialParams],
        prior: Sequence[PriorSweep] = (),
    ) -> None:
        super().__init__(run, taken)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._labels = {n: _labels(d) for n, d in self._space.items() if _listed(d)}
        self._asks = {n: self._distribution(n, d) for n, d in self._space.items()}
        self._first, self._factor = rungs_of(run)
        self._prior = [
            trial
            for sweep in prior
            for trial in self._told(sweep.trials, sweep.first, sweep.factor)
        ]
        self._study = optuna.create_study()

    def _learn(self, tried: Sequence[TriedParams]) -> None:
        self._study = optuna.create_study()
        self._study.add_trials([*self._prior, *self._told(tried, self._first, self._factor)])

    def _pick(self, number: int, attempt: int) -> TrialParams:
        self._study.sampler = self._sampler(number, attempt)
        asked = self._study.ask(self._asks)
        self._study.tell(asked, state=TrialState.FAIL)  # refused draws leave no trace
        given = asked.params
        return {n: self._labels[n][given[n]] if n in self._labels else given[n] for n in self._asks}

    def _told(self, tried: Sequence[TriedParams], first: int, factor: float) -> list[FrozenTrial]:
        """The trials of one sweep as Optuna takes them, in their order."""
        inside = [(trial, picks_of(self._space, trial.params)) for trial in tried]
        sign = 1 if self._sweep.mode == "min" else -1
        places = {id(trial): place_of(trial, first, factor, sign) for trial, _ in inside}
        ranked = sorted(place for place in places.values() if place is not None)
        found: list[FrozenTrial] = []
        for trial, picks in inside:
            if picks is None or trial.status == "failed":
                continue
            place = places[id(trial)]
            waits = place is None
            found.append(
                create_trial(
                    state=TrialState.RUNNING if waits else TrialState.COMPLETE,
                    value=None if place is None else _share(ranked, place),
                    params={n: _label(v) if n in self._labels else v for n, v in picks.items()},
                    distributions=self._asks,
                )
            )
        return found

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


def rungs_of(run: Run) -> tuple[int, float]:
    """Steps of the first rung, and how many times farther each next one is."""
    first, scheduler = run.train.eval_every or 1, run.swept.scheduler
    if isinstance(scheduler, AshaSpec):
        return scheduler.grace or first, scheduler.factor
    if isinstance(scheduler, MedianSpec):
        return scheduler.grace or first, FACTOR
    return first, FACTOR


def place_of(
    trial: TriedParams, first: int, factor: float, sign: int
) -> tuple[float, float] | None:
    """Sorts trials of one sweep, the best first: (-rung, signed value); None: nothing is known.

    Args:
        first, factor: rungs are at first * factor^k steps.
        sign: 1 where less is better, else -1.
    """
    curve = {step: sign * value for step, value in trial.curve.items()}
    if trial.status == "diverged":
        return (math.inf, 0.0)
    if trial.status == "failed" or not curve:
        return None
    if trial.status == "done":
        return (-math.inf, min(curve.values()))
    last = max(curve)
    if last < first:
        return (0.0, curve[last])
    rung = math.floor(math.log(last / first) / math.log(factor) + 1e-9)
    reached = min(step for step in curve if step >= first * factor**rung - 1e-6)
    return (-1.0 - rung, curve[reached])


def _share(ranked: Sequence[tuple[float, float]], place: tuple[float, float]) -> float:
    """Share of the trials that are better, in the middle of its equals."""
    return (bisect_left(ranked, place) + bisect_right(ranked, place)) / 2 / len(ranked)


def _listed(domain: Domain) -> bool:
    return bool(domain.choice or domain.grid or domain.paired)


def _label(value: object) -> str:
    """What Optuna knows a listed value by: text that tells 1, 1.0 and true apart."""
    return json.dumps(value, sort_keys=True)


def _labels(domain: Domain) -> TrialParams:
    return {_label(value): value for value in domain.values or ()}
