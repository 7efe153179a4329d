"""Every worker holds everything: one process, or torch DistributedDataParallel.

    g = sum_ranks sum_micro-batches grad(loss part)

The loop's losses are parts of one global mean, so gradients are *summed* over ranks; DDP averages
them, hence the factor `world` on every loss. Gradients travel once per step: every forward runs
under `no_sync`, and the backward pass of the last micro-batch arms DDP's reducer, so that buckets
still leave while it runs (Li et al. 2020, arXiv 2006.15704).
Precision bf16: fp32 parameters for what trains, arithmetic under torch.autocast(bfloat16), a
frozen bf16 base stays bf16. fp32: no autocast.
Every trained parameter must take part in every forward pass (true of full and LoRA), so unused
ones are not searched for.
Left out: fp16 with loss scaling, FSDP.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rayft.config.run import OptimSpec
from rayft.core.batch import Batch
from rayft.core.protocols import ParamGroup
from rayft.core.shards import ShardReader, StateShard
from rayft.strategies import slices
from rayft.strategies.optim import (
    assert_groups,
    build_optimizer,
    clipped_step,
    read_lrs,
    set_lrs,
)


class DdpStrategy:
    """Replicas: of one process, or of all ranks of the process group that is up."""

    def __init__(self, optim: OptimSpec, precision: str, device: torch.device) -> None:
        self.optim, self.precision, self.device = optim, precision, device
        self.quant_storage: torch.dtype | None = None

    def loading(self) -> AbstractContextManager[None]:
        """Nothing special: every rank loads the model."""
        return nullcontext()

    def prepare(self, step: nn.Module, groups: list[ParamGroup]) -> DdpEngine:
        """Move `step` to the device, trained parameters to fp32 (fp64 stays), and wrap it where
        there are several ranks."""
        return DdpEngine(step, groups, self.optim, self.precision, self.device)


class DdpEngine:
    """See core.protocols.Engine."""

    def __init__(
        self,
        step: nn.Module,
        groups: list[ParamGroup],
        optim: OptimSpec,
        precision: str,
        device: torch.device,
    ) -> None:
        several = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if several else 0
        self.world = dist.get_world_size() if several else 1
        self.device = device
        self._optim = optim
        self._step = step.to(device)
        self._named = slices.trained(step, groups)
        for param in self._named.values():
            if param.dtype != torch.float64:
                param.data = param.data.float()
        self._ddp = None
        if self.world > 1:
            self._ddp = DistributedDataParallel(
                step,
                device_ids=[device.index or 0] if device.type == "cuda" else None,
                gradient_as_bucket_view=True,
            )
        self._optimizer = build_optimizer(groups, optim)
        assert_groups(self._optimizer, groups, optim.lr)
        self._autocast = precision == "bf16"

    def forward(self, batch: Batch, scale: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rows of the step module: {term: (B,)}."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._autocast):
            if self._ddp is None:
                return self._step(batch.inputs(), dict(scale))
            with self._ddp.no_sync():
                return self._ddp(batch.inputs(), dict(scale))

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of `loss`; at `last` sum them over ranks."""
        if self._ddp is None:
            loss.backward()
            return
        if not last:
            with self._ddp.no_sync():
                (loss * self.world).backward()
            return
        # Whether a micro-batch is the last is known only now, not in forward: arm the reducer here
        # as DDP.forward does outside no_sync (nothing is unused, so the list is empty).
        self._ddp.reducer.prepare_for_backward([])
        (loss * self.world).backward()

    def step(self, lrs: Mapping[str, float]) -> Tensor:
        """Clip, update, zero; the gradient norm before clipping, on the device."""
        set_lrs(self._optimizer, lrs)
        return clipped_step(self._optimizer, list(self._named.values()), self._optim.clip)

    def lrs(self) -> dict[str, float]:
        """Learning rates by group name."""
        return read_lrs(self._optimizer)

    def shard(self) -> StateShard:
        """Even flat slices; 8-bit states whole, on rank 0."""
        make = slices.adam_shard if self._optim.kind == "adamw" else slices.bit8_shard
        return make(self._named, self._optimizer, self.rank, self.world)

    def load(self, reader: ShardReader) -> None:
        """Parameters and optimizer state from any shards."""
        load = slices.load_adam if self._optim.kind == "adamw" else slices.load_bit8
        load(self._named, self._optimizer, reader)

    def measure(self, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """What the objective measures; inside `evaluating`."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._autocast):
            return self._step(batch.inputs(), None)

    @contextmanager
    def evaluating(self) -> Generator[None]:
        """No gradients, eval mode; ranks need not run the same number of forwards."""
        training = self._step.training
        self._step.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self._step.train(training)

    def full(self) -> Iterator[tuple[str, Tensor]]:
        """(name, float32 tensor on CPU) of every trained parameter."""
        return slices.full_replicas(self._named)
