"""This process, others on this machine, and the temporary folders that dead ones left behind.

A temporary folder says in its name whose it is, a session of Ray in a file: the machine (and pid
namespace), the process and when it began, so that a pid used again is not taken for it. Only what
is surely of this user, of this machine and of a dead process is ever removed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

abandoned = threading.Event()
"""Set when threads are left behind that no clean exit can end: leave by `os._exit`."""

OWNER = "rayft-owner.json"
_TEMPORARY = re.compile(r"rayft-[a-z]+-([0-9a-f]{12})-(\d+)-(\d+)-\w+")


def machine() -> str:
    """Of the pid namespace this process lives in; "" where the system does not say."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def started(pid: int) -> str:
    """When the process began, in ticks since boot; "" when there is none, or it is a zombie."""
    try:
        # pid (name) state ppid ...; the name may hold spaces and brackets
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def families(roots: Iterable[int]) -> dict[int, str]:
    """These processes and all that they, and those again, have started: when, by pid."""
    parents: dict[int, int] = {}
    for pid in _pids():
        with suppress(OSError):  # it ended meanwhile
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            parents[pid] = int(fields[1])
    found, new = set(), set(roots)
    while new:
        found |= new
        new = {pid for pid, parent in parents.items() if parent in new} - found
    return {pid: began for pid in found if (began := started(pid))}


def kill(processes: dict[int, str]) -> None:
    """SIGKILL for those of `processes` (as `families` names them) that still live."""
    for pid, began in processes.items():
        if started(pid) == began:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def temporary(kind: str) -> tempfile.TemporaryDirectory[str]:
    """A temporary folder of this process; what is left of it after kill -9, `remove_dead` removes.

    Args:
        kind: what it is for, lower-case letters.
    """
    pid = os.getpid()
    prefix = f"rayft-{kind}-{_here()}-{pid}-{started(pid) or 0}-"
    return tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True)


def remove_dead() -> list[Path]:
    """Remove the temporary folders of dead processes; which they were."""
    gone = []
    for folder, mark in _named(Path(tempfile.gettempdir())):
        if mark[1] == _here() and mark[3] != "0" and started(int(mark[2])) != mark[3]:
            shutil.rmtree(folder, ignore_errors=True)
            gone.append(folder)
    return gone


def own_session(session: Path) -> None:
    """Write down that Ray's session folder was started by this process."""
    pid = os.getpid()
    owner = {"machine": machine(), "pid": pid, "started": started(pid)}
    (session / OWNER).write_text(json.dumps(owner))


def remove_dead_sessions(root: Path) -> list[Path]:
    """Remove sessions of Ray below `root` whose driver was rayft and is dead, once none of their
    other processes lives; which they were."""
    gone = []
    for marker in root.glob(f"session_*/{OWNER}"):
        session = marker.parent
        try:
            owner = json.loads(marker.read_text())
            here = bool(owner["machine"]) and owner["machine"] == machine()
            dead = bool(owner["started"]) and started(int(owner["pid"])) != owner["started"]
        except (OSError, ValueError, TypeError, KeyError):  # not ours to judge
            continue
        if here and dead and _mine(session) and not _in_use(session):
            shutil.rmtree(session, ignore_errors=True)
            gone.append(session)
    return gone


def _here() -> str:
    return hashlib.sha256(machine().encode()).hexdigest()[:12]


def _named(root: Path) -> list[tuple[Path, re.Match[str]]]:
    try:
        found = [(path, _TEMPORARY.fullmatch(path.name)) for path in root.iterdir()]
    except OSError:  # may not be listed
        return []
    return [(path, mark) for path, mark in found if mark is not None and _mine(path)]


def _mine(folder: Path) -> bool:
    """A folder, not a link to one, of this user."""
    try:
        return not folder.is_symlink() and folder.is_dir() and folder.lstat().st_uid == os.getuid()
    except OSError:
        return False


def _in_use(session: Path) -> bool:
    """Whether a process of this session lives: Ray's are started with its folder as argument."""
    name = os.fsencode(session.name)
    for pid in _pids():
        with suppress(OSError):  # it ended meanwhile
            if name in Path(f"/proc/{pid}/cmdline").read_bytes():
                return True
    return False


def _pids() -> list[int]:
    """Of all processes that can be seen."""
    try:
        return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()]
    except OSError:
        return []
