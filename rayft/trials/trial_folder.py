"""What a trial's folder holds beside its metrics: run.json and checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from rayft.checkpoint.reader import folder_names, remove_commit
from rayft.compose.job import AttemptJob
from rayft.config.run import Run
from rayft.records.run_record import RunRecord, stored_record
from rayft.storage.folder import Storage

RECORD = "run.json"


def delete_checkpoints(storage: Storage) -> None:
    """Delete every checkpoint of a run."""
    for name in folder_names(storage):
        remove_commit(storage, name)


def trial_record(
    storage: Storage, run: Run, job: AttemptJob, facts: Mapping[str, object]
) -> RunRecord:
    """run.json as it stands, or the first one; the attempt counted."""
    first = RunRecord(run.name, "running", run.resolved(), job.digest, seed=run.seed)
    fresh = stored_record(storage) or first  # a damaged one: the commits know the trial's state
    return replace(
        fresh,
        config=run.resolved(),
        config_hash=job.digest,
        data_hash=job.data_hash,
        attempts=fresh.attempts + 1,
        versions=facts.get("versions", fresh.versions),
        hardware=facts.get("hardware", fresh.hardware),
        data=facts.get("data", fresh.data),
    )
