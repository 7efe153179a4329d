"""Storm 4a: small file systems that fill up, break to read-only, vanish, or are slow to sync.

Full: a tmpfs of few MiB, filled while the run trains, or before it starts. Read-only: an ext4 image
on a loop device whose error handler the kernel is asked to run (errors=remount-ro), which works
with files open, as a failing disk does. Slow fsync: a failpoint that sleeps a second before every
sync of a shard. Both mounts need root; without it they are skipped, and said so.

Promised: exit 6 soon, the last commit stands, and the same command continues when storage is back.
"""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from commands import Command
from lab import Lab, Place, committed, evidence, lines, record, trained, until
from tally import Case

from rayft.storage.failpoints import VARIABLE

CASES = 24
PLAN = ("full", "read-only", "gone", "full at start", "read-only at start", "slow fsync")
TRAIN = {"steps": 60, "save_every": 2, "eval_every": 20, "global_batch": 4, "micro_batch": 2}
SAVES = 6  # failed saves after which a run must have stopped
QUICK = 30.0  # seconds in which a start on unusable storage must end


def prepare(lab: Lab) -> None:
    """The uninterrupted run."""
    lab.twin("lora", "disk", train=TRAIN)


def run(case: Case, lab: Lab) -> None:
    """One of PLAN, by the case's number."""
    what, rng, place = PLAN[case.number % len(PLAN)], lab.rng(case), lab.place(case)
    place.storage.mkdir()
    place.configure(lab.config("lora", str(place.storage), train=TRAIN))
    with contextlib.ExitStack() as stack:
        try:
            disk = (
                None if what in ("gone", "slow fsync") else stack.enter_context(_disk(place, what))
            )
        except (OSError, subprocess.CalledProcessError) as error:
            case.skipped.append(f"{what}: no such mount here: {error}")
            return
        if what == "slow fsync":
            _slow(case, lab, place)
        elif what.endswith("at start"):
            _unusable(case, lab, place, disk)
        else:
            _mid_run(case, lab, place, disk, what, rng)
    if not case.broken:
        place.remove()


class Full:
    """A tmpfs that a file fills to the last byte."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        _call("mount", "-t", "tmpfs", "-o", "size=16m", "none", str(folder))

    def spoil(self, room: int = 0) -> None:
        """No room but `room` bytes."""
        filler = self._folder / "filler"
        with contextlib.suppress(OSError), filler.open("wb", 0) as file:
            while True:
                file.write(bytes(4096))
        if room:
            os.truncate(filler, max(0, filler.stat().st_size - room))

    def mend(self) -> None:
        """Room again."""
        (self._folder / "filler").unlink(missing_ok=True)

    def close(self) -> None:
        """Unmount."""
        _call("umount", "-l", str(self._folder))


class ReadOnly:
    """An ext4 image that the kernel makes read-only, as after an error of the disk."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._image = folder, folder.with_name("disk.img")
        with self._image.open("wb") as file:
            file.truncate(64 << 20)
        _call("mkfs.ext4", "-q", "-O", "^has_journal", str(self._image))
        self.mend()

    def spoil(self, room: int = 0) -> None:
        """The error."""
        device = next(
            line.split()[0]
            for line in Path("/proc/mounts").read_text().splitlines()
            if line.split()[1] == str(self._folder)
        )
        Path(f"/sys/fs/ext4/{Path(device).name}/trigger_fs_error").write_text("chaos")

    def mend(self) -> None:
        """Checked and mounted anew."""
        with contextlib.suppress(subprocess.CalledProcessError):
            _call("umount", str(self._folder))
        subprocess.run(["fsck.ext4", "-fy", str(self._image)], capture_output=True, check=False)
        _call("mount", "-o", "loop,errors=remount-ro", str(self._image), str(self._folder))

    def close(self) -> None:
        """Unmount."""
        _call("umount", "-l", str(self._folder))


