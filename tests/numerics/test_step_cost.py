"""What a step costs beside its arithmetic: what is sent, and what makes the host wait.

Counts, not times: rayft against the plain loops that an engineer writes, on two ranks (gloo).
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections import Counter
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.append(str(Path(__file__).parents[2] / "experiments" / "bench"))

import train_plain
from _common import RayftLoop, fresh, model_folder, parse, rows, run_of
from _ranks import collectives

from rayft.compose.assemble import build, strategy_of
from rayft.config.run import FullSpec, LoraSpec
from rayft.config.strategies import DdpSpec
from rayft.core.batch import Batch
from rayft.data.stream import TrainStream

CPU = torch.device("cpu")
WORLD, SETTLED = (
    2,
    4,
)  # steps until nothing of a first step is left (gradient check, ZeRO-3's trace)


def small() -> argparse.Namespace:
    """The benchmark's arguments at its smallest size."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--accumulation", type=int, default=2)
    return parse(parser, train_plain.PRESETS, ["--quick", "--device", "cpu"])


def count(rank: int, world: int, folder: Path, args: argparse.Namespace, model: Path) -> Any:
    """{strategy: {loop: {collective: how often in a step}}} on this rank."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world
    )
    found = {"ddp": ddp(rank, world, folder, args, model)}
    for stage in (2, 3):
        run = train_plain.run_for(args, model, stage, world)
        table = rows([args.length] * run.train.global_batch * 8, args.vocab, 0)
        source = TrainStream(
            table, (1.0,), 0, run.train.global_batch, args.micro_batch, args.length, False, 2
        )
        stream = train_plain.Cycle(source, rank, world)
        loops = {
            "plain": train_plain.PlainLoop(run, stream, CPU, chunked=True),
            "rayft": train_plain.OurLoop(run, table, stream, CPU, folder / str(stage)),
        }
        for loop in loops.values():
            loop.steps(SETTLED)
        found[f"zero{stage}"] = {name: collectives(loop.steps) for name, loop in loops.items()}
    dist.destroy_process_group()
    return found


def ddp(rank: int, world: int, folder: Path, args: argparse.Namespace, model: Path) -> Any:
    """The same for DistributedDataParallel by hand."""
    each = args.micro_batch * args.accumulation
    run = run_of(
        args,
        model,
        DdpSpec(),
        global_batch=each * world,
        micro_batch=args.micro_batch,
        max_length=args.length,
    )
    table = rows([args.length] * run.train.global_batch * 8, args.vocab, 0)
    ours = RayftLoop(run, table, CPU, folder / "ddp")
    window = ours.parts.stream.window(1, rank, world)
    plain = DistributedDataParallel(build(run, CPU, strategy_of(run, CPU)).model)

    def by_hand(steps: int) -> None:
        for _ in range(steps):
            for batch in window[:-1]:
                with plain.no_sync():
                    plain(input_ids=batch.input_ids, labels=batch.labels).loss.backward()
            plain(input_ids=window[-1].input_ids, labels=window[-1].labels).loss.backward()

    found = {}
    for name, steps in (("plain", by_hand), ("rayft", ours.steps)):
        steps(SETTLED)
        found[name] = collectives(steps)
    return found


@pytest.fixture(scope="module")
def counted() -> Mapping[str, Any]:
    """What each rank counted."""
    args = small()
    with model_folder(args) as model:
        return fresh(WORLD, 1, count, args, model)


@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3"])
def test_a_step_has_one_all_reduce_beside_those_of_the_plain_loop(counted, strategy):
    for rank in counted:
        plain, rayft = (rank[strategy][name] for name in ("plain", "rayft"))
        assert plain["c10d::allreduce_"] >= 1, "the gradients, or their norm, are not seen"
        assert rayft["c10d::allreduce_"] == plain["c10d::allreduce_"] + 1
        assert sum(rayft.values()) <= sum(plain.values()) + 1


# Operators whose result the host cannot know before the device has done all its work.
WAITING = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.nonzero.default,
}


class Waits(TorchDispatchMode):
    """Notes where a GPU's host would wait: the file that asks."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        masked = func is torch.ops.aten.index.Tensor and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if func in WAITING or masked:
            asking = traceback.extract_stack()[:-1]
            files = [Path(frame.filename) for frame in asking if "/torch/" not in frame.filename]
            self.seen.append(files[-1].name)
        return func(*args, **(kwargs or {}))


class Watched:
    """An engine; what it is given is on the device, so nothing in it may wait."""

    def __init__(self, engine: Any, waits: Waits) -> None:
        self.engine, self.waits = engine, waits
        self.rank, self.world, self.device = engine.rank, engine.world, engine.device
        self.lrs, self.shard, self.full = engine.lrs, engine.shard, engine.full

    @contextmanager
    def watching(self) -> Generator[None]:
        with self.waits:
            yield

    def forward(self, batch: Batch, scale: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with self.watching():
            return self.engine.forward(batch, scale)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        with self.watching():
            self.engine.backward(loss, last=last)

    def step(self, lrs: Mapping[str, float]) -> Tensor:
        with self.watching():
            return self.engine.step(lrs)


@pytest.mark.parametrize("method", [FullSpec(), LoraSpec(rank=4, alpha=8, dropout=0.1)])
def test_nothing_in_a_step_waits_for_the_device(method, tmp_path):
    args = small()
    with model_folder(args) as model:
        run = run_of(
            args, model, DdpSpec(), global_batch=4, micro_batch=2, max_length=args.length
        ).model_copy(update={"methods": (method,)})
        loop = RayftLoop(run, rows([args.length] * 32, args.vocab, 0), CPU, tmp_path)
    waits = Waits()
    stepper = replace(loop.stepper, engine=Watched(loop.parts.engine, waits))
    for step in range(1, 4):
        stepper.run(step, lambda: False, more=True)
    # Per micro-batch one question of transformers' own (are the rows packed?), and where the head
    # is trained one that models/chunked.py asks on a CPU only.
    asked = (
        ["masking_utils.py", "chunked.py"] if isinstance(method, FullSpec) else ["masking_utils.py"]
    )
    assert Counter(waits.seen) == dict.fromkeys(asked, 3 * 2)
