"""What stopping trials early and packing them saved, in engine seconds, against each alone.

For a trial i: T_i the steps it was meant to take, n_i the steps it took, s the seconds a run of its
own spends before its first step (libraries, model, data, base evaluation), a the seconds of one
step by itself with its share of an evaluation. They are measured by the packs (`start_seconds`,
`alone_step_seconds` + `alone_eval_seconds` / steps between evaluations); of trials in several
packs, by the one it ran in.

    alone    = sum over i of (s + T_i a)
    stopping = sum over stopped and diverged i of (T_i - n_i) a
    spent    = sum over i of c_i + sum over packs of s       (c_i: engine seconds charged to i)
    packing  = alone - stopping - spent

so packing is what (s + n_i a) would have cost, less what was spent, the packs' own starts included.
A trial that ran on its own is charged what it took: it saves by stopping only, with a = c_i / n_i
and s = 0. For a trial that failed or still runs T_i = n_i: nothing is claimed for it. The
optimizer's part is in c_i but not in a, so `packing` is too small, not too large. Nothing is
clipped: a negative number means that it cost.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from rayft.records.ledger import LedgerContents, LedgerTrial

CUT = ("stopped", "diverged")
"""Ends of trials that would have gone on by themselves."""


@dataclass(frozen=True)
class EngineSavings:
    """Engine seconds, all of them; see the head of this file."""

    alone: float
    spent: float
    stopping: float
    packing: float
    start: float  # s, the mean over packs; 0 without packs
    step: float  # a, the median over packs; 0 without packs
    planned: int  # steps: the sum of T_i
    taken: int  # steps: the sum of n_i
    cut: int  # steps not taken, of stopped and diverged trials
    trials: int
    packed: int  # of these


def savings(
    ledger: LedgerContents, planned: Callable[[LedgerTrial], int | None], every: int | None = None
) -> EngineSavings | None:
    """The arithmetic above; None before any trial has told its engine seconds.

    Args:
        planned: T_i; None where nobody knows, then n_i.
        every: steps between evaluations; None: there are none on the way.
    """
    told = [trial for trial in ledger.trials.values() if charged(trial) is not None]
    if not told:
        return None
    starts = [s for pack in ledger.packs.values() if (s := _number(pack, "start_seconds"))]
    steps = [a for pack in ledger.packs.values() if (a := _step(pack, every))]
    start = statistics.fmean(starts) if starts else 0.0
    step = statistics.median(steps) if steps else 0.0
    inside = _packed(told, step)
    alone = stopping = 0.0
    meant = cut = 0
    for trial in told:
        goal = max(planned(trial) or 0, trial.step) if trial.status in (*CUT, "done") else None
        goal = trial.step if goal is None else goal
        left = goal - trial.step if trial.status in CUT else 0
        pack = ledger.packs.get(trial.pack, {})
        s = (_number(pack, "start_seconds") or start) if trial.id in inside else 0.0
        a = _step(pack, every) or step
        if trial.id not in inside:
            a = (charged(trial) or 0.0) / max(trial.step, 1)
        alone += s + (trial.step + left) * a
        stopping += left * a
        meant, cut = meant + trial.step + left, cut + left
    spent = sum(charged(trial) or 0.0 for trial in told) + sum(starts)
    taken = sum(trial.step for trial in told)
    return EngineSavings(
        alone, spent, stopping, alone - stopping - spent,
        start, step, meant, taken, cut, len(told), len(inside),
    )  # fmt: skip


def charged(trial: LedgerTrial) -> float | None:
    """Engine seconds charged to a trial so far; None before its first report."""
    told = [r.metrics["seconds"] for r in trial.reports if "seconds" in r.metrics]
    return told[-1] if told else None


def _packed(trials: Iterable[LedgerTrial], step: float) -> set[str]:
    """Who ran in a pack. Where the ledger names no trial's pack, all did if packs were there."""
    listed = list(trials)
    if not step:
        return set()
    named = {trial.id for trial in listed if trial.pack}
    return named or {trial.id for trial in listed}


def _step(pack: Mapping[str, object], every: int | None) -> float:
    step, evaluation = _number(pack, "alone_step_seconds"), _number(pack, "alone_eval_seconds")
    return step + (evaluation / every if step and every else 0.0)


def _number(pack: Mapping[str, object], name: str) -> float:
    value = pack.get(name, 0.0)
    return float(value) if isinstance(value, int | float) else 0.0
