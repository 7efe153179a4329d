"""Frozen tensors that belong to a method and not to the base (Method.kept), in checkpoints.

They are saved by rank 0 with every commit and compared when a run continues: drawn anew from
another seed or by another version of a library they would be other tensors, and what was trained
beside them would mean nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from rayft.core.errors import ConfigError
from rayft.core.protocols import Method
from rayft.core.shards import ShardReader

KEPT = "kept."  # before their names, among the whole tensors of a shard


def stored_kept(kept: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """As the shard of a rank holds them: the first one alone."""
    return {KEPT + name: tensor for name, tensor in kept.items() if rank == 0}


def kept_tensors(methods: Iterable[Method], model: nn.Module) -> dict[str, Tensor]:
    """What all of them keep, copied to the CPU: before a strategy moves or cuts it."""
    return {
        name: tensor.detach().cpu().clone()
        for method in methods
        for name, tensor in method.kept(model).items()
    }


def check_kept(kept: Mapping[str, Tensor], reader: ShardReader, commit: str) -> None:
    """Hold the method's tensors to those of a commit.

    Args:
        kept: of the model that is to continue.
        reader: the commit's; its first rank's shard is looked at only where something is kept.

    Raises:
        ConfigError: one is missing, of another shape or dtype, or differs.
    """
    saved = reader.whole(0) if kept else {}
    for name, tensor in kept.items():
        stored = saved.get(KEPT + name)
        if stored is None or stored.dtype != tensor.dtype or not torch.equal(stored, tensor):
            raise ConfigError(
                f"{name} is not what it was in checkpoint {commit}",
                cause="a frozen tensor that its method drew, not the base model, has changed",
                fix="continue with the versions of rayft, torch and peft that run.json names",
            )
