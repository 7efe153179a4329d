"""The soak: 50 kills of one run, 20 save intervals apart on average; how much time was effective?

Effective time is the uninterrupted run's wall time over the wall time with kills, for the same
steps. Both run at once, each on a thread of its own. A restart forks a warm process; `--set
fresh=true` starts whole new ones, which spend 5 to 10 s on imports: then take `--set save=200`.
"""

from __future__ import annotations

import json
import signal
import statistics
import time

from commands import Command
from lab import Lab, Place, added, committed, evidence, lines, trained, until
from tally import Case

CASES = 1
KILLS, SAVE, APART = 50, 25, 20  # kills; steps between saves; save intervals between kills
WANTED = 0.9
LIMIT = 4 * 3600.0  # seconds that the whole may take


def prepare(lab: Lab) -> None:
    """Nothing: the uninterrupted run goes beside the other."""


def run(case: Case, lab: Lab) -> None:
    """Two runs of the same config, one of them killed."""
    kills = lab.notes.get("kills", max(1, round(KILLS * lab.scale)))
    save = lab.notes.get("save", SAVE)
    train = {
        "steps": kills * APART * save,
        "save_every": save,
        "eval_every": 40 * save,
        "global_batch": 4,
        "micro_batch": 2,
    }
    places = {
        name: Place(lab.folder / f"soak-{name}", lab.commands) for name in ("whole", "killed")
    }
    for place in places.values():
        (place.folder / "tmp").mkdir(parents=True)
        place.fresh = lab.notes.get("fresh", False)
        place.configure(lab.config("lora", str(place.storage), train=train))
    whole = places["whole"].train()
    killer = _Killer(case, places["killed"], whole, APART * save, kills)
    command = killer.run(lab.rng(case))
    _judge(case, places, killer, command)


class _Killer:
    """Gives the same command until its run is done, and kills it now and then.

    Args:
        apart: steps between two kills, on average.
    """

    def __init__(self, case: Case, place: Place, whole: Command, apart: int, kills: int) -> None:
        self._case, self._place, self._whole = case, place, whole
        self._apart, self._kills = apart, kills
        self.pace = 0.0  # seconds per step
        self.killed_seconds = self.whole_seconds = 0.0

    def run(self, rng) -> Command:
        """To the end; the last command."""
        case, place, began = self._case, self._place, time.monotonic()
        before, command = [], place.train()
        while not self._ends(command, before, rng):
            command.kill(signal.SIGKILL)
            command.wait()
            if command.code != -signal.SIGKILL:
                break
            case.faults["SIGKILL"] += 1
            now = trained(added(before, lines(place.home)))
            case.twice.append(max(0, max(now, default=0) - committed(place.home)))
            before, command = lines(place.home), place.train()
        self.killed_seconds = time.monotonic() - began
        command.wait()
        until(self._look, LIMIT, every=0.2)
        return command

    def _ends(self, command: Command, before: list[bytes], rng) -> bool:
        """Whether the run ended before its next kill was due."""
        home, case = self._place.home, self._case

        def steps(count: int) -> bool:
            new = trained(added(before, lines(home)))
            return len(new) >= count or command.poll() is not None

        until(lambda: steps(1), 120)
        if before:
            case.again.append(time.monotonic() - command.began)
        if not self.pace:
            until(lambda: steps(20), 120)
            self.pace = _pace(lines(home))
        moment = time.monotonic() + rng.expovariate(1 / (self._apart * self.pace))
        if case.faults.total() >= self._kills:
            moment = time.monotonic() + LIMIT
        while command.poll() is None and time.monotonic() < moment:
            self._look()
            time.sleep(0.05)
        return command.poll() is not None

    def _look(self) -> bool:
        """Whether the uninterrupted run has ended; keeps when."""
        if not self.whole_seconds and self._whole.poll() is not None:
            self.whole_seconds = time.monotonic() - self._whole.began
        return self.whole_seconds > 0


def _judge(case: Case, places: dict[str, Place], killer: _Killer, command: Command) -> None:
    case.check("the run ends well", command.code == 0, command.text()[-3000:])
    share = killer.whole_seconds / killer.killed_seconds
    text = (
        f"{share:.1%} effective: {killer.whole_seconds:.0f} s whole, "
        f"{killer.killed_seconds:.0f} s with kills, {killer.pace * 1000:.0f} ms a step"
    )
    case.notes.append(text)
    case.check(f"effective time at least {WANTED:.0%}", share >= WANTED, text)
    found, whole = (evidence(str(places[name].home)) for name in ("killed", "whole"))
    differs = found.differs(whole)
    case.check("the same bits as uninterrupted", not differs, differs)
    places["killed"].judge_leftovers(case)


def _pace(some: list[bytes]) -> float:
    """Seconds per step, as the log has them."""
    seconds = [row["seconds"] for row in map(json.loads, some) if row["split"] == "train"]
    return statistics.median(b - a for a, b in zip(seconds, seconds[1:], strict=False))
