"""The sweep block: what is searched, how, and when it ends. Every trial is a Run of its own."""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, field_validator, model_serializer, model_validator

from rayft.config.base import STEPS, Spec
from rayft.core.address import clean_all

LISTED = 1000  # values of a space, one by one: `check` tries each on the config
TRIALS = 10**6
KINDS = ("choice", "grid", "uniform", "loguniform", "int", "paired")
"""Of a domain, as they are written."""


class Domain(Spec):
    """The values of one dimension: exactly one of these."""

    model_config = ConfigDict(populate_by_name=True)

    choice: tuple[object, ...] | None = Field(default=None, min_length=1, max_length=LISTED)
    """One of these values."""
    grid: tuple[object, ...] | None = Field(default=None, min_length=1, max_length=LISTED)
    """Every one of these values (search: grid or random)."""
    uniform: tuple[float, float] | None = None
    """[low, high], evenly."""
    loguniform: tuple[float, float] | None = None
    """[low, high], evenly in the logarithm."""
    integers: tuple[int, int] | None = Field(default=None, alias="int")
    """[low, high], whole numbers, both ends included."""
    paired: tuple[dict[str, object], ...] | None = Field(
        default=None, min_length=1, max_length=LISTED
    )
    """Fields that change together, each entry {path: value, ...}; the dimension's own name is free
    then."""

    @model_validator(mode="before")
    @classmethod
    def _readable(cls, data: object) -> object:
        """What the types below would refuse in words that say less."""
        if isinstance(data, Domain):
            return data
        if not isinstance(data, dict):
            hint = "a field that is not searched is set in the config itself"
            if isinstance(data, list | tuple):
                hint = "of these values would be {choice: [...]}"
            raise ValueError(f"write how it varies, e.g. {{choice: [8, 16]}}; {hint}")
        for key, value in data.items():
            _known(key, value)
            if key in ("choice", "grid", "paired") and not isinstance(value, list | tuple | None):
                raise ValueError(f"{key} takes a list of values: {key}: [{value}]")
            if key in ("uniform", "loguniform", "int") and value is not None:
                pair = isinstance(value, list | tuple) and len(value) == 2
                if not pair or any(isinstance(end, bool) for end in value):
                    raise ValueError(f"{key} takes two numbers, {key}: [low, high], not {value}")
        return clean_all(data)

    @model_validator(mode="after")
    def _one(self) -> Domain:
        given = [name for name, value in self if value is not None]
        if len(given) != 1:
            raise ValueError(
                f"give exactly one of {', '.join(KINDS)}"
                + (f", not {' and '.join(map(_written, given))}" if given else "")
            )
        for ends in (self.uniform, self.loguniform, self.integers):
            if ends is not None and not ends[0] < ends[1]:
                raise ValueError(f"the low end must be below the high end, got {list(ends)}")
        if self.loguniform is not None and self.loguniform[0] <= 0:
            raise ValueError("loguniform needs a low end above 0")
        if self.paired is not None and len({frozenset(entry) for entry in self.paired}) != 1:
            raise ValueError("every entry of paired must set the same fields")
        if self.paired is not None and not self.paired[0]:
            raise ValueError("an entry of paired is a mapping {path: value, ...}, not empty")
        if self.integers is not None and self.integers[1] - self.integers[0] > 2**53:
            raise ValueError(f"a range of whole numbers spans at most 2**53, got {self.integers}")
        listed = Counter(repr(v) for v in self.choice or self.grid or self.paired or ())
        if twice := [text for text, times in listed.items() if times > 1]:
            raise ValueError(f"{twice[0]} is listed twice")
        return self

    @model_serializer
    def _as_written(self) -> dict[str, object]:
        """{choice: [...]}: the one that is given."""
        listed = {name: value for name, value in self if value is not None}
        return {_written(name): value for name, value in listed.items()}

    @property
    def values(self) -> Sequence[object] | None:
        """All values of a finite domain (paired: its mappings); None of a continuous one."""
        for listed in (self.choice, self.grid, self.paired):
            if listed is not None:
                return tuple(listed)
        if self.integers is not None:
            return range(self.integers[0], self.integers[1] + 1)
        return None

    def params(self, name: str, pick: object) -> dict[str, object]:
        """{path: value} of one of its values; of a paired one, whose values are mappings, all."""
        if self.paired is None:
            return {name: pick}
        if not isinstance(pick, dict):
            raise TypeError(f"a value of a paired dimension is a mapping, not {pick!r}")
        return {str(path): value for path, value in pick.items()}

    def ends(self) -> tuple[object, ...]:
        """Values to try a config with: all of a finite list, both ends of a range."""
        for ends in (self.uniform, self.loguniform, self.integers):
            if ends is not None:
                return ends
        return tuple(self.values or ())


