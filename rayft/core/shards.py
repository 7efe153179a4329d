"""Training state that knows no world size: named, flat slices of named tensors.

Every rank owns, of each trained parameter, a contiguous slice of its flattened elements (all of it,
a part, or nothing) together with the optimizer moments of that slice. DDP splits evenly, ZeRO gives
what it holds anyway. So one format serves every strategy, any number of workers can read it back,
and nothing has to be unpickled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

PARAM = "param"  # the weight itself (fp32 master where the strategy keeps one)


@dataclass(frozen=True)
class ParamSlice:
    """Elements [start, start + numel) of a flattened parameter.

    `tensors` maps a kind ("param", "exp_avg", "exp_avg_sq") to a flat tensor of numel elements.
    """

    shape: tuple[int, ...]  # of the whole parameter
    start: int
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class StateShard:
    """What one rank contributes to a checkpoint."""

    slices: Mapping[
        str, ParamSlice
    ]  # by parameter name; a parameter this rank holds nothing of is left out
    whole: Mapping[str, Tensor] = field(default_factory=dict)
    """Small tensors saved as they are (RNG, 8-bit states)."""
    scalars: Mapping[str, float] = field(default_factory=dict)  # e.g. {"optimizer_step": 120}


class ShardReader(Protocol):
    """All shards of one verified checkpoint, readable by slice."""

    world: int
    scalars: Mapping[str, float]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every saved parameter."""
        ...

    def read(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        """Flat elements [start, stop) of `name`'s `kind`, put together from whichever shards hold
        them; CPU."""
        ...

    def whole(self, rank: int) -> dict[str, Tensor]:
        """The `whole` tensors that rank `rank` saved; empty when it saved none."""
        ...
