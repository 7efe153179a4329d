"""What a DeepSpeed engine holds of each trained parameter, as checkpoint slices.

Stage 0 replicates (see slices). Stages 1 and 2 flatten each param group, pad it, and give every
rank an equal part: a parameter's piece on this rank is its `_hp_mapping` fragment, in float32, with
the moments beside it. Stage 3 cuts every parameter by itself into W pieces of ceil(n / W) elements,
the last ones padded. Padding is never exported.
Names of DeepSpeed's that are not documented (`_hp_mapping`, `fp32_partitioned_groups_flat`,
`fp16_partitioned_groups_flat`) are held by the save-and-load tests of every stage.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from rayft.core.errors import InfeasibleError, RayftError
from rayft.core.params import PartitionedParameter
from rayft.core.shards import PARAM, ParamSlice, ShardReader, StateShard
from rayft.strategies import slices
from rayft.strategies.optim import MOMENTS, adam_state


def whole_numel(param: nn.Parameter) -> int:
    """Elements of the whole parameter, wherever they are."""
    from deepspeed.runtime.zero.partition_parameters import is_zero_param

    if not is_zero_param(param):
        return param.numel()
    return cast(PartitionedParameter, param).ds_numel  # what DeepSpeed has just said


def cast_unsharded(params: list[nn.Parameter], dtype: torch.dtype) -> None:
    """Trained parameters made after loading (adapters) get the dtype DeepSpeed works in."""
    from deepspeed.runtime.zero.partition_parameters import is_zero_param

    for param in params:
        if not is_zero_param(param):
            param.data = param.data.to(dtype)


def _whole(name: str, tensor: Tensor | None) -> Tensor:
    """A copy on the CPU of what DeepSpeed gives for a full parameter."""
    if tensor is None:
        raise RayftError(f"DeepSpeed holds no full copy of {name}")
    return tensor.to(device="cpu", copy=True)


class ReplicatedState:
    """Stage 0: every rank holds everything."""

    def __init__(self, engine: Any, named: Mapping[str, nn.Parameter], rank: int, world: int):
        self._named, self._optimizer = named, engine.basic_optimizer
        self._rank, self._world = rank, world

    def shard(self) -> StateShard:
        return slices.adam_shard(self._named, self._optimizer, self._rank, self._world)

    def load(self, reader: ShardReader) -> None:
        slices.load_adam(self._named, self._optimizer, reader)

    def full(self) -> Iterator[tuple[str, Tensor]]:
        return slices.full_replicas(self._named)


class FragmentedState:
    """Stages 1 and 2: fragments of flat float32 groups."""

    def __init__(self, engine: Any, named: Mapping[str, nn.Parameter]) -> None:
        self._engine, self._named, self._optimizer = engine, named, engine.basic_optimizer
        self._flats: list[Tensor] = [g["params"][0] for g in self._optimizer.param_groups]
        for flat in self._flats:
            adam_state(self._optimizer, flat)

    def _pieces(self) -> Iterator[tuple[str, ParamSlice]]:
        """This rank's live slices, by name."""
        for name, param in self._named.items():
            piece = param._hp_mapping  # pyright: ignore[reportAttributeAccessIssue]  # see above
            if piece is None:  # all of it lies on other ranks
                continue
            flat = self._flats[piece.param_group_index]
            state = self._optimizer.state[flat]
            here = piece.hp_fragment_address
            tensors = {PARAM: flat, **{kind: state[kind] for kind in MOMENTS}}
            yield (
                name,
                ParamSlice(
                    tuple(param.shape),
                    piece.lp_fragment_address.start,
                    {k: t.detach().narrow(0, here.start, here.numel) for k, t in tensors.items()},
                ),
            )

    def shard(self) -> StateShard:
        step = self._optimizer.state[self._flats[0]]["step"]
        return StateShard(dict(self._pieces()), scalars={slices.STEP: float(step)})

    @torch.no_grad()
    def load(self, reader: ShardReader) -> None:
        shapes = {name: tuple(param.shape) for name, param in self._named.items()}
        slices.check_shapes(reader, shapes)
        for name, piece in self._pieces():
            for kind, tensor in piece.tensors.items():
                tensor.copy_(reader.read(name, kind, piece.start, piece.start + tensor.numel()))
        for flat in self._flats:
            self._optimizer.state[flat]["step"].fill_(reader.scalars[slices.STEP])
        self._engine.optimizer.update_lp_params()  # working copy from the master, then all-gather

    def full(self) -> Iterator[tuple[str, Tensor]]:
        from deepspeed.utils import safe_get_full_fp32_param

        for name, param in self._named.items():
            yield name, _whole(name, safe_get_full_fp32_param(param))


