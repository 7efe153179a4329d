"""Training speed of rayft: against a plain DeepSpeed loop, against TRL, and `rayft check`.

    python experiments/bench/train.py plain [--workers 2] [--stages 2 3] ...    see train_plain.py
    python experiments/bench/train.py trl   [--regimes equal packed skewed] ... see train_trl.py
    python experiments/bench/train.py check [--repeats 5]

Every mode takes --help; plain and trl take --quick (tiny sizes, which say nothing about speed).
Run it on a machine that does nothing else: a load average beside the table says whether it did.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
CONFIG = "experiments/quickstart/full.yaml"
CHECK = ["-m", "rayft", "check", CONFIG]


def check(argv: Sequence[str]) -> None:
    """Cold time (a fresh interpreter each) of `rayft check`, and whether torch gets imported."""
    parser = argparse.ArgumentParser(prog="train.py check", description=check.__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args(argv)
    seconds = []
    for _ in range(args.repeats):
        began = time.perf_counter()
        subprocess.run([sys.executable, *CHECK], cwd=ROOT, check=True, capture_output=True)
        seconds.append(time.perf_counter() - began)
    traced = subprocess.run(
        [sys.executable, "-X", "importtime", *CHECK],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    modules = {line.rpartition("|")[2].strip() for line in traced.stderr.splitlines()}
    heavy = sorted({"torch", "transformers", "ray", "deepspeed"} & modules)
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    print(f"rayft check {CONFIG}: {args.repeats} fresh processes, {cores} cores, load {load:.1f}")
    print(f"  best    {min(seconds):6.2f} s   first {seconds[0]:.2f} s, worst {max(seconds):.2f} s")
    print(f"  median  {statistics.median(seconds):6.2f} s   (target: under 2 s)")
    print(f"  modules {len(modules):6}     torch imported: {'torch' in heavy}   (target: False)")
    if heavy:
        raise SystemExit(f"imported: {', '.join(heavy)}")


def main() -> None:
    mode, *rest = sys.argv[1:] or ["--help"]
    if mode == "plain":
        import train_plain

        train_plain.main(rest)
    elif mode == "trl":
        import train_trl

        train_trl.main(rest)
    elif mode == "check":
        check(rest)
    else:
        raise SystemExit(__doc__)


if __name__ == "__main__":
    main()
