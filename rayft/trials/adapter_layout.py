"""Where the tensors of one adapter stand in a row of a bucket (see `rank_bucket.py`)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

GROUPS = ("lora_A", "lora_B", "lora_magnitude")
LEAST_RANK = 8


@dataclass(frozen=True)
class LayerSize:
    """One adapted linear layer."""

    name: str  # of the module in the model
    d_in: int
    d_out: int


@dataclass(frozen=True)
class AdapterLayout:
    """Offsets within a row."""

    layers: tuple[LayerSize, ...]
    rank: int  # padded
    dora: bool

    @cached_property
    def ranges(self) -> dict[str, tuple[int, int]]:
        """[start, stop) of every group."""
        a = self.rank * sum(layer.d_in for layer in self.layers)
        b = self.rank * sum(layer.d_out for layer in self.layers)
        m = sum(layer.d_out for layer in self.layers) if self.dora else 0
        found = {"lora_A": (0, a), "lora_B": (a, a + b), "lora_magnitude": (a + b, a + b + m)}
        return {name: part for name, part in found.items() if part[0] < part[1]}

    @cached_property
    def size(self) -> int:
        """Elements of a row."""
        return max(stop for _, stop in self.ranges.values())

    @cached_property
    def offsets(self) -> tuple[dict[str, int], ...]:
        """By layer: where each of its tensors starts."""
        at = {name: start for name, (start, _) in self.ranges.items()}
        found = []
        for layer in self.layers:
            found.append(dict(at))
            at["lora_A"] += self.rank * layer.d_in
            at["lora_B"] += self.rank * layer.d_out
            if self.dora:
                at["lora_magnitude"] += layer.d_out
        return tuple(found)

    def view(self, rows: Tensor, layer: int, group: str) -> Tensor:
        """(n, size) -> the layer's A (n, R, d_in), B^T (n, R, d_out) or m (n, d_out)."""
        size, start = self.layers[layer], self.offsets[layer][group]
        shape = {
            "lora_A": (self.rank, size.d_in),
            "lora_B": (self.rank, size.d_out),
            "lora_magnitude": (size.d_out,),
        }[group]
        flat = rows[:, start : start + torch.Size(shape).numel()]
        return flat.view(len(rows), *shape)


@lru_cache(maxsize=64)
def layout_of(layers: tuple[LayerSize, ...], rank: int, dora: bool) -> AdapterLayout:
    """The one that all trials of this padded rank share: it keeps its offsets."""
    return AdapterLayout(layers, rank, dora)


def padded(rank: int) -> int:
    """The next power of two, at least LEAST_RANK."""
    return max(LEAST_RANK, 1 << (rank - 1).bit_length())
