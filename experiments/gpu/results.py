"""What was found, as results.json and results.md, each replaced as a whole whenever there is more.

A cut-off day keeps what it has; a part that was under way says "running".
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cutoff import Outcome


class Results:
    """Both files in `folder`. `facts`: machine, versions, commit, command."""

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.facts = folder, facts
        self.parts: dict[str, Outcome] = {}
        self._write()

    def put(self, name: str, outcome: Outcome) -> None:
        """The newest of this part."""
        self.parts[name] = outcome
        self._write()

    def _write(self) -> None:
        parts = [{"name": name, **asdict(outcome)} for name, outcome in self.parts.items()]
        found = {**self.facts, "parts": parts}
        replace(self.folder / "results.json", json.dumps(found, indent=1) + "\n")
        replace(self.folder / "results.md", self.table())

    def table(self) -> str:
        """Markdown."""
        lines = [f"- {name}: {value}" for name, value in self.facts.items()]
        lines += ["", "| part | status | seconds | found |", "| --- | --- | --- | --- |"]
        for name, outcome in self.parts.items():
            cells = [outcome.reason] if outcome.reason else []
            cells += [f"{key} {_short(value)}" for key, value in outcome.numbers.items()]
            found = "; ".join(cells).replace("|", "/").replace("\n", " ")
            lines.append(f"| {name} | {outcome.status} | {outcome.seconds:.1f} | {found} |")
        return "\n".join(lines) + "\n"


def replace(path: Path, text: str) -> None:
    """A reader sees the old file or the new one."""
    new = path.with_name(f".{path.name}.new")
    with new.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


def _short(value: Any) -> str:
    """For the table; the JSON has every digit."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_short(one)}" for key, one in value.items())
    if isinstance(value, list):
        return f"[{len(value)} values]" if len(value) > 3 else str([_short(one) for one in value])
    return str(value)
