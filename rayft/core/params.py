"""Sizes of parameters that may live elsewhere: ZeRO-3 leaves an empty tensor behind and keeps the
true shape on the parameter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeGuard

import torch
from torch import nn


class PartitionedParameter(Protocol):
    """What ZeRO-3 sets on a parameter that it has cut."""

    ds_shape: Sequence[int]  # of the whole parameter
    ds_numel: int  # of the whole parameter

    def partition_numel(self) -> int:
        """Elements that every rank holds, padding included."""
        ...


def is_partitioned(param: nn.Parameter) -> TypeGuard[PartitionedParameter]:
    """True where ZeRO-3 holds only a slice of `param` here.

    DeepSpeed marks such a parameter by attributes on the object itself; looking for them is the one
    way to know that needs no deepspeed import.
    """
    return "ds_shape" in vars(param)


def full_shape(param: nn.Parameter) -> torch.Size:
    """The shape of the whole parameter, wherever its elements are."""
    return torch.Size(param.ds_shape) if is_partitioned(param) else param.shape
