"""Frozen tensors that belong to a method and not to the base (Method.kept), in checkpoints.

They are saved by rank 0 with every commit and compared when a run continues: drawn anew from
another seed or by another version of a library they would be other tensors, and what was trained
beside them would mean nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rayft.core.errors import ConfigError

KEPT = "kept."  # before their names, among the whole tensors of a shard


def stored_kept(kept: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """As the shard of a rank holds them: the first one alone."""
    return {KEPT + name: tensor for name, tensor in kept.items() if rank == 0}


def check_kept(kept: Mapping[str, Tensor], saved: Mapping[str, Tensor], commit: str) -> None:
    """Hold the method's tensors to those of a commit.

    Args:
        kept: of the model that is to continue.
        saved: the whole tensors of the commit's rank 0.

    Raises:
        ConfigError: one is missing, of another shape, or differs.
    """
    for name, tensor in kept.items():
        stored = saved.get(KEPT + name)
        if stored is None or not torch.equal(stored, tensor):
            raise ConfigError(
                f"{name} is not what it was in checkpoint {commit}",
                cause="a frozen tensor that its method drew, not the base model, has changed",
                fix="continue with the versions of rayft, torch and peft that run.json names",
            )
