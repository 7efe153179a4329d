"""How a step happens: plain or data-parallel torch, DeepSpeed ZeRO."""

from __future__ import annotations

import torch

from rayft.config.run import ModelSpec, OptimSpec, TrainSpec
from rayft.config.strategies import DdpSpec, ZeroSpec
from rayft.core.protocols import Strategy
from rayft.strategies.ddp import DdpStrategy
from rayft.strategies.optim import group_lrs, schedule
from rayft.strategies.zero import ZeroStrategy

IMPLEMENTATIONS = {DdpSpec: DdpStrategy, ZeroSpec: ZeroStrategy}


def build(
    spec: DdpSpec | ZeroSpec,
    optim: OptimSpec,
    train: TrainSpec,
    model: ModelSpec,
    *,
    micro_batch: int,
    device: torch.device,
) -> Strategy:
    """The strategy of `spec` for this process and the process group that is up (ddp: or none;
    zero makes a group of one rank where there is none).

    `micro_batch` is rows per forward pass. Pairs that cannot work are refused by config/rules.py,
    before anything starts. Raises ConfigError (a contradicting DeepSpeed config) and
    InfeasibleError (offload that this machine cannot do).
    """
    precision = model.dtype if train.precision == "auto" else train.precision
    if isinstance(spec, DdpSpec):
        return DdpStrategy(optim, precision=precision, device=device)
    return ZeroStrategy(
        spec, optim, train, model, precision=precision, micro_batch=micro_batch, device=device
    )


__all__ = ["IMPLEMENTATIONS", "build", "group_lrs", "schedule"]
