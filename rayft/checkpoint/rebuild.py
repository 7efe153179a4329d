"""run.json made anew from what the checkpoints say, when it is gone or damaged."""

from __future__ import annotations

from dataclasses import replace

from rayft.checkpoint.folders import FOLDER, committed_names, last_attempt
from rayft.checkpoint.manifest import BadCommit
from rayft.checkpoint.reader import load_commit
from rayft.config.run import Run
from rayft.core.errors import ConfigError
from rayft.records.run_progress import RunProgress
from rayft.records.run_record import RunRecord
from rayft.storage.folder import Storage


def rebuilt(home: Storage, run: Run) -> RunRecord:
    """The record of `run` as its newest commit with readable manifests tells it; a first one where
    there is none. Shards are not read: whoever continues verifies them.

    Raises:
        ConfigError: the commits are of another config.
    """
    fresh = RunRecord(run.name, "running", run.resolved(), run.digest(), seed=run.seed)
    fresh = replace(fresh, attempts=last_attempt(home))
    for name in committed_names(home):
        try:
            commit = load_commit(home, name, verify=False)
        except BadCommit:
            continue
        if commit.record.config not in ("", run.digest()):
            raise ConfigError(
                f"the checkpoints of run {run.name} are of another config",
                where=home.shown(f"{FOLDER}/{name}"),
                cause="run.json, which would say what differs, is gone or damaged",
                fix="put the config back to continue the run, or choose another name",
            )
        extra = commit.extra(0)
        progress = RunProgress.from_json(extra["progress"])
        return replace(
            fresh.advanced(progress),
            status="interrupted",
            data_hash=extra["data_hash"],
            seconds=progress.seconds,
        )
    return fresh