@contextlib.contextmanager
def _disk(place: Place, what: str) -> Iterator[Full | ReadOnly]:
    if os.geteuid() != 0:
        raise PermissionError("mounting needs root")
    disk = (Full if what.startswith("full") else ReadOnly)(place.storage)
    try:
        yield disk
    finally:
        disk.close()


def _call(*argv: str) -> None:
    subprocess.run(argv, capture_output=True, check=True)


def _mid_run(
    case: Case, lab: Lab, place: Place, disk: Full | ReadOnly | None, what: str, rng: random.Random
) -> None:
    """Storage breaks while the run trains."""
    command = place.train()
    goal = rng.randint(5, 30)
    if not until(lambda: len(trained(lines(place.home))) >= goal or command.poll() is not None, 90):
        raise RuntimeError(f"no training: {command.text()}")
    case.faults[what] += 1
    if disk is None:
        place.home.rename(place.folder / "away")
    else:
        disk.spoil(rng.choice((0, 100_000)))  # room for the log's lines, not for a shard
    code, said = command.wait(), command.text()
    where = f"{place.folder}: {what} at step {goal}"
    case.check("exit 6 when storage is gone", code == 6, f"{where}: exit {code}\n{said[-2000:]}")
    commit = committed(place.home)
    if disk is not None:
        far = _farthest(place, said)
        late = far - commit <= SAVES * TRAIN["save_every"]
        case.check("soon", late, f"{where}: trained to {far}, the last commit is {commit}")
        named = f"step-{commit}-" in said or f"step {commit}" in said
        case.check("the last commit is named", named or not commit, f"{where}: {commit}\n{said}")
        case.twice.append(max(0, far - commit))
        disk.mend()
        case.check("the last commit stands", committed(place.home) == commit, where)
    _continues(case, lab, place, where)


def _farthest(place: Place, said: str) -> int:
    """The last step that the log, or at least the output, tells of."""
    steps = [
        int(word)
        for line in said.splitlines()
        if line.startswith("step ")
        for word in [line.split()[1].partition("/")[0]]
        if word.isdigit()
    ]
    return max([*steps, *trained(lines(place.home)), 0])


def _continues(case: Case, lab: Lab, place: Place, where: str) -> None:
    before, command = len(lines(place.home)), place.train()
    seen = until(
        lambda: len(lines(place.home)) > before or command.poll() is not None, 120, every=0.01
    )
    if seen and command.poll() is None:
        case.again.append(time.monotonic() - command.began)
    code = command.wait()
    _ends_well(case, lab, place, command, code, where)


def _ends_well(case: Case, lab: Lab, place: Place, command: Command, code: int, where: str) -> None:
    good = case.check("the same command continues", code == 0, f"{where}: {code}\n{command.text()}")
    if good:
        found = evidence(str(place.home))
        differs = found.differs(lab.twins["disk"])
        if ": gone" in where and found.lacks_only(lab.twins["disk"]):
            differs = ""  # the log went with the folder
        case.check("the same bits as uninterrupted", not differs, f"{where}: {differs}")


def _unusable(case: Case, lab: Lab, place: Place, disk: Full | ReadOnly) -> None:
    """Storage cannot be written when the command starts."""
    disk.spoil()
    case.faults["unusable at start"] += 1
    command = place.train()
    code, where = command.wait(), f"{place.folder}: unusable at start"
    case.check("exit 6 when storage is gone", code == 6, f"{where}: {code}\n{command.text()}")
    soon = time.monotonic() - command.began < QUICK
    case.check("soon", soon and not record(place.home).get("attempts"), where)
    disk.mend()
    _continues(case, lab, place, where)


def _slow(case: Case, lab: Lab, place: Place) -> None:
    """Every sync of a shard takes a second: saves are late, nothing else."""
    case.faults["slow fsync (failpoint)"] += 1
    command = place.train(**{VARIABLE: "checkpoint.shard.close:sleep:1+"})
    _ends_well(case, lab, place, command, command.wait(), f"{place.folder}: slow fsync")
