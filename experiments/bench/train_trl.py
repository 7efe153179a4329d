"""rayft against TRL's SFTTrainer on the same random Llama, the same token rows, one process.

    python experiments/bench/train.py trl [--threads 2] [--regimes equal packed skewed] [--quick]

  equal   rows of one length, not packed on either side                  target: at least 1.0x
  packed  skewed lengths, packed by both; TRL's "bfd" makes its micro-batch padding-free, one row
          of all its tokens, so it also runs with a micro-batch of one packed row (trl_row), and the
          target holds against the faster of the two                     target: at least 1.0x
  skewed  skewed lengths, packed by rayft, padded by TRL (its default)   target: at least 1.5x
Lengths are log-normal. Packed steps hold as many tokens as padded ones on average, in as many
forward passes. Equal on both sides: fp32 weights, --dtype arithmetic, AdamW with weight decay,
clipping, constant learning rate, completion-only loss, no gradient checkpointing (TRL's default is
on; --gradient-checkpointing turns it on for both). Left as TRL has it: fused AdamW, loss in chunks,
its entropy and accuracy metrics, logging every 10 steps. Rows come tokenised; collation is timed on
both sides. tokens/s counts real tokens, between the ends of steps, the first ones dropped. Ways
take turns, a new model and a new trainer each time; peak memory: fresh processes, one way each.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from _common import (
    RayftLoop,
    fresh,
    header,
    model_folder,
    parse,
    peak_memory,
    ratios,
    rows,
    run_of,
    spread,
    synchronise,
)
from trl_side import Batching, measured, run_trl

from rayft.config.strategies import DdpSpec
from rayft.data.table import TokenTable

PRESETS = {
    "cpu": {
        **{"length": 128, "max_length": 512, "median": 90, "rows": 16, "micro_batch": 8},
        **{"steps": 8, "drop": 2, "rounds": 5},
    },
    "cuda": {
        **{"length": 1024, "max_length": 2048, "median": 350, "rows": 64, "micro_batch": 16},
        **{"steps": 30, "drop": 10, "rounds": 5},
    },
    "quick": {
        **{"length": 32, "max_length": 64, "median": 14, "rows": 16, "micro_batch": 8},
        **{"steps": 4, "drop": 2, "rounds": 2},
    },
}
SIGMA, SHORTEST = 1.0, 8  # of the log-normal lengths
TARGETS = {"equal": 1.0, "packed": 1.0, "skewed": 1.5}
WAYS = {
    "equal": ("rayft", "trl"),
    "packed": ("rayft", "trl", "trl_row"),
    "skewed": ("rayft", "trl"),
}


def skewed(args: argparse.Namespace, count: int) -> np.ndarray:
    """(count,) log-normal lengths, cut at max_length as both tools cut."""
    rng = np.random.default_rng(args.seed)
    drawn = rng.lognormal(math.log(args.median), SIGMA, count)
    return np.clip(drawn, SHORTEST, args.max_length).astype(int)


def documents(args: argparse.Namespace, regime: str) -> TokenTable:
    """More than all steps of a run take, so that no epoch ends in one."""
    count = args.rows * (args.steps + 4)
    lengths = [args.length] * count if regime == "equal" else skewed(args, count).tolist()
    return rows(lengths, args.vocab, args.seed)


def batching(args: argparse.Namespace, regime: str, way: str, table: TokenTable) -> Batching:
    """The same forward passes per step, and where packed the same tokens on average."""
    passes = max(1, args.rows // args.micro_batch)
    if regime == "equal" or (regime == "skewed" and way == "trl"):
        return Batching(args.micro_batch, passes, packed=False)
    tokens = args.rows * float(table.lengths.mean())
    each = max(1, round(tokens / args.max_length / passes))
    return Batching(1, each * passes, True) if way == "trl_row" else Batching(each, passes, True)


def run_rayft(args, model: Path, folder: Path, table: TokenTable, how: Batching) -> dict:
    """One run of rayft: tokens/s, ms per step, real share of positions, mean loss."""
    device = torch.device(args.device)
    run = run_of(
        args,
        model,
        DdpSpec(),
        global_batch=how.rows * how.passes,
        micro_batch=how.rows,
        max_length=args.max_length,
        packing=how.packed,
    )
    train = run.train.model_copy(update={"gradient_checkpointing": args.gradient_checkpointing})
    loop = RayftLoop(run.model_copy(update={"train": train}), table, device, folder)
    ends, seen, losses = [], [], []

    def after(result) -> None:
        synchronise(device)
        ends.append(time.perf_counter())
        seen.append(result.tokens_seen)
        losses.append(result.loss)

    loop.steps(args.steps, after)
    windows = [loop.parts.stream.window(step, 0, 1) for step in range(1, args.steps + 1)]
    positions = sum(batch.input_ids.numel() for window in windows for batch in window)
    mean = statistics.fmean(losses)
    return measured(args, ends, sum(seen[args.drop :]), sum(seen) / positions, mean)


def work(
    rank: int,
    world: int,
    folder: Path,
    args: argparse.Namespace,
    model: Path,
    regime: str,
    ways: Sequence[str],
    rounds: int,
) -> dict[str, Any]:
    """All rounds of a regime: what every run of every way measured; and the peak memory."""
    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    table = documents(args, regime)
    start = peak_memory(torch.device(args.device))
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    for turn in range(rounds):
        for way in ways if turn % 2 == 0 else tuple(reversed(ways)):
            job = (args, model, folder / f"{turn}-{way}", table)
            how = batching(args, regime, way, table)
            if way == "rayft":
                found[way].append(run_rayft(*job, how))
            else:
                found[way].append(run_trl(*job, how, probe=turn == 0 and len(ways) > 1))
    return {"found": found, "peak": peak_memory(torch.device(args.device)), "start": start}


def report(args: argparse.Namespace, regime: str, found: dict, peaks: dict[str, str]) -> None:
    """The table of one regime."""
    table = documents(args, regime)
    lengths = table.lengths
    middle, high = (int(value) for value in np.percentile(lengths, [50, 95]))
    print(
        f"{regime}: lengths mean {lengths.mean():.0f}, median {middle}, p95 {high}, max "
        f"{lengths.max()}; {args.rounds} rounds of {args.steps} steps, first {args.drop} dropped"
    )
    head = f"  {'':9}{'tokens/s':>28}{'ms/step':>26}{'step = passes x rows':>22}{'padding':>9}"
    print(f"{head}{'peak MiB':>16}{'loss':>8}")
    for way, runs in found.items():
        how = batching(args, regime, way, table)
        rate = spread([run["rate"] for run in runs], 0)
        ms = spread([run["ms"] for run in runs], 0)
        shape = f"{how.passes} x {how.rows} {'packed' if how.packed else 'rows'}"
        last = runs[-1]
        print(f"  {way:9}{rate:>28}{ms:>26}{shape:>22}{1 - last['real']:9.1%}", end="")
        print(f"{peaks.get(way, '-'):>16}{last['loss']:8.3f}")
    medians = {}
    for way in WAYS[regime][1:]:
        pairs = ratios(*([run["rate"] for run in found[each]] for each in ("rayft", way)))
        medians[way] = statistics.median(pairs)
        print(f"  rayft / {way:8} tokens/s {spread(pairs, 2)}")
    worst, target = min(medians.values()), TARGETS[regime]
    verdict = "not judged: tiny sizes" if args.quick else "met" if worst >= target else "MISSED"
    print(f"  target: at least {target}x: {verdict} ({worst:.2f}x)")
    for way in medians:
        for note in filter(None, found[way][0]["notes"]):
            print(f"  {way}: {note}")
    print(flush=True)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="train.py trl",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--regimes", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--gradient-checkpointing", action="store_true", help="on both sides")
    args = parse(parser, PRESETS, argv)
    if not 1 <= args.drop < args.steps:
        parser.error("--drop must be at least 1 and below --steps")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # TRL would take all of them
    header(args, 1, "trl")
    with model_folder(args) as model:
        for regime in args.regimes:
            job = (args, model, regime)
            (found,) = fresh(1, args.threads, work, *job, WAYS[regime], args.rounds)
            peaks = {}
            for way in WAYS[regime] if args.memory else ():
                (alone,) = fresh(1, args.threads, work, *job, (way,), 1)
                peaks[way] = f"{alone['peak'] >> 20} (+{(alone['peak'] - alone['start']) >> 20})"
            report(args, regime, found["found"], peaks)
