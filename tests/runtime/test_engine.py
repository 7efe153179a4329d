"""rayft's own engine under Ray Train: config to export, and exactly the same through kill -9."""

import json
import os
import signal
import subprocess
import sys
import time

import faulty
import pytest

from rayft.cluster.connect import connected
from rayft.config.run import Run
from rayft.training.driver import train

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
def whole(quiet, tmp_path_factory):
    """Storage that holds both cases as uninterrupted runs."""
    storage = tmp_path_factory.mktemp("whole")
    with connected():
        for case in CASES:
            record = train(config(storage, case))
            assert record.status == "done"
    return storage


def config(storage, case):
    return Run.model_validate(
        {
            "name": case,
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
    )


def series(storage, case):
    """{(split, step): loss}; of a step logged again, the later line."""
    lines = (storage / case / "metrics.jsonl").read_text().splitlines()
    return {(one["split"], one["step"]): one["loss"] for one in map(json.loads, lines)}


def same(one, other, case):
    """Every step's loss, every evaluation and every exported weight, to the last bit."""
    assert series(one, case) == series(other, case)
    assert {step for split, step in series(one, case) if split == "train"} == {*range(1, 11)}
    weights = [next((s / case / "export").glob("*.safetensors")).read_bytes() for s in (one, other)]
    assert weights[0] == weights[1]
    records = [json.loads((s / case / "run.json").read_text()) for s in (one, other)]
    for fact in ("status", "steps", "tokens", "base", "eval", "data_hash", "config_hash"):
        assert records[0][fact] == records[1][fact], fact


@pytest.mark.parametrize("case", CASES)
def test_killed_workers_change_nothing(tmp_path, whole, case):
    """`faulty.KILLS`: kill -9 before the first save, of one rank, of all ranks."""
    with connected():
        record = train(config(tmp_path, case), engine=faulty.execute)
    assert record.attempts > len(faulty.KILLS[case])
    same(whole, tmp_path, case)


def command(run, folder):
    """`rayft train CONFIG` as a user types it; its own process."""
    file = folder / "config.json"
    file.write_text(json.dumps(run.resolved()))
    return subprocess.Popen(
        [sys.executable, "-m", "rayft", "train", str(file)],
        env=os.environ | {"RAYFT_DASHBOARD": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_killed_driver_changes_nothing(tmp_path, whole):
    """kill -9 of the command after a commit; the same command finishes the run."""
    case = "qlora-zero2"
    run = config(tmp_path, case)
    driver = command(run, tmp_path)
    end = time.monotonic() + 200
    while not list(tmp_path.glob(f"{case}/checkpoints/step-3-*/COMMIT.json")):
        assert time.monotonic() < end and driver.poll() is None, "no commit came"
        time.sleep(0.02)
    driver.send_signal(signal.SIGKILL)
    driver.communicate(timeout=30)
    driver = command(run, tmp_path)
    _, said = driver.communicate(timeout=200)
    assert driver.returncode == 0, said
    same(whole, tmp_path, case)
