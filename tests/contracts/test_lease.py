"""One driver per folder: real processes, killed, stopped, and several at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from rayft.core.errors import InUseError, RayftError
from rayft.core.process import started
from rayft.storage import lease as leases
from rayft.storage.folder import Storage
from rayft.storage.lease import LEASE, Lease, LeaseHolder
from tests.contracts.s3 import s3_server

HOLD = """
import sys, time
from pathlib import Path
from rayft.storage import lease
from rayft.core.errors import InUseError
from rayft.storage.folder import Storage

lease.RENEW = 0.1
folder, mark = sys.argv[1], Path(sys.argv[2])
try:
    with lease.Lease.held(Storage.open(folder)) as held:
        mark.write_text("held")
        while mark.exists() and not held.lost:
            time.sleep(0.02)
        print("lost" if held.lost else "done")
except InUseError as error:
    print(error)
    sys.exit(error.exit_code)
"""

Start = Callable[..., tuple[subprocess.Popen[str], Path]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts processes that hold a lease until their mark is deleted."""
    running: list[subprocess.Popen[str]] = []

    def begin(folder: str, wait: bool = True) -> tuple[subprocess.Popen[str], Path]:
        mark = tmp_path / f"mark-{len(running)}"
        command = [sys.executable, "-c", HOLD, folder, str(mark)]
        running.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        if wait:
            until(lambda: mark.exists() or running[-1].poll() is not None)
        return running[-1], mark

    yield begin
    for process in running:
        process.kill()
        process.wait()


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


def told(folder: Path) -> dict[str, object]:
    return json.loads((folder / LEASE).read_text())


def elsewhere(folder: Path, **changes: object) -> LeaseHolder:
    """A lease whose holder cannot be seen from here."""
    holder = replace(LeaseHolder.here(), machine="another", host="far", pid=1, **changes)
    folder.mkdir(exist_ok=True)
    (folder / LEASE).write_text(json.dumps(asdict(holder)))
    return holder


def test_a_second_driver_is_refused_at_once_and_the_first_goes_on(
    tmp_path: Path, start: Start
) -> None:
    folder = tmp_path / "run"
    first, mark = start(str(folder))
    began = time.monotonic()
    with pytest.raises(InUseError) as caught, Lease.held(Storage.open(str(folder))):
        raise AssertionError("held twice")
    assert time.monotonic() - began < leases.PATIENCE / 2
    assert f"process {first.pid} on {told(folder)['host']}" in caught.value.what
    assert caught.value.exit_code == 1
    counter = told(folder)["counter"]
    until(lambda: told(folder)["counter"] != counter)  # it is renewed
    mark.unlink()
    assert first.communicate(timeout=20)[0] == "done\n"
    assert not folder.exists()  # nothing was written but the lease
    with Lease.held(Storage.open(str(folder))) as mine:
        assert not mine.lost


def test_a_killed_holder_is_followed_at_once(tmp_path: Path, start: Start) -> None:
    folder = tmp_path / "run"
    first, _ = start(str(folder))
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert told(folder)["pid"] == first.pid
    began = time.monotonic()
    with Lease.held(Storage.open(str(folder))):
        assert time.monotonic() - began < leases.PATIENCE / 2
        assert told(folder)["pid"] == os.getpid()
        (folder / "kept").touch()
    assert not (folder / LEASE).exists() and (folder / "kept").exists()


def test_a_pid_used_again_is_not_taken_for_the_holder() -> None:
    mine = LeaseHolder.here()
    assert mine.alive is True
    assert replace(mine, started="1").alive is False
    assert replace(mine, pid=2**22 + 1).alive is False
    assert replace(mine, machine="another").alive is None
    assert replace(mine, machine="").alive is None


def test_a_zombie_holds_nothing() -> None:
    child = subprocess.Popen(["sleep", "60"])
    holder = replace(LeaseHolder.here(), pid=child.pid, started=started(child.pid))
    assert holder.alive is True
    child.kill()
    until(lambda: holder.alive is False)  # not waited for: still in the process table
    child.wait()


