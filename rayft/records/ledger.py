"""The ledger of a sweep, `trials.jsonl`: append-only, one writer, and the only truth.

A line is one report of one trial:

    {"trial": "t0003", "time": 1763700000.0, "status": "running", "step": 20, "params": {...},
     "eval_loss": 3.91, ...}

`status` is running, then one of `ENDED`, which is final. `params` is {path of a config field:
value}; a trial whose params change (population-based training) says so with its donor. Every other
number is a metric. A step reported again (after a resume) replaces the earlier report. Lines with
"pack" instead of "trial" say how full a pack was; its last line counts. Lines with "sweep" say that
a driver started, and with what: sweep.json can be rebuilt from them.

Every line has a number and a checksum (`storage/sealed.py`). A damaged one is set aside: its trial
is what the other lines say.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rayft.records.run_record import ENDED, Status
from rayft.storage.folder import Storage
from rayft.storage.jsonl import LineAppender, read_log
from rayft.storage.sealed import DamagedLines

LEDGER = "trials.jsonl"
TrialParams = dict[str, object]
"""{path of a config field: value}, as an override names it."""
FACTS = ("trial", "time", "status", "step", "params", "error", "donor", "origin", "pack")
"""Keys of a line that are no metrics."""


@dataclass(frozen=True)
class LedgerReport:
    """What a trial said at one step."""

    step: int
    time: float  # seconds since the epoch
    metrics: dict[str, float]


@dataclass(frozen=True)
class LedgerTrial:
    """One trial as the ledger tells it."""

    id: str
    params: TrialParams  # as they are now
    status: Status  # running, or one of ENDED
    step: int  # the last one reported
    reports: tuple[LedgerReport, ...]  # by step; only those with metrics
    began: float  # time of its first and last line
    ended: float
    error: str = ""
    donors: tuple[tuple[int, str], ...] = ()  # population-based training: (step, donor)
    origin: str = ""  # the trial that this one repeats with another seed
    pack: str = ""  # where it ran last; "" on its own

    def best(self, metric: str, mode: str = "min") -> LedgerReport | None:
        """The report with the best finite `metric`, the first among equals; None without one."""
        sign = 1 if mode == "min" else -1
        told = [r for r in self.reports if math.isfinite(r.metrics.get(metric, math.nan))]
        return min(told, key=lambda report: sign * report.metrics[metric], default=None)

    @property
    def over(self) -> bool:
        """Nothing more will happen to it."""
        return self.status in ENDED


@dataclass
class LedgerContents:
    """Everything a ledger says."""

    # Trials by id, in the order of first lines; lines of trials, as they were written.
    trials: dict[str, LedgerTrial] = field(default_factory=dict)
    lines: list[Mapping[str, object]] = field(default_factory=list)
    packs: dict[str, dict[str, object]] = field(default_factory=dict)  # last line of each
    starts: list[Mapping[str, Any]] = field(default_factory=list)  # of the driver
    damage: tuple[DamagedLines, ...] = ()  # lines that are not in here


class Ledger:
    """The writer."""

    def __init__(self, storage: Storage, clock: Callable[[], float] = time.time) -> None:
        self._out, self._clock = LineAppender(storage, LEDGER), clock

    def add(
        self,
        trial: str,
        status: str,
        step: int,
        params: Mapping[str, object],
        metrics: Mapping[str, float] | None = None,
        **facts: str,
    ) -> dict[str, object]:
        """One line, as written; the end of a trial is durable on return.

        Args:
            metrics: finite numbers.
            facts: error, donor, origin, pack.

        Raises:
            StorageError: it could not be written.
        """
        line: dict[str, object] = {
            "trial": trial,
            "time": round(self._clock(), 3),
            "status": status,
            "step": step,
        }
        line |= {"params": dict(params), **facts, **(metrics or {})}
        self._out.append(line)
        if status in ENDED:
            self._out.flush()
        return line

    def pack(self, name: str, numbers: Mapping[str, float]) -> dict[str, object]:
        """How full a pack has been so far: slots, busy (slot-seconds), seconds, tokens, ..."""
        line: dict[str, object] = {"pack": name, "time": round(self._clock(), 3), **numbers}
        self._out.append(line)
        return line

    def start(self, sweep: str, number: int, config: str, data: str) -> dict[str, object]:
        """The `number`-th start of a driver (from 1), with the hashes of its config and data;
        durable on return."""
        line: dict[str, object] = {"sweep": sweep, "time": round(self._clock(), 3), "start": number}
        line |= {"config": config, "data": data}
        self._out.append(line)
        self._out.flush()
        return line

    def close(self) -> None:
        """No more lines."""
        self._out.close()

    def abandon(self) -> None:
        """No more lines, not even those that wait: another driver writes here."""
        self._out.abandon()


def read_ledger(storage: Storage) -> LedgerContents:
    """The ledger below `storage`; an empty one where there is none."""
    found = read_log(storage, LEDGER, is_ledger_row)
    return fold(found.rows, LedgerContents(damage=found.damage))


def is_ledger_row(row: Mapping[str, object]) -> bool:
    """Whether a row is one of a trial or of a pack, with all that `fold` needs."""
    if not _is_number(row.get("time")) or not isinstance(row.get("trial", row.get("pack")), str):
        return False
    if "trial" not in row:
        return True
    step, facts = row.get("step"), (row.get(name, "") for name in ("error", "donor", "origin"))
    return (
        isinstance(step, int)
        and row.get("status") in ("running", *ENDED)
        and isinstance(row.get("params"), dict)
        and all(isinstance(fact, str) for fact in facts)
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def fold(
    rows: Iterable[Mapping[str, Any]], contents: LedgerContents | None = None
) -> LedgerContents:
    """Lines to trials; added to `contents` where one is given."""
    contents = LedgerContents() if contents is None else contents
    for row in rows:
        if "trial" in row:
            contents.lines.append(row)
            contents.trials[row["trial"]] = _after(contents.trials.get(row["trial"]), row)
        elif "pack" in row:
            contents.packs[row["pack"]] = dict(row)
        elif "sweep" in row:
            contents.starts.append(dict(row))
    return contents


def metrics_in(row: Mapping[str, object]) -> dict[str, float]:
    """The numbers of a line that are metrics; {} where it is no report."""
    return {k: v for k, v in row.items() if k not in FACTS and isinstance(v, int | float)}


def _after(trial: LedgerTrial | None, row: Mapping[str, Any]) -> LedgerTrial:
    """`trial` once `row` is added; a trial that is over changes no more."""
    if trial is not None and trial.over:
        return trial
    step, now = int(row["step"]), float(row["time"])
    metrics = metrics_in(row)
    reports = () if trial is None else trial.reports
    if metrics:
        # Also drops what lay ahead: a trial that went back to a commit tells those steps again.
        reports = (*(r for r in reports if r.step < step), LedgerReport(step, now, metrics))
    donors = () if trial is None else trial.donors
    return LedgerTrial(
        id=row["trial"],
        params=dict(row["params"]),
        status=row["status"],
        step=step,
        reports=reports,
        began=now if trial is None else trial.began,
        ended=now,
        error=row.get("error", ""),
        donors=(*donors, (step, row["donor"])) if row.get("donor") else donors,
        origin=row.get("origin", "" if trial is None else trial.origin),
        pack=row.get("pack", "" if trial is None else trial.pack),
    )
