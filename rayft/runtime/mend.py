"""What a damaged ledger or sweep.json has lost, from what the trials' own folders still hold."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from rayft.compose.folders import FOLDER, last_attempt, names, set_aside
from rayft.config.run import Run
from rayft.config.space import applied
from rayft.core.errors import ConfigError
from rayft.core.ledger import Book, Trial
from rayft.core.record import RunRecord, SweepRecord, stored
from rayft.core.sealed import BadRecord
from rayft.core.storage import Storage
from rayft.report.facts import value_of
from rayft.runtime.earlier import changes_between
from rayft.runtime.floor import ATTEMPTS

RECORD = "sweep.json"
TRIALS = "trials"


@dataclass(frozen=True)
class Found:
    """A line that the ledger should have; see Ledger.add."""

    trial: str
    status: str
    step: int
    params: dict[str, Any]
    metrics: dict[str, float] = field(default_factory=dict)
    error: str = ""


def lost_lines(home: Storage, run: Run, book: Book) -> list[Found]:
    """Trials that have a folder but no line in the ledger, and ends that were in damaged lines.

    Args:
        home: of the trials' folders.
        run: of the sweep.
    """
    folders = [entry.name for entry in home.list() if entry.folder]
    found = [
        line for name in folders if name not in book.trials for line in _unknown(home, run, name)
    ]
    if book.damage:
        unfinished = [trial for trial in book.trials.values() if not trial.over]
        found += [line for trial in unfinished for line in _known(home.child(trial.id), run, trial)]
    return found


def _unknown(home: Storage, run: Run, name: str) -> Iterator[Found]:
    """A trial under its own parameters. Without them its name is free for other ones, so its
    checkpoints must not be continued."""
    if "-s" in name:  # a repetition: its config follows from its name
        return
    folder = home.child(name)
    record = stored(folder)
    params = None if record is None else _params(run, record)
    if params is not None:
        trial = Trial(name, params, "running", 0, (), 0.0, 0.0)
        yield from list(_end(folder, trial)) or [Found(name, "running", 0, params)]
        return
    for checkpoint in names(folder):
        set_aside(folder, checkpoint, "nobody knows the settings of this trial any more")


def _known(folder: Storage, run: Run, trial: Trial) -> Iterator[Found]:
    """Of a trial that goes on for the ledger: its end, or the parameters that it went on with."""
    ends, record = list(_end(folder, trial)), stored(folder)
    yield from ends
    params = None if ends or record is None else _params(run, record)
    if params is not None and params != trial.params:
        yield Found(trial.id, "running", trial.step, params)


def _params(run: Run, record: RunRecord) -> dict[str, Any] | None:
    """What the space set in the config of a record; None where that does not give this config."""
    params = {path: value_of(record.config, path) for path in run.sweep.paths()}
    try:
        made = applied(run, params, name=record.name, storage=record.config["storage"])
    except (ConfigError, KeyError):
        return None
    return params if made.digest() == record.config_hash else None


def _end(folder: Storage, trial: Trial) -> Iterator[Found]:
    """How a trial ended, as its run.json says; nothing where it did not."""
    record = stored(folder)
    if record is None:
        return
    known = (trial.id, record.status, record.steps, trial.params)
    if record.status == "done":
        facts = {"tokens": float(record.tokens), "params_trainable": float(record.params_trainable)}
        base = {"base_loss": record.base["eval_loss"]} if record.base else {}
        yield Found(*known, {**record.eval, **base, **facts})
    elif record.status == "diverged":
        yield Found(*known, error=record.error)
    elif record.status == "interrupted" and trial.reports and not folder.list(FOLDER):
        # Only a trial that a scheduler stopped has left without its checkpoints.
        yield Found(trial.id, "stopped", trial.step, trial.params)


def earlier_sweep(home: Storage, run: Run, book: Book) -> tuple[SweepRecord, str]:
    """What sweep.json says, and "". Where it is gone or damaged: one made anew from the ledger, and
    a word about it; for a new sweep a fresh record.

    Raises:
        ConfigError: that sweep has another config; it names what differs.
    """
    shown, spec = home.shown(RECORD), run.sweep
    facts = (run.resolved(), run.sweep_digest(), spec.metric, spec.mode)
    fresh = SweepRecord(run.name, "running", *facts)
    try:
        data = home.read_bytes(RECORD)
        return _same(SweepRecord.from_json(data), run, shown), ""
    except FileNotFoundError:
        if not book.trials and not home.list(TRIALS):
            return fresh, ""
        why = "is gone"
    except BadRecord as error:
        why = f"is damaged ({error})"
        home.write_bytes(f"{RECORD}.damaged", data)
    if book.starts:
        last = book.starts[-1]
        fresh = replace(fresh, config_hash=last["config"], data_hash=last["data"])
    times = [t for trial in book.trials.values() for t in (trial.began, trial.ended)]
    record = replace(
        _same(fresh, run, shown),
        status="interrupted",
        starts=_starts(home.child(TRIALS), book),
        seconds=max(times, default=0.0) - min(times, default=0.0),
    )
    return record, f"{shown} {why}: made anew from the ledger"


def _same(record: SweepRecord, run: Run, shown: str) -> SweepRecord:
    """The record with the config as it is now, which may differ in what is free."""
    if record.config_hash != run.sweep_digest():
        diff = changes_between(record.config, run, Run.sweep_identity)
        raise ConfigError(
            "\n".join([f"sweep {run.name} exists with another config:", *diff]),
            where=shown,
            fix="put the config back to continue it, or choose another name",
        )
    return replace(record, config=run.resolved())


def _starts(trials: Storage, book: Book) -> int:
    """How often the sweep was started: the ledger's lines, or, of an old ledger, the numbers of the
    attempts in the trials' folders. Too low a number would fence off what is yet to come."""
    told = max((int(line["start"]) for line in book.starts), default=0)
    if told:
        return told
    folders = [entry.name for entry in trials.list() if entry.folder]
    return max((last_attempt(trials.child(name)) // ATTEMPTS for name in folders), default=0)
