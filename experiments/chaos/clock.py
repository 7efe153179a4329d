"""Storm 7: the wall clock steps back and forth under a run, by `clock.c` before libc.

Monotonic time goes on, as it does when an administrator or NTP sets the clock. Promised: nothing is
noticed; durations that rayft tells stay durations, and the bits are the same.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

from lab import Lab, Place, evidence, lines, record, trained, until
from tally import Case

CASES = 8
PLAN = ("back", "forward", "to and fro", "back between kill and restart")
DAY = 86_400
STEPS_OF = {"back": [-DAY], "forward": [30 * DAY], "to and fro": [-3600, 3600] * 4}


def prepare(lab: Lab) -> None:
    """The uninterrupted run."""
    lab.twin("lora")
    library = lab.folder / "clock.so"
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return
    argv = [compiler, "-shared", "-fPIC", "-O2", "-o", str(library)]
    subprocess.run([*argv, str(Path(__file__).with_name("clock.c")), "-ldl"], check=True)
    lab.notes["library"] = str(library)


def run(case: Case, lab: Lab) -> None:
    """One of PLAN, by the case's number."""
    what, place = PLAN[case.number % len(PLAN)], lab.place(case)
    if "library" not in lab.notes:
        case.skipped.append("clock steps: no C compiler here for clock.c")
        return
    place.fresh, clock = True, place.folder / "clock"
    place.env = {"LD_PRELOAD": lab.notes["library"], "CHAOS_CLOCK": str(clock)}
    place.configure(lab.config("lora", str(place.storage)))
    clock.write_text("0")
    command = place.train()
    far = lambda: len(trained(lines(place.home)))  # noqa: E731
    if not until(lambda: far() >= 3 or command.poll() is not None, 120):
        raise RuntimeError(f"no training began: {command.text()}")
    case.faults[what] += 1
    if what in STEPS_OF:
        for step in STEPS_OF[what]:
            clock.write_text(f"{step}")
            seen = far()
            until(lambda seen=seen: far() > seen + 1 or command.poll() is not None, 60)
    else:
        command.kill(signal.SIGKILL)
        command.wait()
        clock.write_text(f"{-400 * DAY}")
        command = place.train()
        before = far()
        if until(lambda: far() > before or command.poll() is not None, 120):
            case.again.append(time.monotonic() - command.began)
    _judge(case, lab, place, command.wait(), what, command.text())
    if not case.broken:
        place.remove()


def _judge(case: Case, lab: Lab, place: Place, code: int, what: str, said: str) -> None:
    where = f"{place.folder}: {what}"
    if not case.check("the run ends well", code == 0, f"{where}: exit {code}\n{said[-2000:]}"):
        return
    differs = evidence(str(place.home)).differs(lab.twins["lora"])
    case.check("the same bits as uninterrupted", not differs, f"{where}: {differs}")
    seconds = record(place.home)["seconds"]
    case.check("durations stay durations", 0 < seconds < 3600, f"{where}: {seconds} s")
    commits = place.home.glob("checkpoints/step-*/COMMIT.json")
    off = max(json.loads(path.read_bytes())["created"] for path in commits) - time.time()
    if what != "to and fro" and abs(off) < DAY / 2:
        raise RuntimeError(f"the clock was not set: the last commit is {off:.0f} s away")
