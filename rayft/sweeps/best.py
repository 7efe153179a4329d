"""`best/`: the winner as a run's folder: config, checkpoint, evaluation and export."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

import yaml

from rayft.cluster.interrupt import Interrupt
from rayft.config.run import Run
from rayft.config.space import applied
from rayft.core.process import temporary
from rayft.records.ledger import read_ledger
from rayft.records.run_record import RunRecord, SweepRecord, SweepWinner, stored_record
from rayft.storage.folder import Storage
from rayft.training.state import Fence

BEST = "best"
_HEAD = """\
# The best of sweep {sweep}: trial {trial}, {metric} {value:.6g} at step {step}.
# {again}    trains it again, as run {name}
"""


def write_config(home: Storage, run: Run, best: SweepWinner, metric: str) -> None:
    """best/config.yaml: what the winner ran with, under a name of its own."""
    name = f"{run.name}-best"
    winner = applied(run, best.params, name=name, storage=run.storage)
    head = _HEAD.format(
        sweep=run.name,
        trial=best.trial,
        metric=metric,
        value=best.metric,
        step=best.step,
        again=shlex.join(["rayft", "train", home.child(BEST, "config.yaml").uri]),
        name=name,
    )
    body = {key: value for key, value in winner.resolved().items() if key != "sweep"}
    home.write_text(f"{BEST}/config.yaml", head + yaml.safe_dump(body, sort_keys=False))


def copy_winner(home: str, trial: str) -> str:
    """Copy a trial's record, metrics and best commit to best/, and export it there; the export's
    address. Runs where torch is loaded."""
    from rayft.checkpoint.manifest import FOLDER
    from rayft.compose.offline import export_run
    from rayft.compose.publish import choose_commit

    sweep = Storage.open(home)
    source, target = sweep.child("trials", trial), sweep.child(BEST)
    record = stored_record(source) or _rebuilt(sweep, trial)
    commit = choose_commit(source, record)
    for old in ("checkpoints", "export", "metrics.jsonl"):
        target.delete(old)
    wanted = [f"{FOLDER}/{commit.name}/{e.name}" for e in source.list(f"{FOLDER}/{commit.name}")]
    # COMMIT.json last: a reader must never see half a checkpoint
    wanted.sort(key=lambda name: name.endswith("COMMIT.json"))
    wanted += [e.name for e in source.list() if e.name.startswith("metrics")]
    with temporary("best") as folder:
        for name in wanted:
            local = source.download(name, Path(folder) / "file")
            target.upload(local, name)
    config = record.config | {"name": BEST, "storage": sweep.uri}
    target.write_text("run.json", replace(record, name=BEST, config=config).to_json())
    return export_run(target.uri)


def _rebuilt(sweep: Storage, trial: str) -> RunRecord:
    """The record of a trial whose run.json is damaged, from its checkpoints."""
    from rayft.checkpoint.rebuild import rebuilt

    run = Run.model_validate(SweepRecord.from_json(sweep.read_bytes("sweep.json")).config)
    params, home = read_ledger(sweep).trials[trial].params, sweep.child("trials")
    return rebuilt(home.child(trial), applied(run, params, name=trial, storage=home.uri))


def refit(
    run: Run, home: Storage, best: SweepWinner, again: str, interrupt: Interrupt, fence: Fence
) -> RunRecord:
    """Train the winner from the start for the config's own train.steps, in best/.

    Args:
        interrupt, fence: of the sweep.
    """
    from rayft.training.driver import RunContext, train
    from rayft.training.progress import view

    searched = run.model_copy(update={"sweep": run.swept.model_copy(update={"steps": None})})
    winner = applied(searched, best.params, name=BEST, storage=home.uri)
    return train(
        winner, again=again, context=RunContext(view(), interrupt, fence=fence, export=True)
    )
