"""Storm 3: sweeps whose driver, pack, trial placer or whole process tree is killed.

No finished trial is lost or changed, every other one continues, and each trial's numbers are those
of an unbroken sweep (to 1e-5: who shares a pack's step with whom changes the order of sums).
"""

from __future__ import annotations

import contextlib
import math
import os
import random
import signal
import time
from typing import Any

from commands import Command, below
from lab import Lab, Place, shared_memory, until
from tally import Case
from workers import judge_processes

from rayft.records.ledger import LedgerReport, LedgerTrial, read_ledger
from rayft.storage.folder import Storage

CASES = 12
PLAN = ("driver", "pack", "placer", "tree", "GCS", "SIGTERM")
NAMES = {
    "pack": r"ray::PackActor",
    "placer": r"ray::TrialPlacer",
    "GCS": "gcs_server",
}
BLOCK = {
    "trials": 6,
    "space": {
        "methods.0.rank": {"choice": [2, 4, 8]},
        "optim.lr": {"loguniform": [1e-4, 1e-2]},
    },
    "search": "random",
    "scheduler": "none",
    "packs": 2,
    "slots": 1,  # fewer slots than trials: some are over while others have not begun
}
TRAIN = {"steps": 24, "eval_every": 4, "global_batch": 4, "eval_batch": 8}
EQUAL = 1e-5  # relative
WAIT = 300.0


def prepare(lab: Lab) -> None:
    """The unbroken sweep."""
    place = _place(lab, "twin-sweep", "s99")
    command = _start(place)
    if command.wait(WAIT) != 0:
        raise RuntimeError(f"the unbroken sweep failed:\n{command.text()}")
    lab.notes["trials"] = _trials(place)


def _place(lab: Lab, name: str, short: str) -> Place:
    place = Place(lab.folder / name, lab.commands, fresh=True)
    (place.folder / "tmp").mkdir(parents=True)
    ray = lab.folder / short  # Unix sockets with long names lie below
    ray.mkdir()
    place.env = {
        "RAY_TMPDIR": str(ray),
        "RAY_gcs_rpc_server_reconnect_timeout_s": "5",
        "RAYFT_DASHBOARD": "1",
    }
    method = {"kind": "lora", "rank": 4, "alpha": 8}
    scale = {"workers": 1, "gpus": 0, "cpus": 1}
    place.configure(
        lab.config(
            "lora", str(place.storage), train=TRAIN, methods=[method], scale=scale, sweep=BLOCK
        )
    )
    return place


def _start(place: Place) -> Command:
    return place.rayft("sweep", str(place.folder / "config.json"))


def _trials(place: Place) -> dict[str, LedgerTrial]:
    return read_ledger(Storage.open(str(place.home))).trials


def _told(place: Place) -> int:
    """Reports in the ledger so far."""
    return sum(len(trial.reports) for trial in _trials(place).values())


def run(case: Case, lab: Lab) -> None:
    """One of PLAN, by the case's number."""
    what, rng, memory = PLAN[case.number % len(PLAN)], lab.rng(case), shared_memory()
    place = _place(lab, case.name, f"s{case.number}")
    command = _start(place)
    goal = rng.randint(1, 24)
    until(lambda: _told(place) >= goal or command.poll() is not None, WAIT, every=0.1)
    over = {name: trial for name, trial in _trials(place).items() if trial.over}
    told = _told(place)
    case.faults[what] += 1
    moment = _inject(command, what, rng)
    where = f"{place.folder}: {what} after {told} reports, {len(over)} trials over"
    if what != "pack":
        until(lambda: command.poll() is not None, 200, every=0.2)
        code = command.wait(1.0)
        wanted = {"driver": (-9,), "tree": (-9,), "SIGTERM": (75,)}.get(what, (0, 1, 75))
        case.check("ends as its fault says", code in wanted, f"{where}: {code}\n{command.text()}")
        kept = {name: trial for name, trial in _trials(place).items() if name in over}
        case.check("no finished trial is lost", kept == over, where)
        if code != 0:
            moment, told = time.monotonic(), _told(place)
            command = _start(place)
    if until(lambda: _told(place) > told or command.poll() is not None, WAIT, every=0.1):
        case.again.append(time.monotonic() - moment)
    code = command.wait(WAIT)
    if case.check("the sweep ends well", code == 0, f"{where}: {code}\n{command.text()[-3000:]}"):
        _judge(case, lab, place, over, where)
    judge_processes(case, place, memory)
    if not case.broken:
        place.remove()


def _inject(command: Command, what: str, rng: random.Random) -> float:
    """Kill; when."""
    moment = time.monotonic()
    if what == "tree":
        command.kill_all()
    elif what == "driver":
        command.kill()
    elif what == "SIGTERM":
        command.kill(signal.SIGTERM)
    else:
        found = below(command.pid, NAMES[what])
        if not found and command.poll() is None:
            raise RuntimeError(f"no process for {what} below {command.pid}")
        for pid in [rng.choice(found)] if what == "pack" and found else found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    return moment


def _loss(*reports: LedgerReport) -> list[float]:
    """The metric of each; NaN, which equals nothing, where it is missing."""
    return [report.metrics.get("eval_loss", math.nan) for report in reports]


def _judge(case: Case, lab: Lab, place: Place, over: dict[str, LedgerTrial], where: str) -> None:
    """The finished sweep against the unbroken one."""
    trials = _trials(place)
    kept = {name: trial for name, trial in trials.items() if name in over}
    case.check("no finished trial is lost", kept == over, where)
    whole: dict[str, Any] = lab.notes["trials"]
    case.check(
        "every trial ends",
        {n: t.status for n, t in trials.items()} == {n: t.status for n, t in whole.items()},
        where,
    )
    wrong = [
        f"{name}: {_loss(mine)}, not {_loss(right)}"
        for name, trial in trials.items()
        if name in whole
        for mine, right in zip(trial.reports, whole[name].reports, strict=False)
        if mine.step != right.step or not math.isclose(*_loss(mine, right), rel_tol=EQUAL)
    ]
    short = [
        name
        for name in whole
        if name not in trials or len(trials[name].reports) != len(whole[name].reports)
    ]
    case.check(
        "each trial's numbers as in an unbroken sweep",
        not wrong and not short,
        f"{where}: {wrong[:3]} {short}",
    )
    files = [
        name
        for name in ("report.html", "trials.csv", "best/export/adapter_model.safetensors")
        if not (place.home / name).exists()
    ]
    case.check("report and best are there", not files, f"{where}: missing {files}")
    place.judge_leftovers(case)
