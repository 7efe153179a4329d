"""Time to quality, for sweep.py --quality: when each side's best held-out loss so far first came
within 1 % of the best that any side ever found, from one search space.

Each side has what it would be used with: rayft its TPE and successive halving that pauses and
promotes; the peer Ray Tune's OptunaSearch and ASHAScheduler. Time counts from the start of the
command. A side that never came so close within its limit is said to, with its limit as a bound.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

NEAR = 1.01  # times the best loss
History = Sequence[tuple[float, float]]  # (seconds, held-out loss) of every report
SPACE: dict[str, Any] = {
    "methods.0.rank": {"choice": [4, 8, 16, 32]},
    "methods.0.alpha": {"choice": [8, 16, 32, 64]},
    "methods.0.lr_ratio": {"choice": [1, 4, 16]},
    "optim.lr": {"loguniform": [1e-4, 1e-2]},
}


def block(limit: float, trials: int, prior: Sequence[str] = ()) -> dict[str, Any]:
    """rayft's sweep block."""
    return {
        "space": SPACE,
        "trials": trials,
        "max_seconds": limit,
        "search": {"kind": "optuna", "prior": list(prior)},
        "scheduler": {"kind": "asha", "grace": 10, "factor": 3, "promote": True},
    }


def reached(history: History, goal: float) -> float:
    """Seconds until a loss was at most `goal`; inf where none was."""
    return min((at for at, loss in history if loss <= goal), default=math.inf)


def compare(seed: int, told: Mapping[str, History]) -> tuple[float, float]:
    """Prints one seed's line of every side.

    Returns:
        (ratio, bound): the peer's time over rayft's, inf or 0 where one of them never came there;
        and the same with the end of its reports in place of what never came.
    """
    goal = NEAR * min(loss for history in told.values() for _, loss in history)
    times = {side: reached(history, goal) for side, history in told.items()}
    ends = {side: max(at for at, _ in history) for side, history in told.items()}
    print(f"\nseed {seed}: within 1 % of the best, held-out loss <= {goal:.4f}")
    for side, history in told.items():
        best = min(loss for _, loss in history)
        found = f"{times[side]:.1f} s" if times[side] < math.inf else f"never in {ends[side]:.1f} s"
        print(f"  {side}: {found}; best {best:.4f} of {len(history)} evaluations", flush=True)
    bounded = {side: min(times[side], ends[side]) for side in told}
    return times["peer"] / times["rayft"], bounded["peer"] / bounded["rayft"]


def summary(ratios: Sequence[tuple[float, float]]) -> None:
    """Prints all seeds' ratios and their median."""
    shown = [f"{ratio:.2f}" if 0 < ratio < math.inf else f"bound {b:.2f}" for ratio, b in ratios]
    middle = median(bound for _, bound in ratios)
    print(f"\ntime to quality, peer / rayft: {', '.join(shown)}; median {middle:.2f}", flush=True)
