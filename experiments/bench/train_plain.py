"""rayft's loop against the plain loop that an engineer writes around DeepSpeed.

    python experiments/bench/train.py plain [--workers 2] [--threads 1] [--stages 2 3]
                                            [--seconds 240] [--no-memory] [--quick]

Same random Llama, same batches in memory, same DeepSpeed config, same AdamW and groups, W ranks:
  plain        loss = engine(input_ids, labels=labels).loss; engine.backward(loss); engine.step();
               it reads no loss and logs nothing, which no real loop can afford
  plain_chunk  the same with rayft's CausalPolicy as the loss: what differs is the loop alone
  rayft        compose.loop.train with a line of metrics.jsonl and a progress event per step
The ways take turns, a block of steps each, in the same processes and in alternating order; a
ratio is taken per turn, the median is reported, with its 95 % interval. Turns go on until the
intervals of both ratios lie wholly below or above the target, or for --seconds per stage.
Also: the collectives of one step of each way, and peak memory (fresh processes, one way each).
Targets: rayft / plain at most 1.02 where steps take 80 ms or more, the same loss, and at most one
collective more.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from _common import (
    RayftLoop,
    fresh,
    header,
    model_folder,
    parameters,
    parse,
    peak_memory,
    ratios,
    rows,
    run_of,
    spread,
)
from _ranks import agreed, block, collectives
from _verdict import decided, interval, verdict
from torch import Tensor, nn

from rayft.compose.assemble import build, strategy_of
from rayft.config.run import Run, ZeroSpec
from rayft.core.batch import IGNORE, Batch, Inputs
from rayft.core.row_facts import RowFacts
from rayft.data.stream import TrainStream
from rayft.records.series import read_series
from rayft.strategies.optim import build_optimizer
from rayft.strategies.zero_config import deepspeed_config

WAYS = ("plain", "plain_chunk", "rayft")
COMPARABLE = 0.08  # seconds of a step
FEWEST, LIMIT = 12, 240  # turns before anything is decided; seconds of a stage's turns
KEPT = 8  # windows in memory
SAME_LOSS = {"fp32": 1e-5, "bf16": 1e-2}  # relative, after tens of updates
PRESETS = {
    # about 100 ms a step on one core per rank; more tokens of a smaller model than the other
    # benchmarks, so that the loss works in chunks of a real size
    "cpu": {"hidden": 128, "layers": 4, "vocab": 2048, "micro_batch": 2, "length": 128}
    | {"block": 6, "turns": 1000, "warmup": 6},
    "cuda": {"micro_batch": 8, "length": 1024, "block": 10, "turns": 1000, "warmup": 10},
    "quick": {"micro_batch": 2, "length": 32, "block": 2, "turns": 3, "warmup": 1},
}


class Cycle:
    """Stream: the first windows of `source` in memory, over and over."""

    def __init__(self, source: TrainStream, rank: int, world: int) -> None:
        self.source = source
        self.windows = [source.window(step + 1, rank, world) for step in range(KEPT)]

    def window(self, step: int, rank: int, world: int) -> list[Batch]:
        return self.windows[step % KEPT]

    def facts(self, step: int) -> RowFacts:
        return self.source.facts(step % KEPT + 1)


class ChunkedMean(nn.Module):
    """forward(inputs of a batch) -> mean loss of a micro-batch through rayft's policy."""

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, inputs: Inputs) -> Tensor:
        batch = Batch.of(inputs)
        count = (batch.targets() != IGNORE).sum()
        scale = (1.0 / count).expand(batch.rows)
        return (self.policy.row_nll(batch, scale) * scale).sum()


class PlainLoop:
    """The loop by hand."""

    def __init__(self, run: Run, stream: Cycle, device: torch.device, chunked: bool) -> None:
        import deepspeed

        built = build(run, device, strategy_of(run, device))
        train, precision = run.train, run.train.precision
        world = dist.get_world_size()
        self.engine, *_ = deepspeed.initialize(
            model=ChunkedMean(built.step.policy) if chunked else built.model,
            optimizer=build_optimizer(list(built.groups), run.optim),
            config=deepspeed_config(
                run.strategy, run.optim, train, precision, train.micro_batch, world
            ),
            dist_init_required=False,
        )
        self.stream, self.device, self.chunked = stream, device, chunked
        self.step, self.last = 0, torch.zeros(())

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.step += 1
            losses = [self.micro(batch) for batch in self.stream.window(self.step, 0, 1)]
            self.last = torch.stack(losses)

    def micro(self, batch: Batch) -> Tensor:
        if self.chunked:
            loss = self.engine(batch.to(self.device).inputs())
        else:
            ids, labels = batch.input_ids.to(self.device), batch.labels.to(self.device)
            loss = self.engine(input_ids=ids, labels=labels).loss
        self.engine.backward(loss)
        self.engine.step()
        return loss.detach()

    def loss(self) -> float:
        """Of the last step, over all ranks."""
        mean = self.last.mean().double()
        dist.all_reduce(mean)
        return float(mean) / dist.get_world_size()


class OurLoop:
    """rayft, with the loss of the last step read from the metrics it wrote."""

    def __init__(
        self, run: Run, table: Any, stream: Cycle, device: torch.device, folder: Path
    ) -> None:
        self.loop = RayftLoop(run, table, device, folder, stream)
        self.steps = self.loop.steps

    def loss(self) -> float | None:
        return read_series(self.loop.session.storage)[-1]["loss"] if dist.get_rank() == 0 else None


