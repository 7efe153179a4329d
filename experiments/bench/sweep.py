"""A whole sweep, start to end: rayft against what people use today, and against pack: off.

    python experiments/bench/sweep.py [--ways rayft peer off alone] [--trials 32] [--steps 90]
    python experiments/bench/sweep.py --quality [--seeds 3] [--limit 100]

The peer is Ray Tune with one process per trial: TRL's SFTTrainer, PEFT, LoRA+ by PEFT's
optimizer, as many at a time as there are cores. Equal on both sides: the same fixed list of trials
over rank, alpha, lr and lr_ratio, builtin:tiny, the same tokenised rows, batch 8, cosine schedule,
128 held-out rows every 10 steps, ASHA (grace 10, factor 3), one thread per process. Each way runs
in a process of its own; the time is that of the whole command: start, data, trials, evaluation, and
for rayft also best/, export and report. For rayft it also says where the time went, from its own
ledger: until the first step of any trial, with its parts, and how long a pack was busy per step of
a trial. "alone" is three trials of the list, one after another, in one pack with one slot: the same
step with nothing beside it. On two cores that are one physical core it shares nothing, packs do.

--quality: one search space, each side with its own searcher and scheduler (sweep_quality.py), a
seed at a time; --limit bounds the seconds of each side's search.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import sweep_quality

ROOT = Path(__file__).parents[2]


def trials(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """The fixed list."""
    rng = random.Random(seed)
    return [
        {
            "methods.0.rank": rng.choice([4, 8, 16, 32]),
            "methods.0.alpha": rng.choice([8, 16, 32, 64]),
            "methods.0.lr_ratio": rng.choice([1, 4, 16]),
            "optim.lr": 10 ** rng.uniform(-4, -2),
        }
        for _ in range(count)
    ]


def config(args: argparse.Namespace, folder: Path, way: str, seed: int = 0) -> dict[str, Any]:
    """The sweep as rayft takes it.

    Args:
        way: auto | off: sweep.pack; alone.
    """
    listed = trials(args.trials)
    block: dict[str, Any] = {
        "space": {"trial": {"paired": listed[:3] if way == "alone" else listed}},
        "search": "grid",
        "scheduler": {"kind": "asha", "grace": 10, "factor": 3},
    }
    if way == "alone":
        block |= {"scheduler": "none", "packs": 1, "slots": 1}
    if args.quality:
        block = sweep_quality.block(args.limit, args.trials, args.prior)
    return {
        "name": "bench",
        "seed": seed,
        "model": "builtin:tiny",
        "methods": [{"kind": "lora", "rank": 8, "alpha": 16}],
        "data": {
            "train": "builtin:docstrings",
            "eval": [{"path": "builtin:docstrings", "split": "heldout", "samples": 128}],
            "max_length": 128,
            "cache": str(folder / "cache"),
        },
        "optim": {"lr": 1e-3, "schedule": "cosine", "warmup": 0.1},
        "train": {
            "steps": args.steps,
            "global_batch": 8,
            "micro_batch": 8,
            "eval_every": 10,
        },
        "scale": {"workers": 1, "gpus": 0, "cpus": 1},
        "storage": str(folder / way),
        "sweep": block | {"pack": "off" if way == "off" else "auto"},
    }


def rayft(args: argparse.Namespace, folder: Path, way: str, seed: int = 0) -> dict[str, Any]:
    """`rayft sweep` in a process of its own; seconds, the winner, where the time went."""
    path = folder / f"{way}.json"
    path.write_text(json.dumps(config(args, folder, way, seed)))
    began = time.time()
    command = [sys.executable, "-m", "rayft", "sweep", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env=_environment(), check=False)
    seconds = time.time() - began
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    return {"seconds": seconds, **_account(folder / way / "bench", began, seconds)}


def _account(home: Path, began: float, seconds: float) -> dict[str, Any]:
    """From sweep.json and the ledger."""
    from rayft.records.ledger import read_ledger
    from rayft.storage.folder import Storage

    record = json.loads((home / "sweep.json").read_text())
    book = read_ledger(Storage.open(str(home)))
    told = [report.time for trial in book.trials.values() for report in trial.reports]
    first = min(trial.began for trial in book.trials.values())
    last = max(trial.ended for trial in book.trials.values())
    found = {
        "history": [
            (report.time - began, report.metrics["eval_loss"])
            for trial in book.trials.values()
            if trial.status not in ("diverged", "failed")
            for report in trial.reports
            if "eval_loss" in report.metrics
        ],
        "best": record["best"]["metric"],
        "winner": record["best"]["params"],
        "steps": sum(trial.step for trial in book.trials.values()),
        **_start(record["start"], book.starts[0]["time"] - began),
        "first to last report": last - min(told),
        "best, export, report": began + seconds - last,
    }
    if book.packs:
        packs = list(book.packs.values())
        busy = sum(pack["busy"] for pack in packs)
        trained = sum(pack["seconds"] for pack in packs)
        found |= {
            "pack seconds spent in steps and evaluation": trained,
            "share of packs x (first trial to last report)": trained / len(packs) / (last - first),
            "busy ms per step of a trial": 1000 * trained / max(1, found["steps"]),
            "slots taken while a pack worked": busy / sum(p["slots"] * p["seconds"] for p in packs),
        }
    return found


def _start(start: dict[str, float], begun: float) -> dict[str, float]:
    """SweepRecord.start, in seconds from the command on.

    Args:
        begun: when the first line of the ledger was written, right after "data".
    """
    offset = begun - start["data"]
    names = sorted(start, key=lambda name: start[name])
    return {f"until {name}": offset + start[name] for name in names} | {"until config": offset}


def peer(args: argparse.Namespace, folder: Path, seed: int = 0) -> dict[str, Any]:
    """sweep_peer.py in a process of its own."""
    path = folder / "peer.json"
    how = {"trials": args.trials, "limit": args.limit} if args.quality else trials(args.trials)
    path.write_text(json.dumps({**config(args, folder, "auto", seed), "trials": how}))
    script = str(Path(__file__).with_name("sweep_peer.py"))
    began = time.time()
    command = [sys.executable, script, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env=_environment(), check=False)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    found = json.loads(done.stdout.splitlines()[-1])
    found["history"] = [(at - began, loss) for at, loss in found["history"]]
    first = min((at for at, _ in found["history"]), default=0.0)
    return {"seconds": time.time() - began, "until first report": first, **found}


def _environment() -> dict[str, str]:
    paths = f"{ROOT}{os.pathsep}{Path(__file__).parent}"
    quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "RAY_AUTH_MODE": "disabled"}
    return os.environ | quiet | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}


def quality(args: argparse.Namespace) -> None:
    """Both sides, a seed at a time."""
    ratios = []
    for seed in range(args.seeds):
        with tempfile.TemporaryDirectory(prefix="rayft-bench-") as folder:
            ours, theirs = rayft(args, Path(folder), "auto", seed), peer(args, Path(folder), seed)
        told = {"rayft": ours["history"], "peer": theirs["history"]}
        print(f"\nseed {seed}: {ours['steps']} and {theirs['steps']} steps of trials")
        ratios.append(sweep_quality.compare(seed, told))
        sweep_quality.summary(ratios)


def main() -> None:
    """Arguments; ways take turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ways", nargs="+", default=["rayft", "peer"])
    parser.add_argument("--trials", type=int, default=32)
    parser.add_argument("--steps", type=int, default=90)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--quality", action="store_true")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--limit", type=float, default=100.0, help="seconds of each side's search")
    parser.add_argument("--prior", nargs="*", default=[], help="earlier sweeps, for rayft's side")
    args = parser.parse_args()
    print("$ python", " ".join(sys.argv))
    print(f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f} at the start", flush=True)
    if args.quality:
        quality(args)
        return
    run = {
        "rayft": lambda folder: rayft(args, folder, "auto"),
        "off": lambda folder: rayft(args, folder, "off"),
        "alone": lambda folder: rayft(args, folder, "alone"),
        "peer": lambda folder: peer(args, folder),
    }
    times: dict[str, list[float]] = {way: [] for way in args.ways}
    busy: dict[str, float] = {}
    for number in range(args.rounds):
        for way in args.ways:
            with tempfile.TemporaryDirectory(prefix="rayft-bench-") as folder:
                found = run[way](Path(folder))
            times[way].append(found["seconds"])
            busy[way] = found.get("busy ms per step of a trial", 0.0)
            found.pop("history")
            print(f"\n{way}, round {number + 1}")
            for name, value in found.items():
                shown = f"{value:.2f}" if isinstance(value, float) else value
                print(f"  {name}: {shown}", flush=True)
    if busy.get("rayft") and busy.get("alone"):
        print(
            f"\nbusy time per step of a trial, rayft / alone: {busy['rayft'] / busy['alone']:.3f}"
        )
    for way in args.ways[1:]:
        pairs = [b / a for a, b in zip(times[args.ways[0]], times[way], strict=True)]
        print(f"\n{way} / {args.ways[0]}: {', '.join(f'{pair:.2f}' for pair in pairs)}")


if __name__ == "__main__":
    main()
