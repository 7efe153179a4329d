"""Where stacked adapters live: rows of one flat buffer, one row per trial.

A bucket holds the adapters of trials that share a padded rank R (the next power of two, at least
8), so that one batched product serves them all and little of it is padding:

    row = [ A of every layer (R, d_in) | B^T of every layer (R, d_out) | m of every layer (d_out,) ]

B is transposed because CPU libraries are slow where the last side of a product is narrow.

The three parts are the parameter groups lora_A, lora_B and lora_magnitude; each is one contiguous
range of the row, which is what clipping and AdamW work on. What rank r < R leaves over is zero,
gets zero gradients, and so stays zero. Gradients have the same layout. A bucket is exactly as long
as it has trials: admitting or dropping one copies its rows (some MB per trial).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

GROUPS = ("lora_A", "lora_B", "lora_magnitude")
LEAST_RANK = 8


BucketKey = tuple[int, bool, bool, int]
"""(padded rank, dora, whether there is dropout, rows of a micro-batch)."""


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


def padded(rank: int) -> int:
    """The next power of two, at least LEAST_RANK."""
    return max(LEAST_RANK, 1 << (rank - 1).bit_length())


@dataclass(eq=False)
class TrialAdapter:
    """One trial's adapters: Parameters that are ranges of a bucket's row, by group."""

    rank: int  # its own
    scaling: float  # s
    dropout: float
    layout: AdapterLayout
    rows: int  # of its micro-batches, as a rule
    params: dict[str, nn.Parameter] = field(default_factory=dict)
    norms: tuple[Tensor, ...] = ()  # DoRA: ||W||^2 by row of W, by layer

    @property
    def key(self) -> BucketKey:
        """Rows with equal keys share a bucket."""
        return self.layout.rank, self.layout.dora, self.dropout > 0, self.rows

    def flat(self) -> Tensor:
        """(size,) of the parameters, a copy."""
        return torch.cat([self.params[name].detach() for name in self.layout.ranges])

    def parts(self, tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """By layer: {group: tensor of the unpadded shape} of something that has the layout of
        `params` (flat, by group), such as moments."""
        found: list[dict[str, Tensor]] = []
        starts = {name: start for name, (start, _) in self.layout.ranges.items()}
        for size, at in zip(self.layout.layers, self.layout.offsets, strict=True):
            one: dict[str, Tensor] = {}
            for name, tensor in tensors.items():
                first, rank = at[name] - starts[name], self.rank
                if name == "lora_A":
                    one[name] = tensor[first : first + rank * size.d_in].view(rank, size.d_in)
                elif name == "lora_B":
                    whole = tensor[first : first + rank * size.d_out].view(rank, size.d_out)
                    one[name] = whole.t()
                else:
                    one[name] = tensor[first : first + size.d_out]
            found.append(one)
        return found


class RankBucket:
    """Rows of one key, stacked."""

    def __init__(self, layout: AdapterLayout, device: torch.device, dtype: torch.dtype) -> None:
        self.layout = layout
        self.members: list[TrialAdapter] = []
        self.params = torch.zeros(0, layout.size, device=device, dtype=dtype)
        self.grads = torch.zeros_like(self.params)
        self.reached: set[tuple[int, int, int]] = set()  # (layer, low, high) with a gradient
        self.scaling = self.params.new_zeros(0, 1, 1)
        self.norms: list[Tensor] = []  # DoRA: (n, d_out) ||W||^2 by layer
        self._views: dict[tuple[str, int, str, int, int], Tensor] = {}
        self._derived: dict[Hashable, Tensor] = {}  # from the parameters as they are now

    def add(self, adapter: TrialAdapter, flat: Tensor) -> None:
        """Take `adapter` in, with these (size,) parameters."""
        self._rebuild([*self.members, adapter], [*self.params, flat])

    def drop(self, adapter: TrialAdapter) -> None:
        """Let `adapter` go; its Parameters keep a copy of their values and no gradients."""
        index = self.members.index(adapter)
        flat = self.params[index].clone()
        self._bind(adapter, flat, None)
        kept = [i for i in range(len(self.members)) if i != index]
        self._rebuild([self.members[i] for i in kept], [self.params[i] for i in kept])

    def _rebuild(self, members: list[TrialAdapter], rows: list[Tensor]) -> None:
        like = self.params
        self._views, self._derived = {}, {}
        self.grads = like.new_zeros(0)  # before the new ones are made: nothing is in them now
        self.params = torch.stack(rows) if rows else like.new_zeros(0, self.layout.size)
        self.grads = torch.zeros_like(self.params)
        self.members = members
        self.scaling = like.new_tensor([adapter.scaling for adapter in members])[:, None, None]
        layers = range(len(self.layout.layers)) if self.layout.dora and members else ()
        self.norms = [
            torch.stack([adapter.norms[layer] for adapter in members]) for layer in layers
        ]
        for index, adapter in enumerate(members):
            self._bind(adapter, self.params[index], self.grads[index])

    def _bind(self, adapter: TrialAdapter, flat: Tensor, grads: Tensor | None) -> None:
        for name, (start, stop) in self.layout.ranges.items():
            if name not in adapter.params:
                adapter.params[name] = nn.Parameter(flat[start:stop])
            adapter.params[name].grad = None
            adapter.params[name].data = flat[start:stop]
            adapter.params[name].grad = None if grads is None else grads[start:stop]

    def forget_gradients(self) -> None:
        """Before the backward passes of a step."""
        self.grads.zero_()
        self.reached.clear()

    def unreached(self, adapter: TrialAdapter) -> list[int]:
        """Layers of `adapter` that no backward pass has come to since."""
        place = self.members.index(adapter)
        there = {layer for layer, low, high in self.reached if low <= place < high}
        return [layer for layer in range(len(self.layout.layers)) if layer not in there]

    def updated(self) -> None:
        """The parameters have changed in place."""
        self._derived = {}

    def derived(self, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """`make()`, once per update of the parameters."""
        if key not in self._derived:
            self._derived[key] = make()
        return self._derived[key]

    def view(self, what: str, layer: int, group: str, low: int, high: int) -> Tensor:
        """Of rows [low, high): `what` is "params" or "grads"; see AdapterLayout.view."""
        key = (what, layer, group, low, high)
        if key not in self._views:
            rows = self.params if what == "params" else self.grads
            self._views[key] = self.layout.view(rows[low:high], layer, group)
        return self._views[key]

    def operand(self, layer: int, group: str, low: int, high: int, dtype: torch.dtype) -> Tensor:
        """The parameters as a factor of products in `dtype`: cast once per update."""
        if dtype == self.params.dtype:
            return self.view("params", layer, group, low, high)
        whole = self.derived(dtype, lambda: self.params.to(dtype))
        return self.layout.view(whole[low:high], layer, group)


class BucketSet:
    """All buckets of a pack; a batch follows their order."""

    def __init__(
        self, layers: tuple[LayerSize, ...], device: torch.device, dtype: torch.dtype
    ) -> None:
        self.layers, self.device, self.dtype = layers, device, dtype
        self.all: dict[BucketKey, RankBucket] = {}

    def add(self, adapter: TrialAdapter, flat: Tensor) -> None:
        """Take `adapter` in, with these (size,) parameters."""
        if adapter.key not in self.all:
            self.all[adapter.key] = RankBucket(adapter.layout, self.device, self.dtype)
        self.all[adapter.key].add(adapter, flat)

    def drop(self, adapter: TrialAdapter) -> None:
        """Let `adapter` go."""
        bucket = self.all[adapter.key]
        bucket.drop(adapter)
        if not bucket.members:
            del self.all[adapter.key]

    def places(self) -> dict[TrialAdapter, tuple[RankBucket, int]]:
        """Where every row stands, in order."""
        return {
            adapter: (bucket, index)
            for bucket in self.all.values()
            for index, adapter in enumerate(bucket.members)
        }
