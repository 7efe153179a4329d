"""`ray job submit -- rayft train CONFIG` on a cluster that was there before, as users type it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from rayft.records.run_record import RunRecord

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]
ROOT = Path(__file__).parents[2]
RAY = str(Path(sys.executable).parent / "ray")


def free_port() -> int:
    """A port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def head(quiet, tmp_path):
    """Address of the job server of a one-node cluster with its own ports and folder."""
    port, dashboard = free_port(), free_port()
    folder = os.environ["RAY_TMPDIR"] + "/job"
    with (tmp_path / "head.log").open("w") as log:
        process = subprocess.Popen(
            [RAY, "start", "--head", "--block", f"--port={port}", "--num-cpus=3",
             f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={free_port()}",
             f"--temp-dir={folder}", "--disable-usage-stats",
             "--object-store-memory=100000000", "--node-ip-address=127.0.0.1"],
            stdout=log, stderr=log, start_new_session=True,
            env=os.environ | {"PYTHONPATH": f"{ROOT}"},
        )  # fmt: skip
    address = f"http://127.0.0.1:{dashboard}"
    end = time.monotonic() + 90
    while not answers(f"{address}/api/version"):
        assert time.monotonic() < end, (tmp_path / "head.log").read_text()
        time.sleep(0.5)
    yield address
    process.send_signal(signal.SIGTERM)  # `--block` ends the node's processes, then itself
    try:
        process.wait(timeout=90)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def answers(url: str) -> bool:
    """Whether the job server is up."""
    try:
        with urllib.request.urlopen(url, timeout=2) as reply:
            return reply.status == 200
    except OSError:
        return False


def submit(address: str, folder: Path, config: dict) -> subprocess.CompletedProcess[str]:
    """Submit and follow the log, as the command does by itself."""
    (folder / "job").mkdir(exist_ok=True)
    (folder / "job/config.json").write_text(json.dumps(config))
    end = time.monotonic() + 60
    while True:  # the job server answers before the node's agent can take jobs
        done = subprocess.run(
            [RAY, "job", "submit", f"--address={address}", f"--working-dir={folder / 'job'}", "--",
             sys.executable, "-m", "rayft", "train", "config.json"],
            capture_output=True, text=True, check=False, timeout=300,
        )  # fmt: skip
        if "No available agent" not in done.stderr or time.monotonic() > end:
            return done


def test_a_job_trains_on_the_cluster_and_a_bad_one_fails(head, tmp_path):
    config = {
        "name": "job",
        "storage": str(tmp_path / "runs"),
        "model": {"path": "builtin:tiny"},
        "data": {"train": [{"path": "builtin:docstrings", "samples": 32}], "max_length": 96},
        "train": {"steps": 4, "global_batch": 4, "micro_batch": 2},
        "scale": {"workers": 2, "gpus": 0},
    }
    done = submit(head, tmp_path, config)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "joining Ray at" in done.stdout and "step 4/4" in done.stdout
    ours = [line for line in done.stdout.splitlines() if line.startswith(("step", "job:", "  "))]
    assert len(ours) > 4 and not any("\x1b[" in line for line in ours)  # no terminal, no colours
    record = RunRecord.from_json((tmp_path / "runs/job/run.json").read_text())
    assert record.status == "done" and record.steps == 4
    bad = submit(head, tmp_path, config | {"name": "bad", "trian": {}})
    assert bad.returncode != 0
    assert "did you mean 'train'" in bad.stdout.lower() or "train" in bad.stdout
