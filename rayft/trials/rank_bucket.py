"""Where stacked adapters live: rows of one flat buffer, one row per trial.

A bucket holds the adapters of trials that share a padded rank R (the next power of two, at least
8), so that one batched product serves them all and little of it is padding:

    row = [ A of every layer (R, d_in) | B^T of every layer (R, d_out) | m of every layer (d_out,) ]

B is transposed because CPU libraries are slow where the last side of a product is narrow.

The three parts are the parameter groups lora_A, lora_B and lora_magnitude; each is one contiguous
range of the row, which is what clipping and AdamW work on. What rank r < R leaves over is zero,
gets zero gradients, and so stays zero. Gradients have the same layout.

A bucket grows by one row in SPARE and shrinks when twice as many stand empty, so joining copies at
most SPARE rows on average however many are in. The last row takes the place of one that leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from rayft.trials.adapter_layout import AdapterLayout, LayerSize

SPARE = 16  # rows of a bucket for each one that stands empty after it has grown

BucketKey = tuple[int, bool, bool, int]
"""(padded rank, dora, whether there is dropout, rows of a micro-batch)."""


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
    """Rows of one key, stacked.

    Attributes:
        params, grads: (n, size), the rows in use.
        scaling: (n, 1, 1): s.
        norms: DoRA: (n, d_out) ||W||^2 by layer.
        copied: rows that growing and shrinking have copied so far.
    """

    def __init__(self, layout: AdapterLayout, device: torch.device, dtype: torch.dtype) -> None:
        self.layout = layout
        self.members: list[TrialAdapter] = []
        self.reached: set[tuple[int, int, int]] = set()  # (layer, low, high) with a gradient
        self.copied = 0
        empty = torch.zeros(0, layout.size, device=device, dtype=dtype)
        self._params, self._grads = empty, torch.zeros_like(empty)  # (room, size)
        self._scaling = empty.new_zeros(0, 1, 1)
        sizes = [layer.d_out for layer in layout.layers] if layout.dora else []
        self._norms = [empty.new_zeros(0, size) for size in sizes]
        self._views: dict[tuple[str, int, str, int, int], Tensor] = {}
        self._derived: dict[Hashable, Tensor] = {}  # from the parameters as they are now
        self._changed()

    def add(self, adapter: TrialAdapter, flat: Tensor) -> None:
        """Take `adapter` in, with these (size,) parameters."""
        place = len(self.members)
        if place == len(self._params):
            self._resize(place + _spare(place))
        self.members.append(adapter)
        self._params[place] = flat
        self._grads[place] = 0
        self._scaling[place] = adapter.scaling
        for to, norms in zip(self._norms, adapter.norms, strict=True):
            to[place] = norms
        self._bind_row(place)
        self._changed()

    def drop(self, adapter: TrialAdapter) -> None:
        """Let `adapter` go; its Parameters keep a copy of their values and no gradients."""
        place, last = self.members.index(adapter), len(self.members) - 1
        self._bind(adapter, self._params[place].clone(), None)
        if place < last:
            for rows in (self._params, self._scaling, *self._norms):
                rows[place] = rows[last]
            self.members[place] = self.members[last]
            self._bind_row(place)
        self.members.pop()
        if len(self._params) > last + 2 * _spare(last):
            self._resize(last + _spare(last))
        self._changed()

    def _resize(self, room: int) -> None:
        used = len(self.members)
        for adapter in self.members:
            for param in adapter.params.values():
                param.grad = None  # they hold the buffer, which goes before there is a new one
        self.grads = self._grads = self._grads.new_zeros(0, self.layout.size)
        self._params = self.params = _resized(self._params, used, room)
        for place, adapter in enumerate(self.members):
            self._bind(adapter, self._params[place], None)
        self._grads = torch.zeros_like(self._params)
        self._scaling = _resized(self._scaling, used, room)
        self._norms = [_resized(one, used, room) for one in self._norms]
        self.copied += used
        for place in range(used):
            self._bind_row(place)

    def _changed(self) -> None:
        used = len(self.members)
        self._views, self._derived = {}, {}
        self.params, self.grads = self._params[:used], self._grads[:used]
        self.scaling, self.norms = self._scaling[:used], [one[:used] for one in self._norms]

    def _bind_row(self, place: int) -> None:
        self._bind(self.members[place], self._params[place], self._grads[place])

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
        self._places: dict[TrialAdapter, tuple[RankBucket, int]] | None = None
        self._order: dict[TrialAdapter, int] | None = None

    def add(self, adapter: TrialAdapter, flat: Tensor) -> None:
        """Take `adapter` in, with these (size,) parameters."""
        if adapter.key not in self.all:
            self.all[adapter.key] = RankBucket(adapter.layout, self.device, self.dtype)
        self._places = self._order = None
        self.all[adapter.key].add(adapter, flat)

    def drop(self, adapter: TrialAdapter) -> None:
        """Let `adapter` go."""
        self._places = self._order = None
        bucket = self.all[adapter.key]
        bucket.drop(adapter)
        if not bucket.members:
            del self.all[adapter.key]

    def places(self) -> dict[TrialAdapter, tuple[RankBucket, int]]:
        """Where every row stands, in order."""
        if self._places is None:
            self._places = {
                adapter: (bucket, index)
                for bucket in self.all.values()
                for index, adapter in enumerate(bucket.members)
            }
        return self._places

    def order(self) -> dict[TrialAdapter, int]:
        """The number of every row, through all buckets."""
        if self._order is None:
            self._order = {adapter: number for number, adapter in enumerate(self.places())}
        return self._order


def _spare(used: int) -> int:
    """Rows that are made beyond those in use."""
    return max(1, -(-used // SPARE))


def _resized(rows: Tensor, used: int, room: int) -> Tensor:
    """(room, ...) with the first `used` rows."""
    made = rows.new_zeros(room, *rows.shape[1:])
    made[:used] = rows[:used]
    return made
