"""trials.csv: one row per trial, for a spreadsheet."""

from __future__ import annotations

import csv
import io
import json
from datetime import UTC, datetime

from rayft.report.facts import SweepFacts, TrialResult

NUMBERS = ("seconds", "memory", "params_trainable", "tokens", "loss")
"""Metrics that get a column of their own, as the trial told them last: engine seconds, bytes,
parameters, trained targets, training loss."""
_RISKY = ("=", "+", "-", "@", "\t", "\r", "\n")


def trials_csv(facts: SweepFacts) -> str:
    """The table: trials in the order of the ledger, repetitions with other seeds after them."""
    paths = sorted({p for row in (*facts.rows, *facts.repeats) for p in row.trial.params})
    searched = [*facts.spec.paths(), *(p for p in paths if p not in facts.spec.paths())]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\r\n")
    head = ["trial", "status", facts.record.metric, "best_step", "last_step", *searched, *NUMBERS]
    writer.writerow(
        [safe(name) for name in (*head, "repeats", "donors", "began", "ended", "error")]
    )
    for row in (*facts.rows, *facts.repeats):
        writer.writerow([cell(value) for value in _values(row, searched)])
    return out.getvalue()


def cell(value: object) -> str:
    """One value; numbers as they are, everything else safe to open."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    return safe(value if isinstance(value, str) else json.dumps(value, default=str))


def safe(text: str) -> str:
    """Text that no spreadsheet runs as a formula: a quote before what would start one."""
    return f"'{text}" if text.startswith(_RISKY) else text


def _values(row: TrialResult, paths: list[str]) -> list[object]:
    trial = row.trial
    donors = " ".join(f"{step}:{donor}" for step, donor in trial.donors)
    return [
        trial.id,
        trial.status,
        row.value,
        row.at,
        trial.step,
        *(trial.params.get(path) for path in paths),
        *(row.told.get(name) for name in NUMBERS),
        trial.origin,
        donors,
        _time(trial.began),
        _time(trial.ended),
        trial.error,
    ]


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
