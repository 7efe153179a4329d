"""DeepSpeed ZeRO: optimizer state (1), gradients (2) and parameters (3) cut over the ranks.

Rajbhandari et al. 2019 (arXiv 1910.02054); offload: Ren et al. 2021 (arXiv 2101.06840). With P
trained parameters on W ranks in bf16, a rank holds about 2P + 2P + 12P/W bytes at stage 1,
2P + 14P/W at stage 2, 16P/W at stage 3 (weights, gradients, fp32 master and two moments); here
gradients are accumulated in fp32, which adds 2 bytes per gradient held.
Precision bf16: bf16 weights with an fp32 master (stage 0: fp32 weights under autocast, as ddp).
The optimizer is torch's AdamW in the run's named groups; DeepSpeed cuts it and calls it. It
averages gradients over ranks where the loop wants sums, hence the factor `world` on every loss.

Stage 3 recipes:
- A weight used outside its own module's forward (a head applied in chunks as `lm_head.weight`)
  needs nothing special inside the step module's forward: DeepSpeed sees the access, gathers the
  weight and registers it with the module whose forward is running, tied or not. It must be read
  as an attribute, in forward, on every call; a tensor kept from an earlier call is released. An
  autograd.Function that forms its gradients in the forward pass works too: the gradient that
  comes back to it is the loop's scale times `world`, not the scale itself.
- Every rank must run the same number of forward and backward passes, in evaluation too: each one
  gathers weights from all ranks.
- A quantised base is loaded whole on each rank first and cut in `prepare` (transformers cannot
  create quantised weights sharded).
Left out: fp16 with loss scaling, ZeRO++, MiCS, pipeline and tensor parallelism.
"""

from __future__ import annotations

import copy
import io
import logging
import os
import warnings
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rayft.config.run import ModelSpec, OptimSpec, TrainSpec
from rayft.config.strategies import ZeroSpec
from rayft.core.batch import Batch
from rayft.core.errors import InfeasibleError, RayftError
from rayft.core.protocols import ParamGroup
from rayft.core.shards import ShardReader, StateShard
from rayft.strategies.optim import assert_groups, build_optimizer, clip_gradients, read_lrs, set_lrs
from rayft.strategies.slices import trained
from rayft.strategies.zero_config import deepspeed_config
from rayft.strategies.zero_state import (
    FragmentedState,
    PartitionedState,
    ReplicatedState,
    cast_unsharded,
    whole_numel,
)

BUCKET = 500_000_000  # elements: DeepSpeed's own default, far too much memory for a small model

_started_in: dist.ProcessGroup | None = None  # the process group of the last strategy


def _refuse_nvme() -> None:
    """InfeasibleError with DeepSpeed's reason where its asynchronous I/O cannot be built here."""
    # DeepSpeed fills in the names of this module when it is imported
    from deepspeed.ops.op_builder import (
        AsyncIOBuilder,  # pyright: ignore[reportAttributeAccessIssue]  # see above
    )

    builder = AsyncIOBuilder()
    if not builder.is_compatible(verbose=False):
        raise InfeasibleError(
            "offload: nvme needs DeepSpeed's async_io, which cannot be built on this machine",
            cause=builder.error_log or "libaio with its headers is missing",
            fix="install libaio (Debian: libaio-dev), or use offload: cpu",
        )


def _environment(device: torch.device) -> None:
    """The process group that DeepSpeed will reuse (a process alone gets one of one rank), and what
    it reads from the environment."""
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    os.environ["RANK"] = str(dist.get_rank())
    os.environ["WORLD_SIZE"] = str(dist.get_world_size())
    os.environ["LOCAL_RANK"] = str(device.index or 0)
    import deepspeed  # reads the accelerator when it is imported

    _forget_former_group()
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed still calls these by their old names; the user can do nothing about it.
    renamed = r"`torch\.distributed\.(all_gather_into|reduce_scatter)_tensor` is deprecated"
    warnings.filterwarnings("ignore", message=renamed, category=FutureWarning)
    if device.type == "cpu":
        # An inference-only all-reduce that DeepSpeed otherwise compiles (a minute) at start-up.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _forget_former_group() -> None:
    """DeepSpeed keeps what it made of the first process group it saw; where that was destroyed
    (a second run in this process), it must go too. A test holds the private name."""
    global _started_in
    from deepspeed.utils import groups

    if _started_in is not None and _started_in is not dist.group.WORLD:
        release = groups._release_process_group_references  # pyright: ignore[reportPrivateUsage]  # see above
        release(group=None)
    _started_in = dist.group.WORLD