def run_for(args: argparse.Namespace, model: Path, stage: int, world: int) -> Run:
    """One DeepSpeed config for every way; the bucket is what rayft would choose by itself."""
    bucket = {"zero_optimization": {"reduce_bucket_size": min(500_000_000, parameters(args))}}
    spec = ZeroSpec(stage=stage, deepspeed=bucket)
    each = args.micro_batch * args.accumulation
    return run_of(
        args,
        model,
        spec,
        global_batch=each * world,
        micro_batch=args.micro_batch,
        max_length=args.length,
    )


def work(
    rank: int,
    world: int,
    folder: Path,
    args: argparse.Namespace,
    model: Path,
    stage: int,
    ways: Sequence[str],
    turns: int,
) -> dict[str, Any]:
    """One rank: seconds per step of every turn, losses, peak memory above that of the imports."""
    device = torch.device(args.device, rank) if args.device == "cuda" else torch.device("cpu")
    if args.device == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if args.device == "cuda" else "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world,
        timeout=timedelta(minutes=5),
    )
    run = run_for(args, model, stage, world)
    table = rows([args.length] * run.train.global_batch * KEPT, args.vocab, args.seed)
    source = TrainStream(
        table, (1.0,), args.seed, run.train.global_batch, args.micro_batch, args.length, False, 2
    )
    stream = Cycle(source, rank, world)
    start = peak_memory(device)
    loops = {
        way: OurLoop(run, table, stream, device, folder / "run")
        if way == "rayft"
        else PlainLoop(run, stream, device, way == "plain_chunk")
        for way in ways
    }
    for loop in loops.values():
        loop.steps(args.warmup)
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    began = time.perf_counter()
    for turn in range(turns):
        for way in ways if turn % 2 == 0 else tuple(reversed(ways)):
            seconds[way].append(block(loops[way].steps, args.block, device))
        over = decided(pairs(seconds)) or time.perf_counter() - began > args.seconds
        if turn + 1 >= FEWEST and agreed(over, device):
            break
    losses = {way: loop.loss() for way, loop in loops.items()}
    peak = peak_memory(device)
    sent = {way: collectives(loop.steps) for way, loop in loops.items()}
    dist.destroy_process_group()
    return {"seconds": seconds, "loss": losses, "peak": peak, "start": start, "sent": sent}


def pairs(seconds: dict[str, list[float]]) -> list[list[float]]:
    """The ratios that are judged, of the ways that are here."""
    others = [way for way in ("plain", "plain_chunk") if {"rayft", way} <= seconds.keys()]
    return [ratios(seconds["rayft"], seconds[way]) for way in others]


def report(args: argparse.Namespace, stage: int, found: dict[str, Any], peaks: dict) -> None:
    """The table of one stage."""
    seconds, losses = found["seconds"], found["loss"]
    tokens = args.micro_batch * args.accumulation * args.workers * args.length
    print(
        f"ZeRO-{stage}: {args.workers} ranks x {args.accumulation} micro-batches x "
        f"{args.micro_batch} rows x {args.length} tokens; {len(seconds['plain'])} turns of "
        f"{args.block} steps"
    )
    print(f"  {'':12}{'ms/step':>28}{'tokens/s':>12}{'peak MiB':>20}{'last loss':>12}")
    for way in WAYS:
        rate = tokens / statistics.median(seconds[way])
        timed = spread([1e3 * each for each in seconds[way]])
        print(f"  {way:12}{timed:>28}{rate:12.0f}{peaks.get(way, '-'):>20}{losses[way]:12.6f}")
    for way in ("plain", "plain_chunk"):
        measured = ratios(seconds["rayft"], seconds[way])
        low, high = interval(measured)
        print(f"  rayft / {way:12} time {statistics.median(measured):.3f} ", end="")
        long_enough = not args.quick and statistics.median(seconds[way]) >= COMPARABLE
        print(f"(95 % interval {low:.3f} .. {high:.3f})   ", end="")
        more = [1e3 * (a - b) for a, b in zip(seconds["rayft"], seconds[way], strict=True)]
        print(f"{statistics.median(more):+.2f} ms/step   ", end="")
        print("loop alone; " if way == "plain_chunk" else "loop and loss; ", end="")
        print(verdict(low, high) if long_enough else "not judged: tiny, or steps under 80 ms")
    plain = losses["plain"]
    gap = max(abs(value - plain) / abs(plain) for value in losses.values())
    same = "the same" if gap <= SAME_LOSS[args.dtype] else "NOT the same"
    print(f"  losses after {args.warmup + len(seconds['plain']) * args.block} steps: ", end="")
    print(f"{same} (largest relative gap {gap:.1e})")
    sent = {way: sum(found["sent"][way].values()) for way in WAYS}
    print("  collectives in a step:", ", ".join(f"{way} {n}" for way, n in sent.items()), "\n")


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="train.py plain",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--accumulation", type=int, default=2, help="micro-batches per step")
    parser.add_argument("--stages", type=int, nargs="+", default=None, help="ZeRO stages (2 3)")
    parser.add_argument("--seconds", type=float, default=LIMIT, help="of a stage's turns, at most")
    args = parse(parser, PRESETS, argv)
    stages = args.stages or ([2] if args.quick else [2, 3])
    header(args, args.workers)
    with model_folder(args) as model:
        for stage in stages:
            found = fresh(args.workers, args.threads, work, args, model, stage, WAYS, args.turns)
            peaks = {}
            for way in WAYS if args.memory else ():
                alone = fresh(args.workers, args.threads, work, args, model, stage, (way,), 1)
                top = max(alone, key=lambda each: each["peak"])
                peaks[way] = f"{top['peak'] / 2**20:.0f} (+{(top['peak'] - top['start']) >> 20})"
            report(args, stage, found[0], peaks)
