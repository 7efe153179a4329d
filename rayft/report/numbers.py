"""Numbers for people: rounded to what they carry, with their units."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True)
class MetricScale:
    """How many decimals a sweep's metric is worth: three digits of what lies between trials."""

    decimals: int

    @staticmethod
    def of(values: Iterable[float | None]) -> MetricScale:
        """The scale of these results."""
        known = sorted(v for v in values if v is not None and math.isfinite(v))
        half = known[: max(2, (len(known) + 1) // 2)]
        reach = half[-1] - half[0] if len(half) > 1 else abs(half[0]) if half else 1.0
        if reach <= 0:
            return MetricScale(4)
        return MetricScale(min(6, max(0, 2 - math.floor(math.log10(reach)))))

    def text(self, value: float | None) -> str:
        """A result, or a dash."""
        if value is None or not math.isfinite(value):
            return "–"
        if abs(value) >= 1e6 or (value and abs(value) < 1e-6):
            return f"{value:.3g}".replace("-", MINUS)
        return f"{value:,.{self.decimals}f}".replace("-", MINUS)

    def change(self, value: float) -> str:
        """A difference, with its sign."""
        return f"{'+' if value > 0 else ''}{self.text(value)}"


def seconds(value: float | None) -> str:
    """`0.14 s`, `53 s`, `4 min 10 s`, `2 h 5 min`."""
    if value is None or not math.isfinite(value):
        return "–"
    sign, size = (MINUS, -value) if value < 0 else ("", value)
    if size < 99.5:
        text = f"{size:.2g}" if size < 10 else f"{size:.0f}"
        return f"{sign if float(text) else ''}{text} s"
    whole = round(size)
    if whole < 3600:
        return f"{sign}{whole // 60} min {whole % 60:02d} s"
    minutes = round(size / 60)
    return f"{sign}{minutes // 60:,} h {minutes % 60:02d} min"


def size(value: float | None) -> str:
    """Bytes: `706 MiB`."""
    if value is None or not math.isfinite(value):
        return "–"
    unit = 0
    while abs(value) >= 1000 and unit < 5:
        value, unit = value / 1024, unit + 1
    text = f"{value:.3g}" if unit else f"{value:.0f}"
    return f"{text} {('B', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB')[unit]}"


def many(value: float | None) -> str:
    """A count: `950`, `41.4 k`, `2.05 M`."""
    if value is None or not math.isfinite(value):
        return "–"
    unit = 0
    while abs(value) >= 999.5 and unit < 4:
        value, unit = value / 1000, unit + 1
    text = f"{value:.3g}" if unit else f"{value:.0f}"
    return f"{text} {('', 'k', 'M', 'G', 'T')[unit]}".strip()


def amount(name: str, value: float | None) -> str:
    """A cost of a trial by the name of its metric."""
    return {"seconds": seconds, "memory": size}.get(name, many)(value)
