"""Storm 2: two workers on Ray; SIGKILL of one, of both, of the driver, of a node, of the GCS.

A killed worker or node costs a restart from the last commit inside the same command; a killed
driver or GCS ends the command, and the same command continues. Bits as uninterrupted.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from commands import Command, below, processes
from lab import Lab, Place, added, committed, evidence, lines, record, shared_memory, trained, until
from tally import Case

CASES = 15
PLAN = ("worker", "driver", "both workers", "GCS", "node")
TRAIN = {"steps": 240, "save_every": 3, "eval_every": 30, "global_batch": 4, "micro_batch": 2}
WORKER = r"ray::.*RayTrainWorker"
STARTED = re.compile(r"^step (\d+) +of ", re.MULTILINE)
LIMITS = {"worker": 20.0, "both workers": 20.0, "driver": 40.0, "node": 60.0, "GCS": 60.0}
WAIT = 180.0


def prepare(lab: Lab) -> None:
    """The uninterrupted run, on two workers."""
    place = _place(lab, "twin-two", "w99")
    command = place.train()
    if command.wait(300) != 0:
        raise RuntimeError(f"the uninterrupted run failed:\n{command.text()}")
    lab.twins["two"] = evidence(str(place.home))


def _place(lab: Lab, name: str, short: str) -> Place:
    place = Place(lab.folder / name, lab.commands, fresh=True)
    (place.folder / "tmp").mkdir(parents=True)
    ray = lab.folder / short  # Unix sockets with long names lie below
    ray.mkdir()
    place.env = {"RAY_TMPDIR": str(ray), "RAY_gcs_rpc_server_reconnect_timeout_s": "5"}
    scale = {"workers": 2, "gpus": 0, "retries": 5}
    place.configure(lab.config("lora", str(place.storage), train=TRAIN, scale=scale))
    return place


def run(case: Case, lab: Lab) -> None:
    """One of PLAN, by the case's number."""
    what, rng, memory = PLAN[case.number % len(PLAN)], lab.rng(case), shared_memory()
    place = _place(lab, case.name, f"w{case.number}")
    with _nodes(place) if what == "node" else contextlib.nullcontext() as nodes:
        command = place.train()
        goal = rng.randint(4, 40)
        if not until(
            lambda: (
                (STARTED.search(command.text()) and len(trained(lines(place.home))) >= goal)
                or command.poll() is not None
            ),
            WAIT,
        ):
            raise RuntimeError(f"no training began: {command.text()}")
        case.faults[what] += 1
        if what in ("driver", "GCS"):
            command = _new_command(case, place, command, what)
        else:
            _same_command(case, place, command, what, nodes)
        code = command.wait()
    where = f"{place.folder}: {what} after {goal} steps"
    if case.check("the run ends well", code == 0, f"{where}: {code}\n{command.text()[-3000:]}"):
        differs = evidence(str(place.home)).differs(lab.twins["two"])
        case.check("the same bits as uninterrupted", not differs, f"{where}: {differs}")
        place.judge_leftovers(case)
    judge_processes(case, place, memory)
    if not case.broken:
        place.remove()


def _same_command(case: Case, place: Place, command: Command, what: str, nodes: int | None) -> None:
    """What dies is replaced while the driver lives."""
    root = nodes or command.pid
    workers = below(root, WORKER)
    starts, commit = len(STARTED.findall(command.text())), committed(place.home)
    if what == "node":  # its raylet, and with it at once all that runs there
        known = processes()
        raylets = [known[pid]["parent"] for pid in workers[:1]]
        raylets = [pid for pid in raylets if "raylet/raylet" in known[pid]["name"]]
        doomed = [pid for raylet in raylets for pid in (raylet, *below(raylet))]
    else:
        doomed = workers if what == "both workers" else workers[:1]
    if not doomed:
        raise RuntimeError(f"no process to kill for {what}: {below(root)}")
    moment = time.monotonic()
    for pid in doomed:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    until(lambda: len(STARTED.findall(command.text())) > starts or command.poll() is not None, WAIT)
    before = lines(place.home)
    until(lambda: _new(place, before) or command.poll() is not None, WAIT)
    if command.poll() is None:
        _judge_again(case, place, what, time.monotonic() - moment)
    begins = STARTED.findall(command.text())
    if command.poll() == 0 and len(begins) == starts:
        raise RuntimeError("the run ended before it noticed; give it more steps")
    if len(begins) > starts:
        first = int(begins[-1])
        case.twice.append(max([0, *trained(before)]) - first)
        case.check(
            "continues from the last commit",
            first >= commit,
            f"{place.folder}: {what}: from {first}, the last commit was {commit}",
        )


