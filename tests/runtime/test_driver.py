"""The driver process itself: signals, kill -9, a cluster it joined, two nodes."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util import list_named_actors, placement_group_table

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]
DRIVER = str(Path(__file__).parent / "driver.py")
LONG = {"train": {"steps": 2000, "save_every": 10}}


@pytest.fixture
def start(quiet):
    """Starts drivers; ends those that a failed test leaves behind."""
    running = []

    def begin(run, **env):
        running.append(_popen(run, env))
        return running[-1]

    yield begin
    for driver in running:
        if driver.poll() is None:
            driver.kill()
            driver.communicate()


def _popen(run, env):
    return subprocess.Popen(
        [sys.executable, DRIVER, run.model_dump_json()],
        env=os.environ | env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def until(condition, seconds):
    """Wait for an outside fact, with a deadline."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.1)


def status(run):
    return json.loads((Path(run.storage) / run.name / "run.json").read_text())["status"]


def committed(run):
    path = Path(run.storage) / "work/step"
    return int(path.read_text()) if path.exists() else 0


def alive(run):
    pids = [int(path.read_text()) for path in (Path(run.storage) / "work").glob("pid-*")]
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def test_a_signal_saves_and_stops(a_run, start):
    run = a_run(**LONG)
    driver = start(run)
    until(lambda: committed(run) >= 10, 100)
    driver.send_signal(signal.SIGTERM)
    _, said = driver.communicate(timeout=60)
    assert driver.returncode == 75, said
    step = committed(run)
    assert f"saved at step {step} of 2000" in said and status(run) == "interrupted"
    assert not alive(run)


def test_a_killed_driver_leaves_nothing_and_the_same_command_continues(a_run, start, two_nodes):
    run = a_run(**LONG)
    driver = start(run, RAY_ADDRESS=two_nodes)
    until(lambda: committed(run) >= 10, 100)
    driver.kill()
    driver.communicate(timeout=10)
    until(lambda: not alive(run), 60)
    assert status(run) == "running"
    ray.init(address=two_nodes)
    try:
        until(lambda: not [n for n in list_named_actors(all_namespaces=True)
                           if n["name"].startswith("rayft")], 30)  # fmt: skip
        until(
            lambda: {g["state"] for g in placement_group_table().values()} <= {"REMOVED"},
            60,
        )
    finally:
        ray.shutdown()
    (Path(run.storage) / "work/step").write_text("1990")
    driver = start(run, RAY_ADDRESS=two_nodes)
    out, said = driver.communicate(timeout=100)
    assert driver.returncode == 0 and out.strip() == "done", said


def free_port() -> int:
    """A port nobody listens on now: other tests' clusters may hold the usual one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def two_nodes(quiet):
    """Address of a cluster of two one-CPU nodes (and a head without CPUs) with a dashboard, which
    frees what dead drivers held."""
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "include_dashboard": True, "dashboard_port": free_port()},
    )
    for _ in range(2):
        cluster.add_node(num_cpus=2, object_store_memory=80 * 2**20)
    cluster.wait_for_nodes()
    yield cluster.address
    cluster.shutdown()


def test_infeasible_is_exit_4(a_run, start):
    driver = start(a_run(scale={"workers": 2, "cpus": 999, "gpus": 0}))
    _, said = driver.communicate(timeout=60)
    assert driver.returncode == 4 and "infeasible: 2 workers of 999 CPU" in said
    assert len(said.splitlines()) <= 15
