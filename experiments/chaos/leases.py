"""Storm 6: drivers that race for one run, and leases that are stolen, deleted or damaged.

Of N drivers at once one trains, the others say who has it and end with 1. A driver that finds its
lease gone, taken or unreadable stops with 1 and writes nothing more: neither files nor a status.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time

from lab import Lab, Place, evidence, lines, record, trained, tree, until
from tally import Case

from rayft.storage.lease import PATIENCE, RENEW

CASES = 25
LATE = RENEW + 2.0  # seconds in which a driver notices, on a busy machine
LONG = {"steps": 2000, "save_every": 3, "eval_every": 6, "global_batch": 4, "micro_batch": 2}
PLAN = ("race", "stolen", "deleted", "damaged", "asleep")


def prepare(lab: Lab) -> None:
    """The uninterrupted run."""
    lab.twin("lora")


def run(case: Case, lab: Lab) -> None:
    """One of PLAN, by the case's number."""
    rng, place = lab.rng(case), lab.place(case)
    what = PLAN[case.number % len(PLAN)]
    case.faults[what] += 1
    if what == "race":
        _race(case, lab, place, rng)
    elif what == "asleep":
        _asleep(case, lab, place)
    else:
        _robbed(case, lab, place, what, rng)
    if not case.broken:
        place.remove()


def _race(case: Case, lab: Lab, place: Place, rng: random.Random) -> None:
    """2 to 6 drivers within half a second."""
    place.configure(lab.config("lora", str(place.storage)))
    drivers = []
    for _ in range(rng.randint(2, 6)):
        drivers.append(
            place.rayft(
                "train", str(place.folder / "config.json"), out=f"driver-{len(drivers)}.txt"
            )
        )
        time.sleep(rng.uniform(0, 0.1))
    codes = [driver.wait() for driver in drivers]
    said = "\n".join(driver.text()[-300:] for driver in drivers)
    case.check(
        "one of several drivers wins",
        sorted(codes) == [0, *[1] * (len(codes) - 1)],
        f"{place.folder}: exits {codes}\n{said}",
    )
    losers = [driver for driver in drivers if driver.code == 1]
    named = all("already running" in driver.text() for driver in losers)
    case.check("the others say who has it", named, f"{place.folder}\n{said}")
    differs = evidence(str(place.home)).differs(lab.twins["lora"])
    case.check("the same bits as uninterrupted", not differs, f"{place.folder}: {differs}")
    case.check("one attempt was made", record(place.home).get("attempts") == 1, place.folder)


def _robbed(case: Case, lab: Lab, place: Place, what: str, rng: random.Random) -> None:
    """The lease of a driver that trains is taken away."""
    place.configure(lab.config("lora", str(place.storage), train=LONG))
    driver, lease = place.train(), place.home / "driver.lease"
    if not until(lambda: len(trained(lines(place.home))) > 4 and lease.exists(), 60):
        raise RuntimeError(f"no training began: {driver.text()}")
    time.sleep(rng.uniform(0, RENEW))
    other = b""
    if what == "stolen":
        other = json.dumps(json.loads(lease.read_bytes()) | {"id": "ab" * 8, "pid": 1}).encode()
    elif what == "damaged":
        # Where it still names its holder it is still its holder's: damage that nobody can see past.
        other = lease.read_bytes()
        name = other.index(json.loads(other)["id"].encode())
        at = rng.randrange(name, name + 16)
        flipped = other[:at] + bytes([other[at] ^ 1 << rng.randrange(7)]) + other[at + 1 :]
        other = rng.choice((flipped, other[: rng.randrange(len(other) - 2)], b""))
    if what == "deleted":
        lease.unlink()
    else:
        # As rayft writes it: whole, or a reader could see half of it.
        (place.folder / "lease").write_bytes(other)
        (place.folder / "lease").replace(lease)
    moment = time.time()
    try:
        code = driver.wait(60)
    except Exception as error:  # it hangs or it trains on: both are what is asked here
        case.check("a driver without its lease stops", False, f"{place.folder}: {what}: {error}")
        return
    _judge_robbed(case, place, what, code, driver.text(), moment)
    if what != "deleted":
        there = lease.exists() and lease.read_bytes() == other
        case.check("whose lease it is now, stays", there, f"{place.folder}: {what}")


def _judge_robbed(case: Case, place: Place, what: str, code: int, said: str, moment: float) -> None:
    where = f"{place.folder}: {what}"
    case.check("a driver without its lease ends with 1", code == 1, f"{where}: {code}\n{said}")
    status = record(place.home).get("status")
    case.check("it leaves the status to the other", status == "running", f"{where}: {status}")
    files = [path for path in place.home.rglob("*") if path.is_file()]
    late = {
        path.name: round(path.stat().st_mtime - moment, 1)
        for path in files
        if path.stat().st_mtime > moment + LATE and path.name != "driver.lease"
    }
    case.check("it writes nothing more", not late, f"{where}: seconds after: {late}")


def _asleep(case: Case, lab: Lab, place: Place) -> None:
    """SIGSTOP; a driver that cannot see the process (another pid namespace, as on another machine)
    takes over and finishes; SIGCONT: the first one writes nothing more."""
    if os.geteuid() != 0 or not shutil.which("unshare"):
        case.skipped.append("asleep: needs root and unshare for another pid namespace")
        return
    place.configure(lab.config("lora", str(place.storage)))
    first, lease = place.train(), place.home / "driver.lease"
    if not until(lambda: len(trained(lines(place.home))) > 4 and lease.exists(), 60):
        raise RuntimeError(f"no training began: {first.text()}")
    os.kill(first.pid, signal.SIGSTOP)
    try:
        second = Place(place.folder, place.commands, fresh=True).rayft(
            "train",
            str(place.folder / "config.json"),
            out="second.txt",
            PREFIX="unshare --fork --pid --mount-proc --kill-child",
        )
        code = second.wait(PATIENCE + 180)
        case.check(
            "a sleeping driver is taken over", code == 0, f"{place.folder}: {code}\n{second.text()}"
        )
        before = tree(place.home)
    finally:
        os.kill(first.pid, signal.SIGCONT)
    code = first.wait(60)
    after = tree(place.home)
    # Its own traceback may be there; what the other one wrote must stand.
    names = {name for name in {*before, *after} if not name.startswith(("errors/", "rayft-error"))}
    changed = sorted(name for name in names if before.get(name) != after.get(name))
    case.check(
        "a driver that wakes writes nothing more",
        not changed,
        f"{place.folder}: {changed}\n{first.text()[-1500:]}",
    )
    case.check("a driver that wakes ends with 1", code == 1, f"{place.folder}: exit {code}")
    differs = evidence(str(place.home)).differs(lab.twins["lora"])
    case.check("the same bits as uninterrupted", not differs, f"{place.folder}: {differs}")
