"""A day with a GPU in one command: what only a GPU can show, in under 9 minutes.

    make gpu [WHEELS=FOLDER] [GPU="--commit abc1234"]         or, from a bare checkout:
    python3 experiments/gpu/run.py                            all parts, on the first CUDA device
    python3 experiments/gpu/run.py --device cpu --tiny        tries every part out, in seconds
    python3 experiments/gpu/run.py --wheels FOLDER            fetches what a bare machine lacks

The machine needs torch with CUDA, transformers and safetensors; no network, no Ray, no DeepSpeed.
First it lists the packages that are missing beside these, and takes them from the folder that the
variable WHEELS names. Then the parts of plan.py run, most important first, each in a process of its
own with its own limit. results.json and results.md are renewed as numbers come, in $OUT or
runs/gpu/, with log.txt beside them. Exit code 1: a part failed or was cut off; 2: nothing ran.
"""

from __future__ import annotations

import argparse
import os
import platform
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import wheels
from cutoff import Outcome, run_part
from machine import ROOT, facts
from plan import PARTS, Part
from results import Results

WHOLE = 535.0  # seconds, wheels and facts included
QUIETLY = {  # for every part
    "HF_HUB_OFFLINE": "1",  # there is no network to wait for
    "TOKENIZERS_PARALLELISM": "false",
    "TORCHDYNAMO_DISABLE": "1",  # as in packs: nothing compiles, and its import takes seconds
    "PYTHONUNBUFFERED": "1",
}


def main(argv: Sequence[str], parts: Sequence[Part] = PARTS) -> int:
    """The exit code."""
    began = time.monotonic()
    args = arguments(argv)
    if args.wheels:
        return wheels.download(args.wheels, args.names, args.for_python, args.for_machine)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a part ends with us
    with tempfile.TemporaryDirectory(prefix="rayft-gpu-day-") as name:
        scratch = Path(name)
        environment = _environment(args, scratch)
        try:
            _packages(scratch / "site")
            known = facts(args.device, args.tiny, environment, args.commit)
        except RuntimeError as error:
            print(f"nothing ran: {error}")
            return 2
        found = Results(Path(os.environ.get("OUT") or ROOT / "runs" / "gpu"), known)
        print("".join(f"{name}: {value}\n" for name, value in known.items()), flush=True)
        return day(args, parts, found, environment, scratch, began + args.seconds)


def day(
    args: argparse.Namespace,
    parts: Sequence[Part],
    found: Results,
    environment: dict[str, str],
    scratch: Path,
    end: float,
) -> int:
    """All parts, one after another, until `end` (of the monotonic clock)."""
    options = ["--device", args.device, "--scratch", str(scratch), *(["--tiny"] * args.tiny)]
    with (found.folder / "log.txt").open("wb") as log:
        for number, part in enumerate(parts):
            left = end - time.monotonic()
            later = sum(other.limit for other in parts[number + 1 :])
            if left < 1:
                outcome = Outcome("skipped", 0.0, {}, "no time was left for it")
            else:
                part = replace(part, limit=allowed(part.limit, left, later))
                name = part.name

                def seen(seconds: float, numbers: dict[str, Any], name: str = name) -> None:
                    found.put(name, Outcome("running", seconds, numbers))

                seen(0.0, {})
                outcome = run_part(part, options, environment, scratch, log, seen)
            found.put(part.name, outcome)
            print(f"{outcome.status:8} {outcome.seconds:6.1f} s  {part.name}", end="")
            print(f": {outcome.reason}" if outcome.reason else "", flush=True)
    print(f"\n{found.table()}\nwritten: {found.folder}/results.json, results.md, log.txt")
    wrong = [n for n, one in found.parts.items() if one.status in ("failed", "timeout")]
    if wrong:
        print(f"FAILED: {', '.join(wrong)}; see {found.folder}/log.txt")
    return int(bool(wrong))


def allowed(limit: float, left: float, later: float) -> float:
    """Seconds of a part: its limit, and up to half of it more where earlier parts left that over.

    Args:
        left, later: seconds until the end, and of them the limits of the parts behind it.
    """
    return min(left, max(limit, min(1.5 * limit, left - later)))


def _packages(site: Path) -> None:
    """List what is missing, take it from $WHEELS. Raises RuntimeError where it is not there."""
    if absent := wheels.absent_givens():
        raise RuntimeError(f"this Python ({sys.executable}) has no {', '.join(absent)}")
    needs, folder = wheels.missing(), os.environ.get("WHEELS")
    if not needs:
        print("every package that is needed is here")
        return
    given = Path(folder) if folder else None
    print(f"missing beside {', '.join(wheels.GIVEN)}:\n{wheels.told(needs, given)}", flush=True)
    if given:
        wheels.install(needs, given, site)
    lacking = [need for need in needs if not (given and wheels.in_folder(given, need))]
    if lacking:
        print(wheels.advice(lacking), flush=True)
    if hard := [need.package for need in lacking if not need.optional]:
        raise RuntimeError(f"these are needed: {', '.join(hard)}")


def _environment(args: argparse.Namespace, scratch: Path) -> dict[str, str]:
    """Of every part."""
    former = os.environ.get("PYTHONPATH")
    ours = [scratch / "site", ROOT, ROOT / "experiments/bench", ROOT / "experiments/losses"]
    paths = [*map(str, ours), *([former] if former else [])]
    env = {**os.environ, **QUIETLY, "PYTHONPATH": os.pathsep.join(paths)}
    env["TMPDIR"] = str(scratch)  # what a part that is cut off leaves goes with the rest
    if args.device == "cpu":
        env |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return env


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="toy sizes: does every part run")
    parser.add_argument("--seconds", type=float, default=WHOLE, help="for everything")
    parser.add_argument("--commit", help="of this checkout, where git cannot say it")
    parser.add_argument("--wheels", type=Path, metavar="FOLDER", help="fetch them there, no more")
    parser.add_argument("--names", nargs="+", default=[], help="of the wheels to fetch")
    parser.add_argument("--for-python", default=here, help="of the machine they are for")
    parser.add_argument("--for-machine", default=platform.machine())
    args = parser.parse_args(argv)
    if args.device == "cpu" and not args.tiny and not args.wheels:
        parser.error("--device cpu goes with --tiny: the real sizes need a GPU")
    return args


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
