"""From a sweep's record and ledger to the numbers that people ask for."""

from __future__ import annotations

import logging
import math
import shlex
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import ValidationError

from rayft.config.sweep import SweepSpec
from rayft.core.errors import ConfigError, StorageError
from rayft.records.ledger import LEDGER, LedgerContents, LedgerTrial, read_ledger
from rayft.records.run_record import SweepRecord
from rayft.report.axes import SpaceAxis, axes
from rayft.report.savings import EngineSavings, savings
from rayft.storage.folder import Storage
from rayft.storage.sealed import BadRecord, damage_sentence

log = logging.getLogger(__name__)

RECORD = "sweep.json"
LOST = ("diverged", "failed")
"""Ends that no winner has."""


@dataclass(frozen=True)
class TrialResult:
    """One trial and its result."""

    trial: LedgerTrial
    value: float | None  # its best finite metric
    at: int | None  # the step of that
    told: dict[str, float]  # the newest of every metric it reported

    @property
    def fair(self) -> bool:
        """Has a result that counts: it neither diverged nor failed."""
        return self.value is not None and self.trial.status not in LOST


@dataclass(frozen=True)
class SeedSpread:
    """A winner over seeds: the repetitions only, for the winner itself was chosen by its luck."""

    values: tuple[float, ...]
    mean: float
    deviation: float  # sample standard deviation; 0 of one value


@dataclass(frozen=True)
class SweepFacts:
    """All that the page, the table and the Optuna study are made of."""

    record: SweepRecord
    spec: SweepSpec
    ledger: LedgerContents
    axes: tuple[SpaceAxis, ...]
    rows: tuple[TrialResult, ...]  # of the search, in the order of the ledger
    repeats: tuple[TrialResult, ...]  # the winner again with other seeds
    best: TrialResult | None
    base: float | None  # the base model's metric
    median: float | None  # of all that ended or run, diverged ones the worst; None: it diverged
    spread: SeedSpread | None
    saved: EngineSavings | None
    files: frozenset[str]  # of best/

    @property
    def sign(self) -> int:
        """1 when lower is better, -1 when higher is."""
        return 1 if self.record.mode == "min" else -1

    def count(self, *statuses: str) -> int:
        """Trials of the search with one of these statuses."""
        return sum(row.trial.status in statuses for row in self.rows)

    def ranked(self) -> list[TrialResult]:
        """Trials with a result that counts, the best first."""
        fair = [row for row in self.rows if row.fair]
        return sorted(fair, key=lambda row: self.sign * (row.value or 0.0))


def read_facts(storage: Storage) -> SweepFacts:
    """Everything about the sweep in this folder.

    Raises:
        ConfigError: the folder is no sweep; it says what it is.
        StorageError: sweep.json cannot be read.
    """
    ledger = read_ledger(storage)
    if ledger.damage:
        log.warning("%s", damage_sentence(storage.shown(LEDGER), ledger.damage))
    return facts(_record(storage), ledger, _files(storage))


def facts(
    record: SweepRecord, ledger: LedgerContents, files: frozenset[str] = frozenset()
) -> SweepFacts:
    """The numbers of a sweep.

    Raises:
        StorageError: the record's config holds no sweep block that this version understands.
    """
    try:
        spec = SweepSpec.model_validate(record.config.get("sweep"))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise StorageError(
            f"the sweep block in {RECORD} of {record.name} is not understood: {first['msg']}",
            fix="build the report with the version of rayft that wrote it",
        ) from error
    every = [_row(trial, record) for trial in ledger.trials.values()]
    rows = tuple(row for row in every if not row.trial.origin)
    sign = 1 if record.mode == "min" else -1
    fair = [row for row in rows if row.fair]
    best = min(fair, key=lambda row: sign * (row.value or 0.0), default=None)
    again = tuple(row for row in every if best is not None and row.trial.origin == best.trial.id)
    return SweepFacts(
        record=record,
        spec=spec,
        ledger=ledger,
        axes=axes(spec.space, [row.trial.params for row in rows]),
        rows=rows,
        repeats=again,
        best=best,
        base=_base(record, every),
        median=_median(rows, sign),
        spread=_spread(again),
        saved=savings(
            ledger,
            lambda trial: planned(record, spec, ledger, trial),
            record.config.get("train", {}).get("eval_every"),
        ),
        files=files,
    )


