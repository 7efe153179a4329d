"""What run.json said before this start, or what it must have said."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from pydantic import ValidationError

from rayft.checkpoint.folders import last_attempt
from rayft.config.override import flattened
from rayft.config.run import Run
from rayft.core.errors import ConfigError
from rayft.records.run_record import RunRecord
from rayft.storage.folder import Storage
from rayft.storage.sealed import BadRecord

RECORD = "run.json"


@dataclass(frozen=True)
class EarlierRecord:
    """The record that a run goes on with."""

    record: RunRecord
    word: str = ""  # on how it was come by, where it was not simply read
    damaged: bytes = b""  # what lies there instead


def earlier_record(home: Storage, run: Run) -> EarlierRecord:
    """What run.json says. Where it is gone or damaged: what the checkpoints say, or a fresh record.

    Raises:
        ConfigError: that run has another config.
    """
    data = b""
    try:
        data = home.read_bytes(RECORD)
        record = RunRecord.from_json(data)
    except FileNotFoundError:
        if not last_attempt(home):
            return EarlierRecord(
                RunRecord(run.name, "running", run.resolved(), run.digest(), seed=run.seed)
            )
        return _rebuilt(home, run, "is gone", data)
    except BadRecord as error:
        return _rebuilt(home, run, f"is damaged ({error})", data)
    if record.config_hash != run.digest():
        raise ConfigError(
            "\n".join(
                [
                    f"run {run.name} exists with another config:",
                    *changes_between(record.config, run, Run.identity),
                ]
            ),
            where=home.shown(RECORD),
            fix="put the config back to continue it, or choose another name",
        )
    # Free settings (workers, micro-batch, trackers) may differ; the record says what holds now.
    return EarlierRecord(replace(record, config=run.resolved()))


def _rebuilt(home: Storage, run: Run, why: str, data: bytes) -> EarlierRecord:
    from rayft.checkpoint.rebuild import rebuilt  # torch comes with it; rarely needed here

    record = rebuilt(home, run)
    source = (
        f"made anew from the checkpoint of step {record.steps}"
        if record.data_hash
        else ("there is no checkpoint to tell what it said, so it is begun anew")
    )
    return EarlierRecord(record, f"{home.shown(RECORD)} {why}: {source}", data)


def changes_between(
    config: dict[str, object], run: Run, identity: Callable[[Run], dict[str, object]]
) -> list[str]:
    """`key: before -> now` for everything of `identity` that must not change."""
    try:
        before = flattened(identity(Run.model_validate(config)))
    except ValidationError:
        before = flattened(config)
    now = flattened(identity(run))
    missing = "(absent)"
    return [
        f"  {key}: {before.get(key, missing)} -> {now.get(key, missing)}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key, missing) != now.get(key, missing)
    ]
