"""One driver per run: a second one is refused, one that was taken over writes nothing more."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from rayft.storage.lease import LEASE, LeaseHolder

pytestmark = pytest.mark.timeout(120)
DRIVER = str(Path(__file__).parent / "driver.py")
LONG = {
    "scale": {"workers": 0, "gpus": 0},
    "train": {"steps": 4000, "save_every": 2},
}


@pytest.fixture
def start(quiet):
    running = []

    def begin(run):
        command = [sys.executable, DRIVER, run.model_dump_json()]
        pipe = subprocess.PIPE
        running.append(subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True))
        return running[-1]

    yield begin
    for driver in running:
        driver.kill()
        driver.wait()


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def committed(run):
    path = Path(run.storage) / "work/step"
    return int(path.read_text()) if path.exists() else 0


def take_lease(file, text):
    """Write it (None: delete it), again where a renewal that was under way came after it."""
    since = time.monotonic()
    while time.monotonic() - since < 0.5:
        if (file.read_text() if file.exists() else None) != text:
            if text is None:
                file.unlink()
            else:
                other = file.with_suffix(".other")
                other.write_text(text)
                other.replace(file)  # whole at once, as storage writes it
            since = time.monotonic()
        time.sleep(0.01)


def record(run):
    return json.loads((Path(run.storage) / run.name / "run.json").read_text())


def test_a_second_driver_is_refused_and_follows_a_killed_one(a_run, start):
    run = a_run(**LONG)
    first = start(run)
    until(lambda: committed(run) >= 2)
    second = start(run)
    _, said = second.communicate(timeout=60)
    assert second.returncode == 1
    assert f"already running: {run.storage}/r has another driver: process {first.pid} on" in said
    assert len(said.splitlines()) == 2 and first.poll() is None
    assert record(run)["attempts"] == 1

    first.kill()
    first.wait()
    (Path(run.storage) / "work/step").write_text("3996")
    third = start(run)
    assert third.communicate(timeout=60)[0].strip() == "done"
    assert record(run)["attempts"] == 2
    assert not (Path(run.storage) / "r" / LEASE).exists()


def test_a_driver_that_was_taken_over_stops_and_writes_nothing_more(a_run, start):
    run = a_run(**LONG)
    first = start(run)
    until(lambda: committed(run) >= 2)
    home = Path(run.storage) / "r"
    take_lease(home / LEASE, json.dumps(asdict(replace(LeaseHolder.here(), pid=os.getpid()))))
    _, said = first.communicate(timeout=60)
    assert first.returncode == 1 and f"another driver took over {home}" in said
    assert record(run)["status"] == "running"  # what the other one's record says is its business
    assert (home / LEASE).exists()


@pytest.mark.parametrize(("damage", "said"), [("", "was deleted"), ("{", "is damaged")])
def test_without_its_lease_a_driver_stops_and_the_same_command_goes_on(a_run, start, damage, said):
    """Another one may have taken it for free: nobody can tell any more."""
    run = a_run(**LONG)
    first = start(run)
    until(lambda: committed(run) >= 2)
    lease = Path(run.storage) / "r" / LEASE
    take_lease(lease, damage or None)
    text = first.communicate(timeout=60)[1]
    assert first.returncode == 1 and f"{lease} {said}" in text and "the same command" in text
    assert (
        text.splitlines()[-3].startswith("error: stopped: ") and record(run)["status"] == "running"
    )
    (Path(run.storage) / "work/step").write_text("3996")
    second = start(run)
    assert second.communicate(timeout=60)[0].strip() == "done"
    assert record(run)["attempts"] == 2


def test_a_signal_gives_the_lease_back(a_run, start):
    run = a_run(**LONG)
    first = start(run)
    until(lambda: committed(run) >= 2)
    assert (Path(run.storage) / "r" / LEASE).exists()
    first.send_signal(signal.SIGTERM)
    first.communicate(timeout=60)
    assert first.returncode == 75
    assert not (Path(run.storage) / "r" / LEASE).exists()
