"""A measured ratio against its target: its interval, and when there is enough of it to say."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

TARGET = 1.02  # of the time of a step


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Of the median, by bootstrap: 95 % of the medians of resampled values lie in it."""
    draws = np.random.default_rng(0).choice(values, (2000, len(values)))
    low, high = np.quantile(np.median(draws, axis=1), [0.025, 0.975])
    return float(low), float(high)


def decided(ratios: Sequence[Sequence[float]]) -> bool:
    """Whether each of `ratios` lies wholly on one side of the target. To ask after every turn makes
    the 95 % of the last interval a little less than that; ask only after a dozen."""
    bounds = [interval(values) for values in ratios]
    return all(high <= TARGET or low > TARGET for low, high in bounds)


def verdict(low: float, high: float) -> str:
    """The interval of the ratio against the target."""
    answer = "met" if high <= TARGET else "MISSED" if low > TARGET else "undecided, more --seconds"
    return f"target at most {TARGET}: {answer}"
