"""A small training state over W ranks that tests save and compare; child processes import it."""

from __future__ import annotations

import os

import torch

from rayft.checkpoint.reader import Commit
from rayft.checkpoint.writer import CheckpointWriter
from rayft.core.shards import ParamSlice, StateShard
from rayft.storage import failpoints
from rayft.storage.folder import Storage
from rayft.storage.retry import RetryPolicy

QUICK = RetryPolicy(attempts=3, first=0.001, longest=0.002)
KINDS = ("param", "exp_avg", "exp_avg_sq")
SHAPES = {"w": (37, 5), "b": (7,), "scale": ()}


def full(step: int) -> dict[str, dict[str, torch.Tensor]]:
    """The whole state after `step`: {kind: {name: tensor}}, different for every step."""
    generator = torch.Generator().manual_seed(step)
    return {
        kind: {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
        for kind in KINDS
    }


def shard(step: int, rank: int, world: int) -> StateShard:
    """Rank's even part; with many ranks some hold nothing of the small parameters."""
    state, slices = full(step), {}
    for name, shape in SHAPES.items():
        numel = torch.Size(shape).numel()
        start, stop = numel * rank // world, numel * (rank + 1) // world
        if stop > start:
            tensors = {kind: state[kind][name].reshape(-1)[start:stop] for kind in KINDS}
            slices[name] = ParamSlice(shape, start, tensors)
    whole = {"rng": torch.tensor([rank, step, 255], dtype=torch.uint8)}
    return StateShard(slices, whole, {"optimizer_step": float(step)})


def writers(run: Storage, world: int, attempt: int = 1, **options) -> list[CheckpointWriter]:
    return [CheckpointWriter(run, rank, world, attempt, **options) for rank in range(world)]


def save(ranks: list[CheckpointWriter], step: int, *, best: bool = False) -> None:
    """All ranks save `step`, rank 0 last; returns when it is committed."""
    for rank, writer in reversed(list(enumerate(ranks))):
        writer.save(step, shard(step, rank, len(ranks)), {"rank": rank, "step": step}, best=best)
        writer.wait(60)


def assert_holds(commit: Commit, world: int = 3) -> None:
    """The checkpoint holds exactly the state of its step, read in the parts of `world` ranks."""
    state = full(commit.step)
    with commit.reader() as reader:
        assert reader.shapes() == SHAPES
        assert reader.scalars == {"optimizer_step": float(commit.step)}
        for rank in range(world):
            for name, piece in shard(commit.step, rank, world).slices.items():
                for kind, expected in piece.tensors.items():
                    stop = piece.start + expected.numel()
                    assert torch.equal(reader.read(name, kind, piece.start, stop), expected)
        for rank in range(commit.world):
            assert reader.whole(rank)["rng"].tolist() == [rank, commit.step, 255]
            assert commit.extra(rank) == {"rank": rank, "step": commit.step}
    for name, tensor in commit.consolidated():
        assert torch.equal(tensor, state["param"][name])


def story(folder: str, wish: str) -> None:
    """What a child process does until it is killed: resume nothing, save steps 2 to 4 of attempt 2.

    Steps 2 and 3 commit beside what is there, step 4 also deletes an old one.
    """
    if wish:
        os.environ[failpoints.VARIABLE] = wish
    failpoints.hits.clear()
    ranks = writers(Storage.open(folder, QUICK), 2, attempt=2, deadline=20.0)
    for step in (2, 3, 4):
        save(ranks, step)


def prepared(folder: str) -> Storage:
    """Attempt 1 committed step 1 and was cut off while it wrote step 2."""
    run = Storage.open(folder, QUICK)
    save(writers(run, 2, attempt=1), 1)
    run.write_bytes("checkpoints/step-2-1/rank-0.safetensors", b"half")
    return run
