"""Ray's control process (GCS) goes away under a run."""

import json
import socket
import threading
import time
from pathlib import Path

import psutil
import pytest
from test_driver import LONG, committed, start, status, until

from rayft.cluster.gcs_watch import GcsWatch, patience
from rayft.cluster.interrupt import Interrupt
from rayft.core.errors import ClusterLostError, InterruptedRun
from rayft.core.process import started

__all__ = ["start"]  # a fixture


def listening(port=0):
    """Something that accepts connections, as a GCS does."""
    server = socket.socket()
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    server.bind(("127.0.0.1", port))
    server.listen(50)
    return server, server.getsockname()[1]


def test_a_gcs_that_is_gone_ends_the_run_and_one_that_comes_back_does_not():
    server, port = listening()
    gone, patient = Interrupt(), Interrupt()
    short = GcsWatch(f"127.0.0.1:{port}", gone, 1.0)
    long = GcsWatch(f"127.0.0.1:{port}", patient, 60.0)
    try:
        short.settle()
        assert not gone.asked
        server.close()
        until(lambda: gone.forced, 20)
        assert short.lost and gone.cut_off
        with pytest.raises(ClusterLostError, match="is gone; what was committed is kept") as info:
            gone.check()
        assert info.value.exit_code == 75 and str(port) in info.value.where
        with pytest.raises(ClusterLostError):
            short.settle()
        waiting = threading.Thread(target=long.settle)
        waiting.start()
        server, _ = listening(port)
        waiting.join(20)
        assert not waiting.is_alive() and not patient.asked and not patient.cut_off
        patient.notice(2, None)
        with pytest.raises(InterruptedRun, match="nothing is lost"):
            long.settle()
    finally:
        short.end()
        long.end()
        server.close()


def test_more_patience_with_a_cluster_that_somebody_else_looks_after(monkeypatch):
    monkeypatch.delenv("RAY_gcs_rpc_server_reconnect_timeout_s", raising=False)
    assert patience(own=True) == 3 and patience(own=False) == 36
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "300")
    assert patience(own=False) == 180


def recorded(run):
    return json.loads((Path(run.storage) / run.name / "run.json").read_text())


@pytest.mark.ray
@pytest.mark.timeout(200)
def test_a_killed_gcs_is_told_and_the_run_is_not_left_running(a_run, start):
    run = a_run(**LONG)
    driver = start(run)
    until(lambda: committed(run) >= 10 and recorded(run)["steps"] >= 10, 100)
    children = psutil.Process(driver.pid).children(recursive=True)
    (gcs,) = [child for child in children if child.name() == "gcs_server"]
    began = time.monotonic()
    gcs.kill()
    _, said = driver.communicate(timeout=60)
    assert time.monotonic() - began < 45  # Ray itself takes a minute, and leaves with its own words
    assert driver.returncode == 75, said
    assert "interrupted: Ray's control process (GCS) is gone" in said and "Traceback" not in said
    assert status(run) == "interrupted"
    record = recorded(run)
    assert "(GCS) is gone" in record["error"] and record["steps"] >= 10
    until(lambda: not any(started(child.pid) for child in children), 10)