def cost(facts: SweepFacts) -> dict[str, float]:
    """SweepRecord.cost: engine seconds; {} before any trial has told its own."""
    bill = facts.saved
    if bill is None:
        return {}
    return {
        "trial_seconds": round(bill.spent, 3),
        "alone_seconds": round(bill.alone, 3),
        "saved_by_stopping": round(bill.stopping, 3),
        "saved_by_packing": round(bill.packing, 3),
        "start_seconds": round(bill.start, 3),
    }


def planned(
    record: SweepRecord, spec: SweepSpec, ledger: LedgerContents, trial: LedgerTrial
) -> int | None:
    """Steps that a trial was meant to take; None where only a data set's length would tell."""
    own = trial.params.get("train.steps")
    steps = own or spec.steps or record.config.get("train", {}).get("steps")
    if isinstance(steps, int):
        return steps
    return max((t.step for t in ledger.trials.values() if t.status == "done"), default=None)


def front(rows: Sequence[TrialResult], cost: str, sign: int) -> list[TrialResult]:
    """The Pareto front of result against a cost, cheapest first: no other trial is at least as
    good in both and better in one."""
    told = [row for row in rows if row.fair and math.isfinite(row.told.get(cost, math.nan))]
    told.sort(key=lambda row: (row.told[cost], sign * (row.value or 0.0)))
    kept: list[TrialResult] = []
    for row in told:
        if not kept or sign * (row.value or 0.0) < sign * (kept[-1].value or 0.0):
            kept.append(row)
    return kept


def value_of(config: object, path: str) -> object:
    """The value at a dotted path of a resolved config; None where there is none."""
    for key in path.split("."):
        if isinstance(config, list) and key.isdigit() and int(key) < len(config):
            config = config[int(key)]
        elif isinstance(config, dict) and key in config:
            config = config[key]
        else:
            return None
    return config


def _record(storage: Storage) -> SweepRecord:
    try:
        return SweepRecord.from_json(storage.read_bytes(RECORD))
    except FileNotFoundError:
        pass
    except BadRecord as error:
        raise StorageError(
            f"{storage.shown(RECORD)} is damaged: {error}",
            fix="give the sweep's own command again: it makes the file anew from trials.jsonl",
        ) from error
    if storage.exists("run.json"):
        raise ConfigError(
            f"{storage.shown()} is a single run; a report is made of a sweep",
            fix=shlex.join(["rayft", "eval", storage.uri]),
        )
    inside = [e.name for e in storage.list() if storage.exists(f"{e.name}/{RECORD}")][:3]
    raise ConfigError(
        f"{storage.shown()} is no sweep: there is no {RECORD}",
        fix=shlex.join(["rayft", "report", storage.child(inside[0]).uri])
        if inside
        else "give a sweep's folder, <storage>/<name>",
    )


def _files(storage: Storage) -> frozenset[str]:
    return frozenset(entry.name for entry in storage.list("best"))


def _row(trial: LedgerTrial, record: SweepRecord) -> TrialResult:
    best = trial.best(record.metric, record.mode)
    told: dict[str, float] = {}
    for report in trial.reports:
        told |= report.metrics
    value = None if best is None else best.metrics[record.metric]
    return TrialResult(trial, value, None if best is None else best.step, told)


def _base(record: SweepRecord, rows: Sequence[TrialResult]) -> float | None:
    known = record.base.get(record.metric)
    if known is None and record.metric == "eval_loss":
        known = next((row.told["base_loss"] for row in rows if "base_loss" in row.told), None)
    return known if known is not None and math.isfinite(known) else None


def _median(rows: Sequence[TrialResult], sign: int) -> float | None:
    """The lower middle of all results; a diverged trial is worse than every other."""
    counted = [
        sign * row.value if row.fair and row.value is not None else math.inf
        for row in rows
        if row.fair or row.trial.status == "diverged"
    ]
    middle = statistics.median_low(counted) if counted else math.inf
    return sign * middle if math.isfinite(middle) else None


def _spread(again: Sequence[TrialResult]) -> SeedSpread | None:
    values = tuple(row.value for row in again if row.fair and row.value is not None)
    if not values:
        return None
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return SeedSpread(values, statistics.fmean(values), deviation)
