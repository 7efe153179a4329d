"""run.json, refusals on resume, statuses; in-process runs, without Ray."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import stub
import torch.distributed as dist

from rayft.compose.job import PreparedData, ProgressEvent
from rayft.core.errors import (
    ConfigError,
    DataError,
    DivergedError,
    InterruptedRun,
    RayftError,
    StorageError,
)
from rayft.records.run_progress import BestEvaluation, RunProgress, RunSize
from rayft.records.run_record import RunRecord
from rayft.training.driver import train

ALONE = {"scale": {"workers": 0, "gpus": 0}, "train": {"steps": 4, "save_every": 2}}


def solo(run, engine=stub.execute, prepare=stub.prepare):
    return train(run, engine=engine, prepare=prepare)


def on_disk(run):
    return RunRecord.from_json((Path(run.storage) / run.name / "run.json").read_text())


def test_a_run_in_process_needs_no_ray(a_run):
    code = (
        "import sys, stub\n"
        "from rayft.config.run import Run\n"
        "from rayft.training.driver import train\n"
        "run = Run.model_validate_json(sys.argv[1])\n"
        "record = train(run, engine=stub.execute, prepare=stub.prepare)\n"
        "assert record.status == 'done' and 'ray' not in sys.modules, record\n"
    )
    run = a_run(**ALONE).model_dump_json()
    subprocess.run([sys.executable, "-c", code, run], check=True, timeout=100)


def test_a_record_takes_over_all_of_a_progress():
    """A field that is added to a progress or a size must reach run.json too."""
    progress = RunProgress(3, 30, 2.5, {"eval_loss": 2.0}, {"eval_loss": 1.0})
    progress.best = BestEvaluation(2, 0.5, "step-2-1a")
    kept = json.loads(json.dumps(asdict(progress)))
    assert RunProgress.from_json(kept) == progress
    record = asdict(RunRecord("r", "running", {}, "h").advanced(progress, RunSize(8, 100, 10)))
    assert kept.pop("step") == record["steps"]
    assert kept.pop("seconds") and record["seconds"] == 0.0  # the caller's
    assert kept | asdict(RunSize(8, 100, 10)) == {
        name: record[name] for name in (*kept, *asdict(RunSize(8)))
    }


def test_record_of_a_finished_run(a_run):
    run = a_run(**ALONE)
    record = solo(run)
    assert on_disk(run) == record
    assert (record.status, record.steps, record.steps_total, record.tokens) == ("done", 4, 4, 40)
    assert (record.eval, record.base) == ({"eval_loss": 1.0}, {"eval_loss": 2.0})
    assert record.config_hash == run.digest() and record.data["train"]["total"]["rows"] == 4
    assert {"torch", "ray", "python", "rayft"} <= record.versions.keys()
    assert record.attempts == 1 and record.seconds > 0
    assert not dist.is_initialized() and "WORLD_SIZE" not in os.environ


def test_a_done_run_is_returned_without_work(a_run):
    run = a_run(**ALONE)
    first = solo(run)
    assert solo(run, engine=None, prepare=pytest.fail) == first


def test_another_config_is_refused_with_the_difference(a_run):
    solo(a_run(**ALONE))
    with pytest.raises(ConfigError) as caught:
        solo(a_run(**ALONE, optim={"lr": 1e-3}, seed=7))
    text = str(caught.value)
    assert "optim.lr: 0.0002 -> 0.001" in text and "seed: 0 -> 7" in text
    assert "scale" not in text and len(text.splitlines()) <= 15


def test_free_settings_may_change(a_run):
    solo(a_run(**ALONE))
    free = ALONE["train"] | {"micro_batch": 1}
    assert solo(a_run(**ALONE | {"train": free})).status == "done"


def test_changed_data_is_refused_and_leaves_the_record(a_run):
    run = a_run(**ALONE)

    def fail(*args):
        raise RuntimeError("boom")

    with pytest.raises(RayftError):
        solo(run, engine=fail)
    before = on_disk(run)
    with pytest.raises(DataError, match="data changed"):
        solo(run, prepare=lambda run, mapper: PreparedData("elsewhere", "e" * 16))
    assert on_disk(run) == before


def test_failures_leave_status_error_and_traceback(a_run):
    run = a_run(**ALONE)

    def fail(job, rank, world, device, signals):
        signals.progress(ProgressEvent("start", 2))
        raise RuntimeError("boom")

    with pytest.raises(RayftError) as caught:
        solo(run, engine=fail)
    record = on_disk(run)
    assert record.status == "failed" and "boom" in record.error
    assert "rank 0, step 3" in str(caught.value)
    trace = (Path(run.storage) / "r/errors/attempt-1.txt").read_text()
    assert "in fail" in trace and "RuntimeError: boom" in trace
    assert solo(run).status == "done" and on_disk(run).attempts == 2 and on_disk(run).error == ""


def test_divergence_has_its_own_status(a_run):
    run = a_run(**ALONE)

    def diverge(*args):
        raise DivergedError("loss nan")

    with pytest.raises(DivergedError):
        solo(run, engine=diverge)
    assert on_disk(run).status == "diverged"


def test_a_signal_saves_and_stops(a_run):
    run = a_run(**ALONE)

    def engine(job, rank, world, device, signals):
        os.kill(os.getpid(), signal.SIGTERM)
        return stub.execute(job, rank, world, device, signals)

    with pytest.raises(InterruptedRun, match="saved at step 0 of 4"):
        solo(run, engine=engine)
    assert on_disk(run).status == "interrupted"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert solo(run).status == "done"


def test_a_second_signal_stops_at_once(a_run):
    def engine(job, rank, world, device, signals):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return stub.execute(job, rank, world, device, signals)

    with pytest.raises(InterruptedRun, match="without a save"):
        solo(a_run(**ALONE), engine=engine)


def test_storage_that_cannot_be_written_is_exit_6(a_run, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError) as caught:
        solo(a_run(**ALONE, storage=str(tmp_path / "file" / "runs")), prepare=pytest.fail)
    assert caught.value.exit_code == 6


def test_tensorboard_gets_every_step(a_run):
    pytest.importorskip("tensorboardX")
    run = a_run(**ALONE, trackers=["tensorboard"])
    solo(run)
    events = list((Path(run.storage) / "r/tensorboard").glob("events.*"))
    assert len(events) == 1 and b"loss" in events[0].read_bytes()


def test_run_json_is_plain_json(a_run):
    run = a_run(**ALONE)
    solo(run)
    data = json.loads((Path(run.storage) / "r/run.json").read_text())
    assert data["config"]["scale"]["workers"] == 0
