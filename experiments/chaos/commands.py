"""`rayft ...` as a user gives it: forked from a warm process, or as a fresh one."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
LIMIT = 240.0  # seconds after which a command hangs


class Hangs(Exception):
    """A command did not end in its time; it was killed."""


class Command:
    """A command that runs, or has ended."""

    def __init__(self, argv: Sequence[str], out: Path, fork: socket.socket | None, env: dict):
        self.argv, self.out, self.began = list(argv), out, time.monotonic()
        self.code: int | None = None
        out.touch()
        self._skip = out.stat().st_size
        self._fork, self._process = fork, None
        if fork is not None:
            fork.sendall(
                json.dumps({"argv": self.argv, "out": str(out), "env": env}).encode() + b"\n"
            )
            self._lines = fork.makefile()
            self.pid: int = json.loads(self._lines.readline())["pid"]
        else:
            with out.open("ab") as file:
                self._process = subprocess.Popen(
                    [*env.pop("PREFIX", "").split(), sys.executable, "-m", "rayft", *self.argv],
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env=os.environ | env,
                    start_new_session=True,
                )
            self.pid = self._process.pid

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill_all(self) -> None:
        """SIGKILL to it and to everything it started, Ray included."""
        for pid in [self.pid, *below(self.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def poll(self) -> int | None:
        """The exit code, if it has ended (negative: the signal that killed it)."""
        with contextlib.suppress(Hangs):
            return self._wait(0.0)
        return None

    def wait(self, limit: float = LIMIT) -> int:
        """The exit code.

        Raises:
            Hangs: it did not end in `limit` seconds; everything it started is killed.
        """
        try:
            return self._wait(limit)
        except Hangs:
            self.kill_all()
            self._wait(60.0)
            raise

    def text(self) -> str:
        """What it has printed so far."""
        return self.out.read_bytes()[self._skip :].decode(errors="replace")

    def _wait(self, limit: float) -> int:
        if self.code is None and self._process is not None:
            try:
                self.code = self._process.wait(limit)
            except subprocess.TimeoutExpired:
                raise Hangs(self._shown(limit)) from None
        elif self.code is None:
            self._fork.settimeout(max(limit, 0.001))
            try:
                data = self._fork.recv(4096)
            except TimeoutError:
                raise Hangs(self._shown(limit)) from None
            self.code = json.loads(data)["code"]
            self._fork.close()
        return self.code

    def _shown(self, limit: float) -> str:
        return f"`rayft {' '.join(self.argv)}` did not end in {limit:.0f} s"


class Commands:
    """Starts commands; `close` ends all that still run.

    Args:
        folder: for their output and temporary files.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._forker: subprocess.Popen[str] | None = None
        self._all: list[Command] = []
        self._socket, self._lock = str(folder / "forker.sock"), threading.Lock()

    def start(
        self, *argv: str, out: Path, fresh: bool = False, env: dict[str, str] | None = None
    ) -> Command:
        """`rayft ARGV`, its output added to `out`."""
        out.parent.mkdir(parents=True, exist_ok=True)
        fork = None if fresh else self._connected()
        command = Command(argv, out, fork, dict(env or {}))
        self._all.append(command)
        return command

    def close(self) -> None:
        """End all."""
        for command in self._all:
            if command.poll() is None:
                command.kill_all()
        if self._forker is not None:
            self._forker.stdin.close()
            self._forker.wait(30)

    def _warm(self) -> None:
        """Start the process that forks."""
        self._forker = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "forker.py"), self._socket],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stderr=subprocess.DEVNULL,
            text=True,
        )
        if self._forker.stdout.readline().strip() != "ready":
            raise RuntimeError("the warm process did not start")

    def _connected(self) -> socket.socket:
        with self._lock:
            if self._forker is None:
                self._warm()
        fork = socket.socket(socket.AF_UNIX)
        fork.settimeout(60)
        fork.connect(self._socket)
        return fork


def processes() -> dict[int, dict[str, Any]]:
    """{pid: {"parent", "name": its command line}} of this machine, zombies left out."""
    found = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            name = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if fields[0] not in "ZX":
                found[int(folder.name)] = {"parent": int(fields[1]), "name": name.strip()}
    return found


def below(pid: int, named: str = "") -> list[int]:
    """The descendants of `pid` whose command line matches `named`."""
    everyone, found, last = processes(), [], [pid]
    while last:
        last = [one for one, facts in everyone.items() if facts["parent"] in last]
        found += last
    return [one for one in found if re.search(named, everyone[one]["name"])]
