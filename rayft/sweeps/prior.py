"""Earlier sweeps as a prior (sweep.search.prior): what their ledgers say, for `search/tpe.py`.

A trial is taken where this sweep's space holds its settings: each value is what its own space set,
else what its config said. Settings that only the earlier sweep varied are left out. What was taken
at the first start is kept in prior.json: a sweep that goes on learns from the same trials, whatever
has become of the others meanwhile.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace
from typing import Any, cast

from rayft.config.run import Run
from rayft.config.sweep import OptunaSpec
from rayft.core.errors import ConfigError, StorageError
from rayft.records.ledger import LEDGER, LedgerContents, LedgerTrial, read_ledger
from rayft.records.run_record import SweepRecord
from rayft.report.facts import value_of
from rayft.search.samplers import PriorSweep, TriedParams, picks_of
from rayft.search.tpe import FACTOR
from rayft.storage.folder import Storage
from rayft.storage.sealed import BadRecord, damage_sentence, seal, unseal
from rayft.sweeps.state import SweepState

PRIOR, RECORD = "prior.json", "sweep.json"
WHERE = "sweep.search.prior"


def learned(state: SweepState) -> list[PriorSweep]:
    """What the sweep learns from before its own first trial; its record and its news say so.
    Later starts read prior.json, which the first one has written.

    Raises:
        ConfigError: an address holds no sweep, or one of another metric.
        StorageError: it cannot be read, or is damaged; the same of prior.json.
    """
    search, home = state.run.swept.search, state.home
    places = search.prior if isinstance(search, OptunaSpec) else ()
    if not places:
        return []
    if state.record.starts:
        found = _kept(home)
    else:
        found = [_read(state.run, home, place) for place in places]
        home.write_text(PRIOR, seal({"sweeps": [_as_json(sweep) for sweep in found]}))
    said: dict[str, dict[str, Any]] = {}
    for sweep in found:
        taken = len(sweep.trials)
        said[sweep.uri] = {"taken": taken, "skipped": sweep.skipped, "digest": sweep.digest}
        state.news.append(f"prior: {taken} trials of {sweep.uri}, {sweep.skipped} left out")
    state.record = replace(state.record, prior=said)
    return found


def _read(run: Run, home: Storage, place: str) -> PriorSweep:
    there = Storage.open(place)
    if there.uri == home.uri:
        raise ConfigError(f"sweep {run.name} cannot be its own prior", where=WHERE)
    try:
        record = SweepRecord.from_json(there.read_bytes(RECORD))
        data = there.read_bytes(LEDGER)
    except FileNotFoundError:
        raise ConfigError(
            f"there is no sweep in {there.shown()}",
            where=WHERE,
            fix="name the folder that holds its sweep.json and trials.jsonl",
        ) from None
    except BadRecord as error:
        raise StorageError(f"{there.shown(RECORD)} is damaged: {error}", where=WHERE) from error
    book = read_ledger(there)
    if book.damage:
        raise StorageError(damage_sentence(there.shown(LEDGER), book.damage), where=WHERE)
    ours, theirs = (run.swept.metric, run.swept.mode), (record.metric, record.mode)
    if ours != theirs:
        raise ConfigError(
            f"{there.shown()} went by {' '.join(theirs)}, this sweep goes by {' '.join(ours)}",
            where=WHERE,
            fix="leave it out: which of its trials were better is not what is asked here",
        )
    return _taken(run, record, book, there.uri, hashlib.sha256(data).hexdigest()[:16])


def _taken(
    run: Run, record: SweepRecord, book: LedgerContents, uri: str, digest: str
) -> PriorSweep:
    searched = [trial for trial in book.trials.values() if not trial.origin]
    tried = [_tried(run, record, trial) for trial in searched]
    trials = tuple(trial for trial in tried if trial is not None)

    def number(path: str) -> float:
        found = value_of(record.config, path)
        return float(found) if isinstance(found, int | float) else 0.0

    first = int(number("sweep.scheduler.grace") or number("train.eval_every") or 1)
    factor = number("sweep.scheduler.factor") or FACTOR
    return PriorSweep(uri, digest, first, factor, len(tried) - len(trials), trials)


def _tried(run: Run, record: SweepRecord, trial: LedgerTrial) -> TriedParams | None:
    """None where it tells nothing, or the space does not hold its settings."""
    params = {p: trial.params.get(p, value_of(record.config, p)) for p in run.swept.paths()}
    metric = run.swept.metric
    values = {report.step: report.metrics.get(metric, math.nan) for report in trial.reports}
    curve = {step: value for step, value in values.items() if math.isfinite(value)}
    useless = trial.status == "failed" or not (curve or trial.status == "diverged")
    if useless or picks_of(run.swept.space, params) is None:
        return None
    return TriedParams(params, trial.status, curve)


def _as_json(sweep: PriorSweep) -> dict[str, Any]:
    facts = {"uri": sweep.uri, "digest": sweep.digest, "skipped": sweep.skipped}
    rows = [
        {"params": t.params, "status": t.status, "curve": sorted(t.curve.items())}
        for t in sweep.trials
    ]
    return facts | {"first": sweep.first, "factor": sweep.factor, "trials": rows}


def _kept(home: Storage) -> list[PriorSweep]:
    try:
        record = unseal(home.read_bytes(PRIOR))
        sweeps = cast(list[dict[str, Any]], record["sweeps"])  # sealed: as _as_json wrote it
        return [
            PriorSweep(
                **{name: value for name, value in row.items() if name != "trials"},
                trials=tuple(
                    TriedParams(t["params"], t["status"], {int(s): v for s, v in t["curve"]})
                    for t in row["trials"]
                ),
            )
            for row in sweeps
        ]
    except (FileNotFoundError, BadRecord) as error:
        raise StorageError(
            f"{home.shown(PRIOR)}, from which this sweep learned, is gone or damaged: {error}",
            fix="choose another name for the sweep",
        ) from error
