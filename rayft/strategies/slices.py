"""Checkpoint slices of parameters that every rank holds whole (DDP, ZeRO-0, one process).

Rank r of W owns elements [r n / W, (r + 1) n / W) of a flattened parameter of n elements: all
elements, once, and nobody holds padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from rayft.core.errors import StorageError
from rayft.core.protocols import ParamGroup
from rayft.core.shards import PARAM, ParamSlice, ShardReader, StateShard
from rayft.strategies.optim import MOMENTS, adam_state

STEP = "optimizer_step"  # scalar: updates applied so far, AdamW's t
PREFIX = "optim/"  # of 8-bit optimizer tensors among the whole ones


def trained(step: nn.Module, groups: list[ParamGroup]) -> dict[str, nn.Parameter]:
    """{name in `step`: parameter} of everything in `groups`, in the order of the module."""
    wanted = {id(param) for group in groups for param in group.params}
    named = {name: param for name, param in step.named_parameters() if id(param) in wanted}
    if len(named) != len(wanted):
        raise RuntimeError("a method trains parameters that are not in the step module")
    return named


def check_shapes(reader: ShardReader, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise StorageError unless the checkpoint holds exactly these parameters."""
    saved = reader.shapes()
    wrong = [
        f"{name}: saved {saved.get(name, 'nothing')}, the model has {shapes.get(name, 'nothing')}"
        for name in sorted(saved.keys() | shapes.keys())
        if tuple(saved.get(name, ())) != tuple(shapes.get(name, ())) or name not in saved
    ]
    if wrong:
        raise StorageError(
            "the checkpoint does not fit the model:\n" + "\n".join(wrong),
            cause="another base model or other methods wrote it",
        )


def even(numel: int, rank: int, world: int) -> tuple[int, int]:
    """[start, stop) of what `rank` owns of `numel` elements."""
    return rank * numel // world, (rank + 1) * numel // world


def adam_shard(
    named: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, rank: int, world: int
) -> StateShard:
    """This rank's even slices of replicated parameters and AdamW moments (live views)."""
    slices = {}
    for name, param in named.items():
        start, stop = even(param.numel(), rank, world)
        if start == stop:
            continue
        state = adam_state(optimizer, param)
        tensors = {PARAM: param, **{kind: state[kind] for kind in MOMENTS}}
        slices[name] = ParamSlice(
            tuple(param.shape),
            start,
            {kind: t.detach().reshape(-1)[start:stop] for kind, t in tensors.items()},
        )
    first = next(iter(named.values()))
    return StateShard(slices, scalars={STEP: float(adam_state(optimizer, first)["step"])})


@torch.no_grad()
def load_adam(
    named: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, reader: ShardReader
) -> None:
    """Read replicated parameters and AdamW moments back, whole, on every rank."""
    check_shapes(reader, {name: tuple(param.shape) for name, param in named.items()})
    for name, param in named.items():
        state = adam_state(optimizer, param)
        state["step"].fill_(reader.scalars[STEP])
        for kind, tensor in {PARAM: param, **{kind: state[kind] for kind in MOMENTS}}.items():
            tensor.copy_(reader.read(name, kind, 0, param.numel()).view(param.shape))


def bit8_shard(
    named: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, rank: int, world: int
) -> StateShard:
    """Even slices of the parameters; rank 0 adds the 8-bit states, whole (blocks are not cut)."""
    slices: dict[str, ParamSlice] = {}
    whole: dict[str, Tensor] = {}
    step = 0
    for name, param in named.items():
        start, stop = even(param.numel(), rank, world)
        if start < stop:
            flat = param.detach().reshape(-1)[start:stop]
            slices[name] = ParamSlice(tuple(param.shape), start, {PARAM: flat})
        state = optimizer.state[param]
        step = state["step"] if state else step
        if rank == 0:
            whole |= {f"{PREFIX}{name}/{k}": t for k, t in state.items() if torch.is_tensor(t)}
    return StateShard(slices, whole, {STEP: float(step)})


@torch.no_grad()
def load_bit8(
    named: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, reader: ShardReader
) -> None:
    """Read parameters and 8-bit optimizer states back, on every rank."""
    check_shapes(reader, {name: tuple(param.shape) for name, param in named.items()})
    whole = reader.whole(0)
    for name, param in named.items():
        param.copy_(reader.read(name, PARAM, 0, param.numel()).view(param.shape))
        head = f"{PREFIX}{name}/"
        state = {key.removeprefix(head): t for key, t in whole.items() if key.startswith(head)}
        optimizer.state[param].clear()
        if state:  # bitsandbytes builds nothing it finds here
            optimizer.state[param] |= {key: t.to(param.device) for key, t in state.items()}
            optimizer.state[param]["step"] = int(reader.scalars[STEP])


def full_replicas(named: Mapping[str, nn.Parameter]) -> Iterator[tuple[str, Tensor]]:
    """(name, float32 copy on CPU)."""
    for name, param in named.items():
        yield name, param.detach().to(device="cpu", dtype=torch.float32, copy=True)
