"""`make chaos`: storms of faults against rayft, with a seed; one table of promises at the end.

    python experiments/chaos/run.py --seed 1 --storm single:2 --storm damage

A storm is made of cases; a case is decided by seed, storm and number alone (but for the machine's
timing), so one case can be repeated: --only NUMBER. Exit code 1 when a promise was broken.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

if TYPE_CHECKING:
    from commands import Commands
    from lab import Lab
    from tally import Tally

STORMS = {  # storm: whether its cases may run beside each other
    "single": True,
    "damage": True,
    "leases": False,
    "disk": False,
    "objects": False,
    "clock": False,
    "workers": False,
    "sweeps": False,
    "soak": False,
}


def main(argv: list[str] | None = None) -> int:
    """Run the storms that were asked for."""
    args = _arguments(argv)
    os.environ |= {"OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled", "RAYFT_DASHBOARD": "0"}
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    os.environ.pop("RAY_ADDRESS", None)
    from commands import Commands
    from lab import Lab
    from tally import table

    base = Path(tempfile.mkdtemp(prefix="chaos-", dir=args.folder))  # short: sockets lie below
    commands, tallies = Commands(base), []
    _ends_with_us(commands)
    lab = Lab(base, commands, args.seed, args.scale)
    lab.notes |= {key: json.loads(value) for key, _, value in (s.partition("=") for s in args.set)}
    try:
        for wish in args.storm or STORMS:
            name, _, count = wish.partition(":")
            tallies.append(_storm(name, int(count or 0), args, lab))
    finally:
        commands.close()
    print(json.dumps([tally.facts() for tally in tallies]) if args.json else table(tallies))
    broken = _tell(tallies, args)
    if broken:
        print(f"what the broken cases left is in {base}", file=sys.stderr)
    else:
        shutil.rmtree(base, ignore_errors=True)
    return int(broken)


def _ends_with_us(commands: Commands) -> None:
    """SIGTERM (a time limit's, as a rule) also ends what was started; no case is waited for."""

    def end(*_: object) -> None:
        commands.close()
        os._exit(143)

    signal.signal(signal.SIGTERM, end)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="experiments/chaos/run.py",
        description=f"Storms: {', '.join(STORMS)}; see experiments/chaos/README.md.",
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--storm", action="append", metavar="NAME[:CASES]", help="default: all")
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of cases")
    parser.add_argument("--only", type=int, action="append", metavar="CASE", help="again")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
    wishes = 'of a storm: kills=3, kinds=["lora"], fresh=true'
    parser.add_argument("--set", action="append", default=[], metavar="KEY=JSON", help=wishes)
    parser.add_argument("--folder", default="/tmp", help="where the runs go")
    parser.add_argument("--json", action="store_true", help="the table as JSON")
    args = parser.parse_args(argv)
    unknown = {wish.partition(":")[0] for wish in args.storm or ()} - set(STORMS)
    if unknown:
        parser.error(f"no storm {', '.join(sorted(unknown))}; storms: {', '.join(STORMS)}")
    return args


def _storm(name: str, count: int, args: argparse.Namespace, lab: Lab) -> Tally:
    """All cases of one storm."""
    from tally import Case, Tally

    print(f"== {name}", file=sys.stderr, flush=True)
    storm, began, tally = importlib.import_module(name), time.monotonic(), Tally(name)
    numbers = args.only or range(count or max(1, round(storm.CASES * args.scale)))

    def one(number: int) -> None:
        case = Case(name, number)
        try:
            storm.run(case, lab)
        except Exception:  # a case that cannot be judged is a broken promise, not the end
            case.broken.append(f"the case itself failed: {traceback.format_exc()[-3000:]}")
        tally.cases.append(case)
        mark = f"BROKEN {case.broken[0][:300]}" if case.broken else "kept"
        facts = ", ".join(f"{kind} {n}" for kind, n in case.faults.items())
        print(f"{case.name}: {facts or 'no fault'}: {mark}", file=sys.stderr, flush=True)

    try:
        storm.prepare(lab)
        with ThreadPoolExecutor(args.jobs if STORMS[name] else 1) as pool:
            list(pool.map(one, numbers))
    finally:
        if "close" in vars(storm):
            storm.close(lab)
    tally.cases.sort(key=lambda case: case.number)
    tally.seconds = time.monotonic() - began
    return tally


def _tell(tallies: list[Tally], args: argparse.Namespace) -> bool:
    """Say what was broken, and how to see it again; whether anything was."""
    broken = [case for tally in tallies for case in tally.cases if case.broken]
    for case in broken:
        again = ["python", "experiments/chaos/run.py", "--seed", str(args.seed)]
        again += ["--storm", case.storm, "--only", str(case.number)]
        again += [part for wish in args.set for part in ("--set", wish)]
        print(f"BROKEN {case.name}: {shlex.join(again)}", file=sys.stderr)
        for what in case.broken:
            print("\n".join(f"    {line}" for line in what.splitlines()), file=sys.stderr)
    return bool(broken)


if __name__ == "__main__":
    sys.exit(main())
