"""What a storm counts, and the table at the end."""

from __future__ import annotations

import statistics
import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

COLUMNS = (
    "storm",
    "faults",
    "kept",
    "broken",
    "again s",
    "max",
    "steps twice",
    "max",
    "left",
    "minutes",
)


@dataclass
class Case:
    """What happened in one case: a case is what its storm, its number and the seed make it."""

    storm: str
    number: int
    faults: Counter[str] = field(default_factory=Counter)  # kind -> injected
    promises: Counter[str] = field(default_factory=Counter)  # promise -> kept
    broken: list[str] = field(default_factory=list)
    again: list[float] = field(default_factory=list)  # seconds from a new start to a new step
    twice: list[int] = field(default_factory=list)  # steps that one fault made train twice
    left: list[str] = field(default_factory=list)  # processes, files and folders left behind
    skipped: list[str] = field(default_factory=list)  # what could not be injected, and why
    notes: list[str] = field(default_factory=list)  # what else was measured

    @property
    def name(self) -> str:
        """Of the case and its folder."""
        return f"{self.storm}-{self.number}"

    def check(self, promise: str, held: bool, detail: object = "") -> bool:
        """Note whether `promise` held."""
        if held:
            self.promises[promise] += 1
        else:
            self.broken.append(f"{promise}: {detail}" if str(detail) else promise)
        return held


@dataclass
class Tally:
    """All cases of one storm."""

    storm: str
    seconds: float = 0.0
    cases: list[Case] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def total(self, name: str) -> Counter[str]:
        """`faults` or `promises` over all cases."""
        return sum((vars(case)[name] for case in self.cases), Counter())

    def every(self, name: str) -> list[Any]:
        """Another field over all cases."""
        return [item for case in self.cases for item in vars(case)[name]]

    def facts(self) -> dict[str, Any]:
        """For --json."""
        return {
            "storm": self.storm,
            "cases": len(self.cases),
            "faults": dict(self.total("faults")),
            "kept": dict(self.total("promises")),
            "again": sorted(round(seconds, 2) for seconds in self.every("again")),
            "twice": self.every("twice"),
            "left": self.every("left"),
            "skipped": self.every("skipped"),
            "notes": self.every("notes"),
            "broken": [
                {"case": case.number, "what": what} for case in self.cases for what in case.broken
            ],
            "seconds": round(self.seconds, 1),
        }

    def row(self) -> list[str]:
        """Of the table."""
        again, twice = self.every("again"), self.every("twice")
        return [
            self.storm,
            f"{self.total('faults').total()}",
            f"{self.total('promises').total()}",
            f"{len(self.every('broken'))}",
            f"{statistics.median(again):.1f}" if again else "-",
            f"{max(again):.1f}" if again else "-",
            f"{sum(twice)}" if twice else "-",
            f"{max(twice)}" if twice else "-",
            f"{len(self.every('left'))}",
            f"{self.seconds / 60:.1f}",
        ]


def table(tallies: list[Tally]) -> str:
    """The one table, then what was injected and what broke."""
    rows = [list(COLUMNS), *(tally.row() for tally in tallies)]
    widths = [max(len(row[n]) for row in rows) for n in range(len(COLUMNS))]
    rows.insert(1, ["-" * width for width in widths])
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    for tally in tallies:
        for name in ("faults", "promises"):
            said = ", ".join(f"{kind} {n}" for kind, n in sorted(tally.total(name).items()))
            lines.append(f"{tally.storm}, {'kept' if name == 'promises' else name}: {said or '-'}")
        lines += [f"{tally.storm}, skipped: {why}" for why in sorted({*tally.every("skipped")})]
        lines += [f"{tally.storm}: {note}" for note in tally.every("notes")]
        lines += [f"{tally.storm}, left behind: {what}" for what in tally.every("left")[:20]]
    return "\n".join(lines)