def test_a_holder_elsewhere_is_watched_by_its_counter_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "PATIENCE", 0.6)
    folder = tmp_path / "run"
    elsewhere(folder)
    began = time.monotonic()
    with Lease.held(Storage.open(str(folder))):
        assert time.monotonic() - began >= 0.6  # it stood still all that time

    living = elsewhere(folder)
    stop = threading.Event()

    def renew() -> None:
        while not stop.wait(0.1):
            now = replace(living, counter=told(folder)["counter"] + 1)
            Storage.open(str(folder)).write_text(LEASE, json.dumps(asdict(now)))

    other = threading.Thread(target=renew)
    other.start()
    try:
        with (
            pytest.raises(InUseError, match="process 1 on far"),
            Lease.held(Storage.open(str(folder))),
        ):
            raise AssertionError("taken from a living driver")
    finally:
        stop.set()
        other.join()


def test_of_many_at_once_exactly_one_holds(tmp_path: Path, start: Start) -> None:
    folder = tmp_path / "run"
    both = [start(str(folder), wait=False) for _ in range(4)]
    until(lambda: sum(process.poll() is not None for process, _ in both) == 3)
    winner = next(process for process, _ in both if process.poll() is None)
    until(lambda: any(mark.exists() for _, mark in both))
    assert told(folder)["pid"] == winner.pid
    for process, _ in both:
        if process is not winner:
            assert process.returncode == 1
            assert "has another driver: process" in process.communicate()[0]


def test_whoever_was_taken_over_is_told_and_deletes_nothing(
    tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    first, mark = start(str(folder))
    successor = elsewhere(folder)
    assert first.communicate(timeout=20)[0] == "lost\n" and mark.exists()
    assert told(folder)["id"] == successor.id

    monkeypatch.setattr(leases, "RENEW", 0.05)
    calls: list[str] = []
    folder = tmp_path / "other"
    with Lease.held(Storage.open(str(folder)), lambda: calls.append("lost")) as mine:
        assert not mine.lost
        (folder / LEASE).unlink()  # taken over, and ended since
        until(lambda: mine.lost)
    assert calls == ["lost"]


def test_a_damaged_lease_blocks_nobody(tmp_path: Path) -> None:
    (tmp_path / LEASE).write_text('{"id": 3')
    with Lease.held(Storage.open(str(tmp_path))):
        assert told(tmp_path)["pid"] == os.getpid()


def test_on_an_object_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "RENEW", 0.05)
    with s3_server() as uri:
        storage = Storage.open(uri.format("lease/run"))
        with Lease.held(storage):
            began = json.loads(storage.read_text(LEASE))["counter"]
            with pytest.raises(InUseError, match=f"process {os.getpid()}"), Lease.held(storage):
                raise AssertionError("held twice")
            until(lambda: json.loads(storage.read_text(LEASE))["counter"] > began)
        assert not storage.exists(LEASE)


@pytest.mark.parametrize(
    ("damage", "error", "said"),
    [
        (None, InUseError, "another driver took over .*: process 1 on far"),
        ("", RayftError, "driver.lease was deleted"),
        ('{"id": 3', RayftError, "driver.lease is damaged"),
    ],
    ids=["taken", "deleted", "damaged"],
)
def test_why_it_was_lost_is_told_apart_and_seen_before_a_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str | None, error: type, said: str
) -> None:
    """Without waiting for the next renewal where somebody asks, or did not look for long."""
    monkeypatch.setattr(leases, "RENEW", 60.0)
    calls: list[str] = []
    for now in (True, False):
        with Lease.held(Storage.open(str(tmp_path)), lambda: calls.append("lost")) as mine:
            mine.check(now=True)
            if damage is None:
                elsewhere(tmp_path)
            elif damage:
                (tmp_path / LEASE).write_text(damage)
            else:
                (tmp_path / LEASE).unlink()
            mine.check()  # it has just looked
            if not now:
                mine._looked -= 121  # it was suspended
            assert not mine.lost
            for _ in range(2):
                with pytest.raises(error, match=said) as caught:
                    mine.check(now)
            assert mine.lost and caught.value.exit_code == 1 and type(caught.value) is error
        (tmp_path / LEASE).unlink(missing_ok=True)
    assert calls == ["lost"] * 2


def test_hosts_of_a_driver_that_stands_still_learn_of_its_successor(tmp_path: Path) -> None:
    storage = Storage.open(str(tmp_path))
    with Lease.held(storage) as mine:
        assert not leases.superseded(storage, mine.id)
        elsewhere(tmp_path)
        assert leases.superseded(storage, mine.id)
        for nothing in ("", "{"):  # for the driver to judge
            (tmp_path / LEASE).write_text(nothing)
            assert not leases.superseded(storage, mine.id)
