"""What a person sees while it runs: one live line on a terminal, a few plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import IO, Protocol, cast

from rich.console import Console
from rich.live import Live
from rich.text import Text

from rayft.compose.job import ProgressEvent
from rayft.core.console import LastingStream, say

PERIOD = 5.0  # seconds between two plain lines
SHARE = 0.1  # of the run between two plain lines, when that is longer


class ProgressView(Protocol):
    """Shows events."""

    def show(self, event: ProgressEvent) -> None:
        """One event."""
        ...

    def close(self) -> None:
        """Leave the terminal as a user expects it."""
        ...


def view() -> ProgressView:
    """The right one for this standard error."""
    return LiveProgress() if sys.stderr.isatty() else ProgressLines(_print)


def _print(text: str) -> None:
    say(text, err=True)


class StepPace:
    """Speed and remaining time, from the steps of this attempt."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._first: tuple[int, float] | None = None
        self._saved: float | None = None
        self.total = 0

    def take(self, event: ProgressEvent) -> None:
        """Keep the times of an event."""
        self.total = event.steps or self.total
        if event.kind == "start":
            self._first = None  # counted from the end of the first step, which warms things up
        elif event.kind == "save":
            self._saved = self._clock()
        elif event.kind == "step" and self._first is None:
            self._first = (event.step, self._clock())

    def left(self, step: int) -> float | None:
        """Seconds to the end; None before it can be known."""
        if self._first is None or not self.total or step <= self._first[0]:
            return None
        each = (self._clock() - self._first[1]) / (step - self._first[0])
        return each * (self.total - step)

    def saved(self) -> float | None:
        """Seconds since the last checkpoint."""
        return None if self._saved is None else self._clock() - self._saved


class ProgressLines:
    """Plain lines: the first step, then at most one per PERIOD seconds and SHARE of the run;
    evaluations, saves, warnings and the last step always."""

    def __init__(
        self, out: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._out, self._clock = out, clock
        self._pace = StepPace(clock)
        self._shown: tuple[int, float] | None = None

    def show(self, event: ProgressEvent) -> None:
        self._pace.take(event)
        if event.kind != "step":
            self._out(other_line(event))
        elif self._due(event.step):
            self._shown = (event.step, self._clock())
            self._out(step_line(event, self._pace))

    def close(self) -> None:
        """Nothing to restore."""

    def _due(self, step: int) -> bool:
        if self._shown is None or step == self._pace.total or step < self._shown[0]:
            return True
        waited = self._clock() - self._shown[1] >= PERIOD
        return waited and step - self._shown[0] >= min(SHARE * self._pace.total, 50)


class LiveProgress:
    """A live line at the bottom; evaluations, saves and warnings scroll above it."""

    def __init__(self, console: Console | None = None) -> None:
        lasting = cast("IO[str]", LastingStream(sys.stderr))  # has what rich calls of a file
        self._console = console or Console(file=lasting)
        self._pace = StepPace()
        self._live = Live(console=self._console, refresh_per_second=4, transient=True)
        self._live.start()

    def show(self, event: ProgressEvent) -> None:
        self._pace.take(event)
        if event.kind == "step":
            self._live.update(Text(step_line(event, self._pace), no_wrap=True))
        else:
            self._console.print(Text(other_line(event)))

    def close(self) -> None:
        """Take the live line away."""
        self._live.stop()


def step_line(event: ProgressEvent, pace: StepPace) -> str:
    """`step 120/1000  loss 2.1310  lr 2.0e-04  5.1k tok/s  1.2 GiB  left 3m10s  saved 12s ago`."""
    step = event.step
    parts = [f"step {step}" + (f"/{pace.total}" if pace.total else "")]
    numbers = event.numbers
    if "loss" in numbers:
        parts.append(f"loss {numbers['loss']:.4f}")
    if event.lr:
        parts.append(_rates(event.lr))
    if numbers.get("tokens_per_s"):
        parts.append(f"{si(numbers['tokens_per_s'])} tok/s")
    if numbers.get("memory"):
        parts.append(f"{numbers['memory'] / 2**30:.2f} GiB")
    left, saved = pace.left(step), pace.saved()
    if left is not None and step < pace.total:
        parts.append(f"left {clock(left)}")
    if saved is not None:
        parts.append(f"saved {clock(saved)} ago")
    return "  ".join(parts)


def _rates(lr: dict[str, float]) -> str:
    if len(set(lr.values())) == 1:
        return f"lr {next(iter(lr.values())):.1e}"
    return "lr " + " ".join(f"{group}={value:.1e}" for group, value in lr.items())


def other_line(event: ProgressEvent) -> str:
    """One line for anything but a step."""
    kind = event.kind
    if kind in ("warn", "note"):
        return f"{'warning: ' * (kind == 'warn')}{event.text}"
    return f"step {event.step}  {_KINDS[kind](event)}".rstrip()


def _start(event: ProgressEvent) -> str:
    parts = [f"of {event.steps}"]
    if event.params_trainable:
        parts.append(f"{event.params_trainable:,} of {event.params_total:,} parameters train")
    if event.groups:
        parts.append(f"groups {', '.join(event.groups)}")
    return "  ".join(parts)


def _eval(event: ProgressEvent) -> str:
    found = {k: v for k, v in event.numbers.items() if k.startswith(("eval_loss", "eval_ppl"))}
    return "eval  " + "  ".join(f"{name} {value:.4f}" for name, value in found.items())


_KINDS: dict[str, Callable[[ProgressEvent], str]] = {
    "start": _start,
    "eval": _eval,
    "save": lambda event: "saved",
    "export": lambda event: "writing the export",
}


def si(number: float) -> str:
    """5120 -> 5.1k."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return f"{number:.0f}"


def clock(seconds: float) -> str:
    """190 -> 3m10s."""
    whole = int(seconds)
    hours, rest = divmod(whole, 3600)
    minutes, last = divmod(rest, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{last:02d}s" if minutes else f"{last}s"
