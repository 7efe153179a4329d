"""Which rows of a batch belong to which trial, and the dropout masks of each."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from rayft.trials.rank_bucket import RankBucket


@dataclass(frozen=True)
class TrialDropout:
    """Dropout of one trial: masks of its own micro-batch's shape from its own generator."""

    rate: float
    generator: torch.Generator
    rows: int
    length: int  # T of its micro-batch alone


@dataclass(eq=False)
class TrialSegment:
    """Neighbouring trials of one bucket that take part in a forward pass with equal rows."""

    bucket: RankBucket
    low: int  # rows [low, high) of the bucket
    high: int
    first: int  # rows [first, last) of the batch
    last: int
    drops: tuple[TrialDropout, ...] = ()  # one per trial, or none

    @cached_property
    def scaling(self) -> Tensor:
        """(n, 1, 1): s of every trial."""
        return self.bucket.scaling[self.low : self.high]

    def cut(self, flat: Tensor, length: int) -> Tensor:
        """(B T, d), contiguous -> (n, t, d): the rows of these trials, a view."""
        n, width = self.high - self.low, flat.shape[1]
        tokens = (self.last - self.first) * length // n
        start = flat.storage_offset() + self.first * length * width
        return flat.as_strided((n, tokens, width), (tokens * width, width, 1), start)

    def takes(self, other: TrialSegment) -> bool:
        """`other`, one trial, comes next and has as many rows as each of these."""
        rows = (self.last - self.first) // (self.high - self.low)
        follows = other.bucket is self.bucket and other.low == self.high
        return follows and other.last - other.first == rows

    def joined(self, other: TrialSegment) -> TrialSegment:
        """Both."""
        drops = self.drops + other.drops
        return TrialSegment(self.bucket, self.low, other.high, self.first, other.last, drops)


@dataclass(eq=False)
class BatchLayout:
    """Which rows of a batch of `rows` rows of `length` tokens are whose."""

    rows: int
    length: int
    segments: tuple[TrialSegment, ...]
    masks: dict[tuple[int, int], Tensor] | None = None
    """Dropout masks by (layer, segment), kept where activations are recomputed."""


@dataclass
class LayoutHolder:
    """What all layers of a pack look at: the layout of the batch on its way, None without
    adapters; and the anchor that makes autograd visit layers whose input needs no gradient."""

    anchor: Tensor
    layout: BatchLayout | None = None


def _mask(drop: TrialDropout, length: int, width: int, out: Tensor) -> None:
    """Write one trial's mask into `out` (rows length, width): what nn.Dropout multiplies by."""
    noise = torch.empty(drop.rows, drop.length, width, dtype=out.dtype, device=out.device)
    noise.bernoulli_(1 - drop.rate, generator=drop.generator).div_(1 - drop.rate)
    whole = out.view(drop.rows, length, width)
    whole[:, : drop.length] = noise
    whole[:, drop.length :] = 0


def masks(layout: BatchLayout, layer: int, number: int, like: Tensor) -> Tensor | None:
    """Of the segment with this number, (n, t, d_in) as `like`, in the dtype of the adapters; None
    without dropout. Drawing them in the order of the layers is the caller's work."""
    segment = layout.segments[number]
    if not segment.drops:
        return None
    key = (layer, number)
    if layout.masks is not None and key in layout.masks:
        return layout.masks[key]
    mask = torch.empty(like.shape, dtype=segment.bucket.params.dtype, device=like.device)
    for drop, out in zip(segment.drops, mask, strict=True):
        _mask(drop, layout.length, like.shape[-1], out)
    if layout.masks is not None:
        layout.masks[key] = mask
    return mask
