"""Where the next trial's values come from: a grid, or chance (search/tpe.py: a model).

A trial is known by its number, from 1. A draw that makes no valid config, or that a finite space
has already given, is drawn again. No Ray in here, and no torch.
"""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from rayft.config.run import Run
from rayft.config.space import TRIES, applied, combination, drawn, params_of
from rayft.config.sweep import Domain
from rayft.core.errors import ConfigError
from rayft.records.ledger import TrialParams

LISTED = 10_000  # combinations looked through, one after another, for one that is still free


@dataclass(frozen=True)
class TriedParams:
    """What is known of a trial, under way or over, for whoever draws the next one."""

    params: TrialParams
    status: str  # running | done | stopped | diverged | failed
    curve: Mapping[int, float]  # the sweep's metric by step, finite values only


@dataclass(frozen=True)
class PriorSweep:
    """Trials of an earlier sweep whose settings this one's space holds."""

    uri: str
    digest: str  # sha256 of its ledger, first 16 hex digits
    first: int  # steps of its first rung
    factor: float  # how many times farther each next rung was
    skipped: int  # its other trials
    trials: tuple[TriedParams, ...]


def key(params: TrialParams) -> str:
    """Equal for equal params; 1 and 1.0 differ."""
    return json.dumps(dict(params), sort_keys=True)


def picks_of(space: Mapping[str, Domain], params: TrialParams) -> TrialParams | None:
    """The inverse of `params_of`; None when the space does not hold these params."""
    picks: TrialParams = {}
    for name, domain in space.items():
        paths = list(domain.paired[0]) if domain.paired else [name]
        if any(path not in params for path in paths):
            return None
        wanted = {path: params[path] for path in paths} if domain.paired else params[name]
        ends = domain.uniform or domain.loguniform or domain.integers
        if ends is None:
            same = [value for value in domain.values or () if key({"": value}) == key({"": wanted})]
            if not same:
                return None
        elif not isinstance(wanted, int | float) or not ends[0] <= wanted <= ends[1]:
            return None
        picks[name] = wanted
    return picks


class Sampler(Protocol):
    """Where the values of new trials come from: `RandomSampler`, `GridSampler`, `TpeSampler`."""

    def ask(self, number: int, tried: Sequence[TriedParams]) -> TrialParams | None:
        """Params of trial `number` (from 1); None when a finite space has no more. A function of
        the run's seed and of what is given, so that a continued sweep draws as an unbroken one.

        Args:
            tried: all trials so far, by number.

        Raises:
            ConfigError: no draw made a valid config; it names the last one and why.
        """
        ...


class RandomSampler:
    """At random, without repeating itself in a finite space."""

    def __init__(self, run: Run, taken: Sequence[TrialParams]) -> None:
        self._run, self._sweep = run, run.swept
        self._space = self._sweep.space
        self._taken = {key(params) for params in taken}
        self._refused: dict[str, str] = {}  # params that make no valid config, and why
        grids = {n: d.grid for n, d in self._space.items() if d.grid is not None}
        self._cycle = [dict(zip(grids, c, strict=True)) for c in itertools.product(*grids.values())]

    def ask(self, number: int, tried: Sequence[TriedParams]) -> TrialParams | None:
        self._learn(tried)
        for attempt in range(TRIES):
            params = params_of(self._space, self._pick(number, attempt))
            if self._new(params):
                return params
            if len(self._taken) + len(self._refused) >= (self._sweep.combinations or math.inf):
                return None
        if self._sweep.combinations is not None:
            return self._first_free(number)
        why = next(reversed(self._refused.values()))
        raise ConfigError(
            f"{TRIES} draws from sweep.space in a row made no valid config; the last: {why}",
            where="sweep.space",
            fix="take out the values that do not go together, or pair those that do (paired)",
        )

    def _learn(self, tried: Sequence[TriedParams]) -> None:
        """Chance learns nothing."""

    def _pick(self, number: int, attempt: int) -> TrialParams:
        """A value per dimension; a function of the seed and its arguments. Grids are gone through
        in order; the rest is drawn."""
        chance = random.Random(f"{self._run.seed}/{number}/{attempt}")
        row = number - 1 + attempt // 20  # one that fits nothing is left behind
        fixed = self._cycle[row % len(self._cycle)]
        return {n: fixed[n] if n in fixed else drawn(d, chance) for n, d in self._space.items()}

    def _new(self, params: TrialParams) -> bool:
        """Whether a trial may have these params; if so they are taken."""
        here = key(params)
        if here in self._refused or (here in self._taken and self._sweep.combinations is not None):
            return False
        try:
            applied(self._run, params)
        except ConfigError as error:
            self._refused[here] = f"{error.what} ({error.where})"
            return False
        self._taken.add(here)
        return True

    def _first_free(self, number: int) -> TrialParams | None:
        """The first combination that nobody has, from a random one on."""
        sizes = [domain.values or () for domain in self._space.values()]
        whole = math.prod(map(len, sizes))
        start = random.Random(f"{self._run.seed}/{number}").randrange(whole)
        for index in range(min(whole, LISTED)):
            picks = combination(self._space, (start + index) % whole)
            if self._new(params := params_of(self._space, picks)):
                return params
        return None


class GridSampler(RandomSampler):
    """Every combination once: trial n is the n-th that makes a valid config."""

    def __init__(self, run: Run, taken: Sequence[TrialParams]) -> None:
        super().__init__(run, ())  # what is taken follows from the numbers
        self._valid: list[TrialParams] = []
        self._rest = self._all()

    def ask(self, number: int, tried: Sequence[TriedParams]) -> TrialParams | None:
        while len(self._valid) < number:
            params = next(self._rest, None)
            if params is None:
                return None
            self._valid.append(params)
        return self._valid[number - 1]

    def _all(self) -> Iterator[TrialParams]:
        for index in range(self._sweep.combinations or 0):
            params = params_of(self._space, combination(self._space, index))
            if self._new(params):
                yield params
