"""What a trial's folder holds beside its metrics: run.json and checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rayft.compose.commit import names, remove
from rayft.compose.job import Job
from rayft.config.run import Run
from rayft.core.record import RunRecord, stored
from rayft.core.storage import Storage

RECORD = "run.json"


def forget(storage: Storage) -> None:
    """Delete every checkpoint of a run."""
    for name in names(storage):
        remove(storage, name)


def record_of(storage: Storage, run: Run, job: Job, facts: Mapping[str, Any]) -> RunRecord:
    """run.json as it stands, or the first one; the attempt counted."""
    first = RunRecord(run.name, "running", run.resolved(), job.digest, seed=run.seed)
    fresh = stored(storage) or first  # a damaged one: the commits know the trial's state
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
