"""rayft's own engine under Ray Train: config to export, and exactly the same through kill -9."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import faulty
import pytest

from rayft.config.run import Run
from rayft.runtime.cluster import connected
from rayft.runtime.train import train

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

CASES = {
    "full-zero3": {"methods": [{"kind": "full"}], "strategy": "zero3"},
    "qlora-zero2": {
        "model": {"path": "builtin:tiny", "quant": "nf4"},
        "methods": [{"kind": "lora", "rank": 8, "dropout": 0.1, "lr_ratio": 16}],
        "strategy": "zero2",
    },
}


@pytest.fixture(scope="module")
def cluster(quiet):
    with connected():
        yield


def config(storage, case, **changes):
    return Run.model_validate(
        {
            "name": "r",
            "storage": str(storage),
            "model": {"path": "builtin:tiny"},
            "data": {
                "train": [{"path": "builtin:docstrings", "samples": 64}],
                "eval": [{"path": "builtin:docstrings", "samples": 8}],
                "max_length": 96,
            },
            "optim": {"lr": 1e-3, "warmup": 2},
            "train": {"steps": 10, "save_every": 3, "global_batch": 4, "micro_batch": 1},
            "scale": {"workers": 2, "gpus": 0, "retries": 5},
        }
        | CASES[case]
        | changes
    )


def series(storage):
    """{(split, step): loss}; of a step logged again, the later line."""
    lines = (Path(storage) / "r/metrics.jsonl").read_text().splitlines()
    return {(one["split"], one["step"]): one["loss"] for one in map(json.loads, lines)}


def exported(storage):
    """Bytes of the exported weights."""
    return next((Path(storage) / "r/export").glob("*.safetensors")).read_bytes()


def same(one, other):
    """Every step's loss, every evaluation and every exported weight, to the last bit."""
    assert series(one) == series(other)
    assert {step for split, step in series(one) if split == "train"} == {*range(1, 11)}
    assert exported(one) == exported(other)


@pytest.mark.parametrize("case", CASES)
def test_killed_workers_change_nothing(tmp_path, cluster, case):
    """Rank 0 dies before the first save, rank 1 after one, then both at once."""
    whole = train(config(tmp_path / "whole", case))
    killed = train(config(tmp_path / "killed", case), engine=faulty.execute)
    assert (whole.status, whole.attempts) == ("done", 1)
    assert (killed.status, killed.attempts) == ("done", 4)
    assert killed.eval == whole.eval and killed.base == whole.base
    assert killed.tokens == whole.tokens and killed.best.step == whole.best.step
    same(tmp_path / "whole", tmp_path / "killed")


def command(run, folder):
    """`rayft train CONFIG` as a user types it; its own process."""
    file = Path(folder) / "config.json"
    file.write_text(json.dumps(run.resolved()))
    return subprocess.Popen(
        [sys.executable, "-m", "rayft", "train", str(file)],
        env=os.environ | {"RAYFT_DASHBOARD": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_killed_driver_changes_nothing(tmp_path, quiet):
    """kill -9 of the command after a commit; the same command finishes the run."""
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    done = command(config(tmp_path / "whole", "qlora-zero2"), tmp_path / "whole")
    out, said = done.communicate(timeout=200)
    assert done.returncode == 0, said
    run = config(tmp_path / "killed", "qlora-zero2")
    driver = command(run, tmp_path / "killed")
    end = time.monotonic() + 200
    while not list(tmp_path.glob("killed/r/checkpoints/step-3-*/COMMIT.json")):
        assert time.monotonic() < end and driver.poll() is None, "no commit came"
        time.sleep(0.02)
    driver.send_signal(signal.SIGKILL)
    driver.communicate(timeout=30)
    driver = command(run, tmp_path / "killed")
    _, said = driver.communicate(timeout=200)
    assert driver.returncode == 0, said
    same(tmp_path / "whole", tmp_path / "killed")


def test_a_lora_run_continues_on_another_number_of_workers(tmp_path, cluster):
    """Stopped at 2 workers, finished with 1: the same losses to fp32 rounding."""
    whole = train(config(tmp_path / "whole", "qlora-zero2", methods=[{"kind": "lora", "rank": 4}]))
    changes = {"methods": [{"kind": "lora", "rank": 4}]}
    first = config(tmp_path / "other", "qlora-zero2", **changes)
    with pytest.raises(Exception, match="died|killed|failed"):
        # no retries: the first attempt's death ends the command
        train(
            first.model_copy(update={"scale": first.scale.model_copy(update={"retries": 0})}),
            engine=faulty.die_late,
        )
    alone = first.model_copy(update={"scale": first.scale.model_copy(update={"workers": 1})})
    record = train(alone)
    assert (whole.status, record.status) == ("done", "done")
    one, other = series(tmp_path / "whole"), series(tmp_path / "other")
    assert one.keys() == other.keys()
    assert [other[key] for key in one] == pytest.approx([one[key] for key in one], rel=1e-5)
