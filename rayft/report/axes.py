"""The dimensions of a search space as axes: where a trial lies on each, and how that is written."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from rayft.config.sweep import Domain

MANY, WIDE = 8, 20  # values listed one by one; ratio of ends from which an axis is logarithmic


def written(value: object, digits: int = 3) -> str:
    """A value of a config field for people: 0.000217, 16, true, ["q", "v"], lr=0.001, rank=8."""
    if isinstance(value, str):
        return value
    if isinstance(value, float) and math.isfinite(value):
        text = f"{value:.{digits}g}"
        return text.replace("e-0", "e-").replace("e+0", "e+")
    if isinstance(value, dict):
        parts = sorted(value.items())
        return ", ".join(f"{path.split('.')[-1]}={written(v, digits)}" for path, v in parts)
    return json.dumps(value, ensure_ascii=False, default=str)


def level(value: object) -> str:
    """A listed value, so exact that no two of them look the same."""
    return written(value, 12)


@dataclass(frozen=True)
class SpaceAxis:
    """One dimension.

    A range has `low` and `high`, in units of the field. A list has `levels`, the texts of its
    values in order, and a trial lies at the index of its value.
    """

    name: str  # of the dimension, as in the config
    label: str  # the shortest tail of the name that is its own
    domain: Domain
    log: bool
    low: float
    high: float
    levels: tuple[str, ...] = ()

    def pick(self, params: Mapping[str, object]) -> object:
        """The value that `params` hold; None without it."""
        return params.get(self.name)

    def at(self, params: Mapping[str, object]) -> float | None:
        """Where a trial lies: its value, or the index of its level."""
        value = self.pick(params)
        if self.levels:
            text = level(value)
            return float(self.levels.index(text)) if text in self.levels else None
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
        return float(value)

    def unit(self, params: Mapping[str, object]) -> float | None:
        """`at` on [0, 1], evenly in the logarithm where the domain is."""
        place = self.at(params)
        if place is None or self.high <= self.low:
            return None if place is None else 0.5
        low, high = self.low, self.high
        if self.log:
            low, high, place = math.log(low), math.log(high), math.log(max(place, 1e-300))
        return (place - low) / (high - low)

    def said(self) -> str:
        """What was searched: `8, 16, 32` or `1e-5 to 0.001, log`."""
        if self.levels:
            return ", ".join(self.levels)
        scale = ", log" if self.log else ""
        return f"{written(self.low)} to {written(self.high)}{scale}"

    def edge(self, params: Mapping[str, object]) -> str:
        """`low` or `high` where a trial lies at an end of an ordered domain, else ""."""
        place = self.unit(params)
        ordered = not self.levels or all(_number(level) is not None for level in self.levels)
        if place is None or not ordered or len(self.levels) in (1, 2):
            return ""
        near = 0.0 if self.levels else 0.03
        return "low" if place <= near else "high" if place >= 1 - near else ""


def axes(
    space: Mapping[str, Domain], seen: Iterable[Mapping[str, object]]
) -> tuple[SpaceAxis, ...]:
    """The axes of a space, wide enough for every params in `seen` (population-based training may
    leave the domain)."""
    flat = dict(_unpaired(space))
    labels = _labels(list(flat))
    params = list(seen)
    return tuple(_axis(name, labels[name], domain, params) for name, domain in flat.items())


def _unpaired(space: Mapping[str, Domain]) -> Iterator[tuple[str, Domain]]:
    """A field of its own for every field of a paired dimension: people read fields. Many numbers
    are shown as a range."""
    for name, domain in space.items():
        if not domain.paired:
            yield name, domain
            continue
        for path in domain.paired[0]:
            values = list(
                {json.dumps(entry[path]): entry[path] for entry in domain.paired}.values()
            )
            numbers = [n for value in values if (n := _number(str(value))) is not None]
            if len(values) <= MANY or len(numbers) < len(values):
                yield path, Domain(choice=tuple(values))
                continue
            low, high = min(numbers), max(numbers)
            wide = low > 0 and high / low >= WIDE
            yield path, Domain(loguniform=(low, high)) if wide else Domain(uniform=(low, high))


def _axis(name: str, label: str, domain: Domain, seen: Sequence[Mapping[str, object]]) -> SpaceAxis:
    ends = domain.uniform or domain.loguniform or domain.integers
    bare = SpaceAxis(name, label, domain, domain.loguniform is not None, 0.0, 0.0)
    if ends is not None:
        places = [*map(float, ends), *(p for each in seen if (p := bare.at(each)) is not None)]
        return SpaceAxis(name, label, domain, bare.log, min(places), max(places))
    values = [*(domain.values or ()), *(v for each in seen if (v := bare.pick(each)) is not None)]
    unique = list({level(value): value for value in values}.items())
    if all(isinstance(v, int | float) and not isinstance(v, bool) for _, v in unique):
        unique.sort(key=lambda pair: cast(float, pair[1]))  # all of them are numbers
    levels = tuple(text for text, _ in unique)
    return SpaceAxis(name, label, domain, False, 0.0, float(len(levels) - 1), levels)


def _labels(names: list[str]) -> dict[str, str]:
    """The shortest tail of each dotted name that no other name shares."""
    found: dict[str, str] = {}
    for name in names:
        parts = name.split(".")
        tails = (".".join(parts[-length:]) for length in range(1, len(parts) + 1))
        others = [other for other in names if other != name]
        found[name] = next((t for t in tails if not _shared(t, others)), name)
    return found


def _shared(tail: str, others: list[str]) -> bool:
    return any(other == tail or other.endswith(f".{tail}") for other in others)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
