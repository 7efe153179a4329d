"""What a trial's folder holds beside its metrics: run.json and checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rayft.compose.commit import names, remove
from rayft.compose.job import Job
from rayft.config.run import Run
from rayft.core.record import RunRecord
from rayft.core.sealed import BadRecord
from rayft.core.storage import Storage

log = logging.getLogger(__name__)

RECORD = "run.json"


def forget(storage: Storage) -> None:
    """Delete every checkpoint of a run."""
    for name in names(storage):
        remove(storage, name)


def record_of(storage: Storage, run: Run, job: Job, facts: Mapping[str, Any]) -> RunRecord:
    """run.json as it stands, or the first one; the attempt counted."""
    fresh = RunRecord(run.name, "running", run.resolved(), job.digest, seed=run.seed)
    try:
        fresh = RunRecord.from_json(storage.read_bytes(RECORD))
    except FileNotFoundError:
        pass
    except BadRecord as error:  # its commits know the state; the rest is written again
        log.warning("%s is made anew: %s", storage.shown(RECORD), error)
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