class ZeroStrategy:
    """DeepSpeed over the process group that is up, for a run that `config/rules.py` lets pass."""

    def __init__(
        self,
        spec: ZeroSpec,
        optim: OptimSpec,
        train: TrainSpec,
        model: ModelSpec,
        *,
        precision: str,
        micro_batch: int,
        device: torch.device,
    ) -> None:
        world = dist.get_world_size() if dist.is_initialized() else 1
        self.config = deepspeed_config(spec, optim, train, precision, micro_batch, world)
        _environment(device)
        if spec.offload == "nvme":
            _refuse_nvme()
        self._spec, self._optim, self._device = spec, optim, device
        self._sharded_loading = spec.stage == 3 and model.quant == "none"
        # ZeRO-3 cuts floating point tensors only, so 4-bit codes must lie in one.
        working = torch.bfloat16 if model.dtype == "bf16" else torch.float32
        self.quant_storage = working if spec.stage == 3 and model.quant == "nf4" else None

    @contextmanager
    def loading(self) -> Generator[None]:
        """Stage 3: transformers creates every parameter sharded, so no rank ever holds the model
        whole."""
        if not self._sharded_loading:
            yield
            return
        import deepspeed
        from transformers.integrations import HfDeepSpeedConfig

        deepspeed.init_distributed(dist_init_required=False)
        # transformers holds only a weak reference: sharded creation ends with this one.
        alive = HfDeepSpeedConfig(copy.deepcopy(self.config))
        try:
            yield
        finally:
            del alive

    def prepare(self, step: nn.Module, groups: list[ParamGroup]) -> ZeroEngine:
        """Hand `step` and an AdamW in `groups` to deepspeed.initialize."""
        return ZeroEngine(step, groups, self._spec, self._optim, self._device, self.config)


@contextmanager
def _unprinted() -> Generator[None]:
    """What DeepSpeed prints while it starts (memory tables, notices) goes to the debug log."""
    said = io.StringIO()
    with redirect_stdout(said):
        yield
    logging.getLogger(__name__).debug("DeepSpeed said:\n%s", said.getvalue())


class ZeroEngine:
    """See core.protocols.Engine."""

    def __init__(
        self,
        step: nn.Module,
        groups: list[ParamGroup],
        spec: ZeroSpec,
        optim: OptimSpec,
        device: torch.device,
        config: dict[str, Any],
    ) -> None:
        import deepspeed

        self.rank, self.world, self.device = dist.get_rank(), dist.get_world_size(), device
        self._stage, self._clip = spec.stage, optim.clip
        self._named = trained(step, groups)
        params = list(self._named.values())
        cast_unsharded(params, torch.bfloat16 if config["bf16"]["enabled"] else torch.float32)
        config = copy.deepcopy(config)
        bucket = min(BUCKET, sum(whole_numel(param) for param in params))
        config["zero_optimization"].setdefault("reduce_bucket_size", bucket)
        with _unprinted():
            self._engine, *_ = deepspeed.initialize(
                model=step,
                optimizer=build_optimizer(groups, optim),
                config=config,
                dist_init_required=False,
            )
        basic = self._engine.basic_optimizer
        self._optimizer = cast(torch.optim.Optimizer, basic)  # DeepSpeed's own are not asked for
        assert_groups(self._optimizer, groups, optim.lr)
        self._state = self._held(spec)

    def _held(self, spec: ZeroSpec) -> ReplicatedState | FragmentedState | PartitionedState:
        if spec.stage == 0:
            return ReplicatedState(self._engine, self._named, self.rank, self.world)
        if spec.stage == 3:
            return PartitionedState(self._engine, self._named, self.rank, spec.offload == "nvme")
        return FragmentedState(self._engine, self._named)

    def forward(self, batch: Batch, scale: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rows of the step module: {term: (B,)}."""
        return self._engine(batch.inputs(), dict(scale))

    def measure(self, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """What the objective measures; inside `evaluating`."""
        return self._engine(batch.inputs(), None)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of `loss`, summed over ranks; any number of micro-batches per step."""
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss * self.world, scale_wrt_gas=False)

    def step(self, lrs: Mapping[str, float]) -> Tensor:
        """Clip, update, zero; the gradient norm before clipping, on the device. From stage 1 on
        DeepSpeed itself makes the host wait for it."""
        set_lrs(self._optimizer, lrs)
        if self._stage == 0:
            return self._step_replicas()
        self._engine.step()  # skips the update itself where the norm is not finite
        norm = self._engine.get_global_grad_norm()
        if norm is None:
            raise RayftError("DeepSpeed gives no gradient norm after a step")
        return torch.as_tensor(norm, device=self.device)

    def _step_replicas(self) -> Tensor:
        """Stage 0 is torch's own optimizer on whole gradients: the norm is ours to check."""
        norm = clip_gradients(self._optimizer, list(self._named.values()), self._clip)
        self._engine.step()
        return norm

    def lrs(self) -> dict[str, float]:
        """Learning rates by group name."""
        return read_lrs(self._optimizer)

    def shard(self) -> StateShard:
        """This rank's slices of the fp32 master and the moments."""
        return self._state.shard()

    def load(self, reader: ShardReader) -> None:
        """Master, moments and step from any shards, then the working weights; collective."""
        self._state.load(reader)

    @contextmanager
    def evaluating(self) -> Generator[None]:
        """No gradients, eval mode. Stage 3: every rank must run the same number of forwards."""
        training = cast(nn.Module, self._engine.module).training  # DeepSpeed gives it no type
        self._engine.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self._engine.train(training)

    def full(self) -> Iterator[tuple[str, Tensor]]:
        """(name, float32 tensor on CPU) of every trained parameter; collective."""
        return self._state.full()