def _new_command(case: Case, place: Place, command: Command, what: str) -> Command:
    """What dies takes the command with it; the same command continues."""
    where = f"{place.folder}: {what}"
    if what == "driver":
        command.kill()
    else:
        for pid in below(command.pid, "gcs_server"):
            os.kill(pid, signal.SIGKILL)
    code = command.wait()
    if what == "GCS":
        said, status = command.text(), record(place.home).get("status")
        own = code == 75 and "Traceback" not in said and "(GCS) is gone" in said
        case.check("a lost GCS is told in rayft's words", own, f"{where}: {code}\n{said[-3000:]}")
        case.check("run.json does not say running", status != "running", f"{where}: {status}")
    commit, far = committed(place.home), max([0, *trained(lines(place.home))])
    case.twice.append(far - commit)
    command = place.train()
    until(lambda: STARTED.search(command.text()) or command.poll() is not None, WAIT)
    before = lines(place.home)  # only now: workers outlive their driver by some steps
    until(lambda: _new(place, before) or command.poll() is not None, WAIT)
    if command.poll() is None:
        _judge_again(case, place, what, time.monotonic() - command.began)
    first = [int(step) for step in STARTED.findall(command.text())]
    case.check(
        "continues from the last commit",
        first != [] and first[0] >= commit,
        f"{where}: from {first}, the last commit was {commit}",
    )
    return command


def _new(place: Place, before: list[bytes]) -> list[int]:
    """The steps trained since; the log loses what lies behind the last commit before it grows."""
    return trained(added(before, lines(place.home)))


def _judge_again(case: Case, place: Place, what: str, seconds: float) -> None:
    case.again.append(seconds)
    limit = LIMITS[what]
    case.check(
        f"training again in {limit:.0f} s ({what})",
        seconds <= limit,
        f"{place.folder}: {seconds:.1f} s",
    )


def judge_processes(case: Case, place: Place, memory: set[str]) -> None:
    """Nothing that the place's commands started is alive, and /dev/shm is as it was."""
    mark = f"={place.env['RAY_TMPDIR']}\0".encode()

    def alive() -> list[str]:
        found = []
        for pid, facts in processes().items():
            with contextlib.suppress(OSError):
                if mark in Path(f"/proc/{pid}/environ").read_bytes():
                    found.append(f"{pid} {facts['name'][:80]}")
        return found

    until(lambda: not alive(), 60, every=0.5)
    left = alive()
    case.check("no process is left", not left, f"{place.folder}: {left}")
    case.left += left
    case.left += [f"/dev/shm/{name}" for name in shared_memory() - memory]


@contextlib.contextmanager
def _nodes(place: Place) -> Iterator[int]:
    """Two nodes of two CPUs beside a head without any, in a process of their own; its pid."""
    argv = [sys.executable, str(Path(__file__).parent / "nodes.py")]
    made = subprocess.Popen(
        argv,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | place.env,
    )
    try:
        address = made.stdout.readline().strip()
        if not address:
            raise RuntimeError("the cluster did not start")
        place.env["RAY_ADDRESS"] = address
        yield made.pid
    finally:
        made.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            made.wait(40)
        for pid in [*below(made.pid), made.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        made.wait()
