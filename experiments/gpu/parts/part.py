"""What every part is given, and how it tells what it found.

Numbers are passed on as soon as there are any: a part that is cut off keeps them. run.py puts the
checkout and its benches on the path.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parents[3]
SKIPPED = 77  # cutoff.py reads it as "skipped"


class Part:
    """A part of the day. `more`: options of its own, as {flag: default}."""

    def __init__(self, more: dict[str, str] | None = None) -> None:
        warnings.filterwarnings("ignore", category=FutureWarning)
        parser = argparse.ArgumentParser()
        parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
        parser.add_argument("--tiny", action="store_true")
        parser.add_argument("--numbers", type=Path)
        parser.add_argument("--scratch", type=Path, required=True)
        for flag, default in (more or {}).items():
            parser.add_argument(flag, default=default)
        self.args = parser.parse_args()
        self.device, self.tiny = self.args.device, self.args.tiny
        self.numbers: dict[str, Any] = {}

    def note(self, **numbers: Any) -> None:
        """Add to what was found, so far."""
        self.numbers.update(numbers)
        print(numbers, flush=True)
        if self.args.numbers:
            new = self.args.numbers.with_suffix(".new")
            new.write_text(json.dumps(self.numbers))
            new.replace(self.args.numbers)

    def skip(self, reason: str) -> NoReturn:
        """It cannot run here."""
        self.note(reason=reason)
        sys.exit(SKIPPED)

    def fail(self, reason: str) -> NoReturn:
        """It ran, and what it found is wrong."""
        self.note(reason=reason)
        sys.exit(1)

    def need(self, module: str) -> None:
        """Skip without it."""
        if find_spec(module) is None:
            self.skip(f"{module} is not installed")

    def room(self, gib: float, of: str) -> None:
        """Skip where less is left in the scratch folder."""
        free = shutil.disk_usage(self.args.scratch).free / 2**30
        if free < gib:
            self.skip(f"{of} takes {gib:.0f} GiB in {self.args.scratch}, {free:.1f} are free")

    def folder(self, name: str) -> Path:
        """A new one of this part."""
        made = self.args.scratch / name
        made.mkdir(parents=True)
        return made