class PartitionedState:
    """Stage 3: a piece of every parameter.

    Where states are swapped to NVMe, the tensors are copies, exist after the first step only, and
    cannot be read back (DeepSpeed creates swapped states inside the step).
    """

    def __init__(
        self, engine: Any, named: Mapping[str, nn.Parameter], rank: int, swapped: bool
    ) -> None:
        self._engine, self._rank = engine, rank
        self._named = cast(Mapping[str, PartitionedParameter], named)  # DeepSpeed has cut them
        self._zero, self._optimizer = engine.optimizer, engine.basic_optimizer
        self._swapped = swapped
        if not swapped:
            for flat in self._zero.fp32_partitioned_groups_flat:
                adam_state(self._optimizer, flat)

    def _range(self, param: PartitionedParameter) -> tuple[int, int]:
        """[start, stop) without padding; empty where this rank holds padding only."""
        size = param.partition_numel()
        start = min(self._rank * size, param.ds_numel)
        return start, min(start + size, param.ds_numel)

    def shard(self) -> StateShard:
        from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

        pieces = {}
        for name, param in self._named.items():
            start, stop = self._range(param)
            if start == stop:
                continue
            tensors = {PARAM: safe_get_local_fp32_param(param)}
            tensors |= {kind: safe_get_local_optimizer_state(param, kind) for kind in MOMENTS}
            pieces[name] = ParamSlice(
                tuple(param.ds_shape),
                start,
                {kind: t.detach()[: stop - start] for kind, t in tensors.items()},
            )
        return StateShard(pieces, scalars={slices.STEP: self._step()})

    def _step(self) -> float:
        steps = {float(state["step"]) for state in self._optimizer.state.values()} or {0.0}
        if len(steps) > 1:
            raise RuntimeError(f"parameters have taken different numbers of steps: {steps}")
        return steps.pop()

    @torch.no_grad()
    def load(self, reader: ShardReader) -> None:
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        if self._swapped:
            raise InfeasibleError(
                "a run with offload: nvme cannot continue from a checkpoint",
                cause="DeepSpeed creates optimizer states on NVMe inside the first step",
                fix="continue with strategy.offload=cpu",
            )
        shapes = {name: tuple(param.ds_shape) for name, param in self._named.items()}
        slices.check_shapes(reader, shapes)
        self._zero.checkpoint_event_prologue()  # small parameters kept whole are cut again
        for name, param in self._named.items():
            start, stop = self._range(param)
            for kind in (PARAM, *MOMENTS):
                value = torch.zeros(param.partition_numel())
                if start < stop:
                    value[: stop - start] = reader.read(name, kind, start, stop)
                if kind == PARAM:
                    safe_set_local_fp32_param(param, value)
                else:
                    safe_set_local_optimizer_state(param, value, kind)
        for flat in self._zero.fp32_partitioned_groups_flat:
            self._optimizer.state[flat]["step"].fill_(reader.scalars[slices.STEP])
        masters = self._zero.fp32_partitioned_groups_flat
        for working, master in zip(self._zero.fp16_partitioned_groups_flat, masters, strict=True):
            working.data.copy_(master.data)
        self._zero.checkpoint_event_epilogue()  # and gathered from the new pieces

    def full(self) -> Iterator[tuple[str, Tensor]]:
        from deepspeed.utils import safe_get_full_fp32_param

        for name, param in self._named.items():
            yield name, _whole(name, safe_get_full_fp32_param(param))
