"""What a person sees while a sweep runs: one live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import IO, Protocol, cast

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from rayft.core.console import LastingStream, say
from rayft.records.ledger import LedgerTrial, TrialParams
from rayft.training.progress import clock, si

PERIOD = 5.0  # seconds between two plain lines
LISTED = 8  # trials in the table


@dataclass(frozen=True)
class SweepSnapshot:
    """A sweep at one moment."""

    metric: str
    total: int  # trials in all
    counts: dict[str, int]  # by status
    waiting: int  # for a slot
    slots: int  # of all packs together; 0 without packs
    busy: int  # of these
    tokens_per_s: float
    seconds: float
    left: float | None  # seconds, estimated
    best: tuple[LedgerTrial, float] | None
    base: float | None
    running: list[tuple[LedgerTrial, float | None]] = field(default_factory=list)  # best first

    @property
    def over(self) -> int:
        """Trials that have ended."""
        return sum(count for status, count in self.counts.items() if status != "running")


class SweepView(Protocol):
    """Shows a sweep."""

    def note(self, text: str) -> None:
        """One line that stays."""
        ...

    def show(self, state: SweepSnapshot) -> None:
        """The present state; called often."""
        ...

    def close(self) -> None:
        """Leave the terminal as a user expects it."""
        ...


def sweep_view() -> SweepView:
    """The right one for this standard error."""
    return LiveTable() if sys.stderr.isatty() else PlainLines(_print)


def _print(text: str) -> None:
    say(text, err=True)


class PlainLines:
    """At most one line per PERIOD, and only when something has changed."""

    def __init__(
        self, out: Callable[[str], None], tick: Callable[[], float] = time.monotonic
    ) -> None:
        self._out, self._tick = out, tick
        self._last, self._at = "", -PERIOD

    def note(self, text: str) -> None:
        self._out(text)

    def show(self, state: SweepSnapshot) -> None:
        if self._tick() - self._at < PERIOD:
            return
        counted = _counted(state)
        if counted != self._last:
            self._last, self._at = counted, self._tick()
            self._out("  ".join([counted, *_paced(state)]))

    def close(self) -> None:
        """Nothing to restore."""


class LiveTable:
    """A head line and the running trials; notes scroll above."""

    def __init__(self, console: Console | None = None) -> None:
        lasting = cast("IO[str]", LastingStream(sys.stderr))  # has what rich calls of a file
        self._console = console or Console(file=lasting)
        self._live = Live(console=self._console, refresh_per_second=2, transient=True)
        self._live.start()

    def note(self, text: str) -> None:
        self._console.print(Text(text))

    def show(self, state: SweepSnapshot) -> None:
        self._live.update(Group(Text("  ".join([_counted(state), *_paced(state)])), table(state)))

    def close(self) -> None:
        """Take the table away."""
        self._live.stop()


def table(state: SweepSnapshot) -> Table:
    """The running trials, the best first, each with what sets it apart."""
    shown = Table(box=None, pad_edge=False, header_style="dim")
    shown.add_column("trial")
    shown.add_column("step", justify="right")
    shown.add_column(Text(state.metric), justify="right")  # Text: brackets are no markup
    shown.add_column("params", no_wrap=True, overflow="ellipsis")
    for trial, value in state.running[:LISTED]:
        number = "" if value is None else f"{value:.4f}"
        shown.add_row(trial.id, str(trial.step), number, Text(short(trial.params)))
    if len(state.running) > LISTED:
        shown.add_row(f"... {len(state.running) - LISTED} more", "", "", "")
    return shown


def short(params: TrialParams) -> str:
    """`rank=8 lr=3.1e-04`: the last words of the paths, the numbers rounded."""
    parts = []
    for path, value in params.items():
        shown = f"{value:.3g}" if isinstance(value, float) else str(value)
        parts.append(f"{path.rsplit('.', 1)[-1]}={shown}")
    return " ".join(parts)


def _counted(state: SweepSnapshot) -> str:
    """`12 of 32 trials over (8 stopped, 1 diverged), 16 running  best t0007 eval_loss 3.6104`."""
    kinds = [
        f"{state.counts[k]} {k}" for k in ("stopped", "diverged", "failed") if state.counts.get(k)
    ]
    inside = f" ({', '.join(kinds)})" if kinds else ""
    text = f"{state.over} of {state.total} trials over{inside}"
    text += f", {state.counts.get('running', 0)} running"
    if state.best is not None:
        trial, value = state.best
        text += f"  best {trial.id} {state.metric} {value:.4f}"
        if state.base is not None:
            text += f" (base {state.base:.4f})"
    return text


def _paced(state: SweepSnapshot) -> list[str]:
    parts = []
    if state.slots:
        parts.append(f"slots {state.busy}/{state.slots}")
    if state.tokens_per_s:
        parts.append(f"{si(state.tokens_per_s)} tok/s")
    if state.left is not None:
        parts.append(f"left ~{clock(state.left)}")
    return parts