def _written(name: str) -> str:
    return "int" if name == "integers" else name


def _known(key: object, value: object) -> None:
    """Refuse what is no kind of domain."""
    if key in KINDS or key == "integers":
        return
    if isinstance(value, dict):
        hint = "; a field further inside is named by its whole path, e.g. optim.lr: {choice: [...]}"
    else:
        near = difflib.get_close_matches(str(key).lower(), KINDS, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
    raise ValueError(f"there is no {key} (there are: {', '.join(KINDS)}){hint}")


class OptunaSpec(Spec):
    """Tree-structured Parzen estimator (Bergstra et al. 2011), by Optuna."""

    kind: Literal["optuna"] = "optuna"
    startup: int = Field(default=8, ge=1, le=TRIALS)
    """Random trials before the model is trusted; those of `prior` count."""
    prior: tuple[str, ...] = Field(default=(), max_length=100)
    """Folders of earlier sweeps by the same metric, on any storage: which of their trials were
    better is known from the start."""


class RandomSpec(Spec):
    """Every trial drawn on its own (Bergstra & Bengio 2012)."""

    kind: Literal["random"] = "random"


class GridSpec(Spec):
    """Every combination once."""

    kind: Literal["grid"] = "grid"


class AshaSpec(Spec):
    """Asynchronous successive halving (Li et al. 2018, arXiv 1810.05934)."""

    kind: Literal["asha"] = "asha"
    grace: int | None = Field(default=None, ge=1, le=STEPS)
    """Steps that every trial gets; default: the first evaluation."""
    factor: float = Field(default=3, gt=1, le=10**6)
    """One trial in `factor` survives a rung; the next rung is `factor` times as far."""
    promote: bool = False
    """Trials wait at a rung, with their state kept, and go on once they are among the best there;
    false: they run on until they are among the worst, and are stopped for good."""


class PbtSpec(Spec):
    """Population-based training (Jaderberg et al. 2017, arXiv 1711.09846): the worst copy the best,
    weights and all, and go on with other settings."""

    kind: Literal["pbt"] = "pbt"
    every: int | None = Field(default=None, ge=1, le=STEPS)
    """Steps between two exploits; default: every evaluation."""
    quantile: float = Field(default=0.25, gt=0, le=0.5)
    """Share of the population that copies, and that is copied."""
    resample: float = Field(default=0.25, ge=0, le=1)
    """Probability of a fresh value instead of a neighbouring one."""


class MedianSpec(Spec):
    """Stop what is worse than the median of the others at the same step (Golovin et al. 2017)."""

    kind: Literal["median"] = "median"
    grace: int | None = Field(default=None, ge=1, le=STEPS)
    """Steps that every trial gets; default: the first evaluation."""
    least: int = Field(default=3, ge=1, le=TRIALS)
    """Trials to compare with before any is stopped."""


class NoneSpec(Spec):
    """Every trial runs to its end."""

    kind: Literal["none"] = "none"


SearchSpec = Annotated[OptunaSpec | RandomSpec | GridSpec, Field(discriminator="kind")]
SchedulerSpec = Annotated[AshaSpec | PbtSpec | MedianSpec | NoneSpec, Field(discriminator="kind")]


class SweepSpec(Spec):
    """A search over any fields of the config it stands in."""

    metric: str = "eval_loss"
    """Any metric of an evaluation: eval_loss, eval_ppl, eval_loss/TASK."""
    mode: Literal["min", "max"] = "min"
    """Which way is better."""
    trials: int | None = Field(default=None, ge=1, le=TRIALS)
    """Trials in all (also: max_trials); default 32, of a grid all its combinations."""
    max_seconds: float | None = Field(default=None, gt=0, le=10**9)
    """Start no trial and end those that run after this time, over all starts of the sweep."""
    target: float | None = None
    """Stop as soon as a trial's metric is this good."""
    steps: int | None = Field(default=None, ge=1, le=STEPS)
    """Optimizer steps of a trial; default train.steps. With refit the winner gets train.steps."""
    space: dict[str, Domain] = Field(min_length=1, max_length=100)
    """{path of a config field: choice | grid | uniform | loguniform | int | paired}."""
    search: SearchSpec = OptunaSpec()
    """Where the next trial's values come from."""
    scheduler: SchedulerSpec = AshaSpec()
    """Which trials are stopped early."""
    pack: Literal["auto", "off"] = "auto"
    """auto: LoRA trials share one frozen base per GPU or CPU core; off: one Ray Train run each."""
    slots: int | None = Field(default=None, ge=1, le=10_000)
    """Trials per pack; default: 16 on a GPU, 1 to 4 on a CPU core, fewer where memory ends."""
    packs: int | None = Field(default=None, ge=1, le=10_000)
    """Packs at most; default: one per GPU, without GPUs one per CPU core."""
    seeds: int = Field(default=1, ge=1, le=1000)
    """Seeds of the winner: it is trained again with seeds - 1 others, for the spread."""
    refit: bool = False
    """Train the winner again as its own Ray Train run, for train.steps, and export that."""
    divergence: float = Field(default=1.5, gt=1)
    """A held-out loss above this times the base model's is a diverged trial."""

    @model_validator(mode="before")
    @classmethod
    def _synonym(cls, data: object) -> object:
        if isinstance(data, dict) and "max_trials" in data and "trials" not in data:
            data = dict(data)
            data["trials"] = data.pop("max_trials")
        return data

    @field_validator("space", mode="before")
    @classmethod
    def _something(cls, value: object) -> object:
        if value in (None, {}):
            raise ValueError("name at least one field, e.g. optim.lr: {loguniform: [1e-5, 1e-3]}")
        return value

    @field_validator("space")
    @classmethod
    def _few(cls, value: dict[str, Domain]) -> dict[str, Domain]:
        listed = sum(len(d.choice or d.grid or d.paired or ()) for d in value.values())
        if listed > LISTED:
            raise ValueError(f"lists {listed:,} values, of {LISTED:,} at most; ranges take more")
        return value

    @property
    def combinations(self) -> int | None:
        """Of a space without ranges; None otherwise."""
        sizes = [domain.values for domain in self.space.values()]
        return None if None in sizes else math.prod(len(values or ()) for values in sizes)

    @property
    def count(self) -> int:
        """Trials of the search."""
        if self.trials is not None:
            return self.trials
        whole = self.combinations if isinstance(self.search, GridSpec) else None
        return whole or 32

    def paths(self) -> tuple[str, ...]:
        """Every config field that the space sets."""
        found: list[str] = []
        for name, domain in self.space.items():
            found += list(domain.paired[0]) if domain.paired else [name]
        return tuple(found)


PERTURBABLE = ("optim.lr", "optim.weight_decay", "optim.clip")
PERTURBABLE_OF_METHODS = ("lr_ratio", "alpha", "dropout")


def perturbable(path: str) -> bool:
    """Whether population-based training may change this field of a trial between two steps; what
    it may not, travels with the weights of the donor."""
    first, _, tail = path.partition(".")
    number, _, field = tail.partition(".")
    ours = first == "methods" and number.isdigit() and field in PERTURBABLE_OF_METHODS
    return ours or path in PERTURBABLE
