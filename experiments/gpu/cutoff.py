"""One part as a process group of its own, ended when its time is over."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from plan import Part

SKIPPED = 77  # the exit code of a part that cannot run here
POLL, GRACE = 0.2, 2.0  # seconds between two looks; between asking a part to end and killing it


@dataclass(frozen=True)
class Outcome:
    """What became of a part: ok, failed, timeout or skipped, and why where it is not ok."""

    status: str
    seconds: float
    numbers: dict[str, Any]
    reason: str = ""


def run_part(
    part: Part,
    options: list[str],
    environment: Mapping[str, str],
    scratch: Path,
    log: IO[bytes],
    seen: Callable[[float, dict[str, Any]], None],
) -> Outcome:
    """Run it to its end or to its limit.

    Args:
        options: for every part, after its own arguments.
        scratch: where the numbers are passed on.
        log: takes its output.
        seen: called with seconds and all numbers so far whenever there are new ones.
    """
    told = scratch / "numbers.json"
    told.unlink(missing_ok=True)
    log.write(f"\n==== {part.name}\n".encode())
    log.flush()
    start, began = log.tell(), time.monotonic()
    command = [sys.executable, str(part.script), *part.arguments, *options, "--numbers", str(told)]
    process = subprocess.Popen(
        command, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
        env=dict(environment), start_new_session=True,
    )  # fmt: skip
    numbers: dict[str, Any] = {}
    try:
        while process.poll() is None and time.monotonic() - began < part.limit:
            time.sleep(POLL)
            if (now := _read(told)) != numbers:
                numbers = now
                seen(time.monotonic() - began, _shown(numbers))
        late = process.poll() is None
    finally:
        _end(process)
    seconds, numbers = time.monotonic() - began, _read(told)
    code, reason = process.returncode, numbers.get("reason", "")
    if late:
        return Outcome("timeout", seconds, _shown(numbers), f"cut off after {part.limit:g} s")
    if code == 0:
        return Outcome("ok", seconds, _shown(numbers))
    if code == SKIPPED:
        return Outcome("skipped", seconds, _shown(numbers), reason)
    reason = reason or _last_line(Path(log.name), start) or f"exit code {code}"
    return Outcome("failed", seconds, _shown(numbers), reason)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Whatever is left of its group, children included."""
    for one, wait in ((signal.SIGTERM, GRACE), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, one)
        except ProcessLookupError:
            break
        try:
            process.wait(wait)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def _read(told: Path) -> dict[str, Any]:
    """The numbers so far; parts replace the file as a whole."""
    return json.loads(told.read_text()) if told.exists() else {}


def _shown(numbers: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in numbers.items() if name != "reason"}


def _last_line(log: Path, start: int) -> str:
    """Of a part's output: of a traceback, what was raised."""
    with log.open("rb") as file:
        file.seek(start)
        text = file.read().decode(errors="replace")
    _, traceback, behind = text.rpartition("Traceback (most recent call last):\n")
    lines = [line for line in behind.splitlines() if line.strip()]
    raised = [line for line in lines if traceback and not line.startswith(" ")]
    return (raised[0] if raised else lines[-1].strip() if lines else "")[:300]
