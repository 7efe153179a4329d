"""Storm 1: SIGKILL and SIGTERM of a run in process, at random moments and at random failpoints.

After each kill the same command continues. In the end loss series, last checkpoint (parameters,
optimizer, generators) and export are those of the run that nobody killed, bit for bit.
"""

from __future__ import annotations

import random
import signal
import time

from commands import Command
from lab import KINDS, Lab, Place, added, committed, evidence, follow, lines, trained
from tally import Case

from rayft.storage.failpoints import POINTS, VARIABLE

CASES, KILLS = 20, 10  # at scale 1: 200 kills
BEGUN = 1.0  # seconds after which a signal finds its handler


def prepare(lab: Lab) -> None:
    """The uninterrupted runs."""
    for kind in lab.notes.get("kinds", KINDS):
        lab.twin(kind)


def run(case: Case, lab: Lab) -> None:
    """KILLS kills, over as many runs as they take."""
    rng, round_ = lab.rng(case), 0
    kills = lab.notes.get("kills", KILLS)
    while case.faults.total() < kills:
        kind = rng.choice(list(lab.notes.get("kinds", KINDS)))
        place = lab.place(case)
        place.fresh = lab.notes.get("fresh", False)
        place.configure(lab.config(kind, str(place.storage)))
        _one_run(case, lab, place, kind, rng, kills)
        round_ += 1
        if case.broken:  # what lies there is for whoever looks into it
            return
        place.remove()


def _one_run(case: Case, lab: Lab, place: Place, kind: str, rng: random.Random, kills: int) -> None:
    """One run to its end, killed until the case has its kills."""
    whole, killed = lab.notes[f"seconds {kind}"], False
    for _ in range(20 * kills):
        before, commit = lines(place.home), committed(place.home)
        plan = _plan(rng, whole) if case.faults.total() < kills else ("none", 0.0, "")
        command = place.train(**({VARIABLE: plan[2]} if plan[2] else {}))
        _inject(command, place, plan, before, case.again if killed else [])
        code = command.wait()
        new = trained(added(before, lines(place.home)))
        if new:
            case.check(
                "continues from the last commit",
                new[0] == commit + 1,
                f"{place.folder}: trains step {new[0]}, the last commit is {commit}",
            )
        if code == 0:
            break
        killed = True
        _judge(case, place, plan, code, command, max([commit, *new]))
        if case.broken:
            return
    differs = evidence(str(place.home)).differs(lab.twins[kind])
    case.check("the same bits as uninterrupted", not differs, f"{place.folder}: {differs}")
    place.judge_leftovers(case)


def _plan(rng: random.Random, whole: float) -> tuple[str, float, str]:
    """(kind of fault, seconds until it, failpoint)."""
    moment = rng.uniform(0.0, 0.6 * whole)
    how = rng.choices(("SIGKILL", "SIGTERM", "failpoint"), (45, 20, 35))[0]
    if how != "failpoint":
        return how, moment, ""
    point = rng.choice(POINTS)
    nth = rng.randint(1, 20 if point.startswith("storage") else 4)
    return how, 0.0, f"{point}:kill:{nth}"


def _inject(
    command: Command, place: Place, plan: tuple[str, float, str], before: list, again: list
) -> None:
    """Watch until the moment has come, then kill; the time to the first new step goes to `again`"""
    kind, moment, _ = plan
    signals = {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM}
    end = command.began + (moment if kind in signals else 1e9)
    seen = False
    for _ in follow(command, place.home, lambda: time.monotonic() >= end):
        if not seen and trained(added(before, lines(place.home))):
            again.append(time.monotonic() - command.began)
            seen = True
    if kind in signals:
        command.kill(signals[kind])


def _judge(
    case: Case, place: Place, plan: tuple[str, float, str], code: int, command: Command, far: int
) -> None:
    """The command was killed: did it die, or stop, as promised?"""
    kind, moment, point = plan
    wanted = {"SIGTERM": (75,)}.get(kind, (-signal.SIGKILL,))
    early = kind == "SIGTERM" and moment < BEGUN and code == -signal.SIGTERM
    good = code in wanted or early
    what = f"{place.folder}: {kind} {point or f'{moment:.2f} s'}: exit {code}"
    case.check("ends as its signal says", good, f"{what}\n{command.text()[-2000:]}")
    case.faults[f"{kind} {point.split(':')[0]}".strip()] += 1
    commit = committed(place.home)
    case.twice.append(far - commit)
    if code == 75:
        case.check("SIGTERM saves every step", far == commit, f"{what}, {far} trained, {commit}")
    bad = list(place.home.glob("checkpoints/.bad/*"))
    case.check("no checkpoint was torn", not bad, f"{what}: {bad}")
