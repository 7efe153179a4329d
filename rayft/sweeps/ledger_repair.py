"""What a damaged ledger or sweep.json has lost, from what the trials' own folders still hold."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from rayft.checkpoint.folders import folder_names, last_attempt, set_aside
from rayft.config.run import Run
from rayft.config.space import applied
from rayft.core.errors import ConfigError
from rayft.hosts.placer_config import ATTEMPTS
from rayft.records.ledger import LedgerContents, LedgerTrial, TrialParams
from rayft.records.run_record import RunRecord, SweepRecord, stored_record
from rayft.report.facts import value_of
from rayft.storage.folder import Storage
from rayft.storage.sealed import BadRecord
from rayft.training.earlier_record import changes_between

RECORD = "sweep.json"
TRIALS = "trials"


@dataclass(frozen=True)
class MissingLine:
    """A line that the ledger should have; see Ledger.add."""

    trial: str
    status: str
    step: int
    params: TrialParams
    metrics: dict[str, float] = field(default_factory=dict)
    error: str = ""


def lost_lines(home: Storage, run: Run, ledger: LedgerContents) -> list[MissingLine]:
    """Trials that have a folder but no line in the ledger, and ends that were in damaged lines.

    Args:
        home: of the trials' folders.
        run: of the sweep.
    """
    folders = [entry.name for entry in home.list() if entry.folder]
    found = [
        line for name in folders if name not in ledger.trials for line in _unknown(home, run, name)
    ]
    if ledger.damage:
        unfinished = [trial for trial in ledger.trials.values() if not trial.over]
        found += [line for trial in unfinished for line in _known(home.child(trial.id), run, trial)]
    return found


def _unknown(home: Storage, run: Run, name: str) -> Iterator[MissingLine]:
    """A trial under its own parameters. Without them its name is free for other ones, so its
    checkpoints must not be continued."""
    if "-s" in name:  # a repetition: its config follows from its name
        return
    folder = home.child(name)
    record = stored_record(folder)
    params = None if record is None else _params(run, record)
    if params is not None:
        trial = LedgerTrial(name, params, "running", 0, (), 0.0, 0.0)
        yield from list(_end(folder, trial)) or [MissingLine(name, "running", 0, params)]
        return
    for checkpoint in folder_names(folder):
        set_aside(folder, checkpoint, "nobody knows the settings of this trial any more")


def _known(folder: Storage, run: Run, trial: LedgerTrial) -> Iterator[MissingLine]:
    """Of a trial that goes on for the ledger: its end, or the parameters that it went on with."""
    ends, record = list(_end(folder, trial)), stored_record(folder)
    yield from ends
    params = None if ends or record is None else _params(run, record)
    if params is not None and params != trial.params:
        yield MissingLine(trial.id, "running", trial.step, params)


def _params(run: Run, record: RunRecord) -> TrialParams | None:
    """What the space set in the config of a record; None where that does not give this config."""
    params = {path: value_of(record.config, path) for path in run.swept.paths()}
    try:
        made = applied(run, params, name=record.name, storage=record.config["storage"])
    except (ConfigError, KeyError):
        return None
    return params if made.digest() == record.config_hash else None


def _end(folder: Storage, trial: LedgerTrial) -> Iterator[MissingLine]:
    """How a trial ended, as its run.json says; nothing where it did not."""
    record = stored_record(folder)
    if record is None:
        return
    known = (trial.id, record.status, record.steps, trial.params)
    if record.status == "done":
        facts = {"tokens": float(record.tokens), "params_trainable": float(record.params_trainable)}
        base = {"base_loss": record.base["eval_loss"]} if record.base else {}
        yield MissingLine(*known, {**record.eval, **base, **facts})
    elif record.status == "diverged":
        yield MissingLine(*known, error=record.error)
    elif record.status == "stopped" and trial.reports:
        yield MissingLine(trial.id, "stopped", trial.step, trial.params)


def earlier_sweep(home: Storage, run: Run, ledger: LedgerContents) -> tuple[SweepRecord, str]:
    """What sweep.json says, and "". Where it is gone or damaged: one made anew from the ledger, and
    a word about it; for a new sweep a fresh record.

    Raises:
        ConfigError: that sweep has another config; it names what differs.
    """
    shown, spec = home.shown(RECORD), run.swept
    facts = (run.resolved(), run.sweep_digest(), spec.metric, spec.mode)
    fresh = SweepRecord(run.name, "running", *facts)
    data = b""
    try:
        data = home.read_bytes(RECORD)
        return _same(SweepRecord.from_json(data), run, shown), ""
    except FileNotFoundError:
        if not ledger.trials and not home.list(TRIALS):
            return fresh, ""
        why = "is gone"
    except BadRecord as error:
        why = f"is damaged ({error})"
        home.write_bytes(f"{RECORD}.damaged", data)
    if ledger.starts:
        last = ledger.starts[-1]
        fresh = replace(fresh, config_hash=last["config"], data_hash=last["data"])
    times = [t for trial in ledger.trials.values() for t in (trial.began, trial.ended)]
    record = replace(
        _same(fresh, run, shown),
        status="interrupted",
        starts=_starts(home.child(TRIALS), ledger),
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


def _starts(trials: Storage, ledger: LedgerContents) -> int:
    """How often the sweep was started: the ledger's lines, or, of an old ledger, the numbers of the
    attempts in the trials' folders. Too low a number would fence off what is yet to come."""
    told = max((int(line["start"]) for line in ledger.starts), default=0)
    if told:
        return told
    folders = [entry.name for entry in trials.list() if entry.folder]
    return max((last_attempt(trials.child(name)) // ATTEMPTS for name in folders), default=0)
