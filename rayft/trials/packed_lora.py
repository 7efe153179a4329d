"""Many LoRA adapters on one frozen linear layer: every row of a batch goes through its trial's own.

    y = W x + b + s B A drop(x)                         LoRA, LoRA+, rsLoRA (s and rates differ)
    y = b + c (W x + s B A x),  c = m / ||W + s B A||   DoRA without dropout (norms by row of W,
    y = b + W x + (c - 1) W z + c s B A z, z = drop(x)  DoRA with dropout     taken as constants)

    ||W_i + s B_i A||^2 = ||W_i||^2 + 2 s B_i . (A W_i^T) + s^2 B_i (A A^T) B_i^T

Rows of one trial are neighbours; neighbouring trials with equal rows and padded rank are one
batched product. The backward pass is written out: it adds the adapters' gradients straight into the
bucket's buffer and returns the gradient of x alone. W, quantised or not, is only read.

Shapes: n trials of a segment, t tokens of each (rows x T), R padded rank, d_in, d_out.
Papers and what is left out: methods/lora.py. Deviation from peft: the row norm is never taken of a
materialised W + s B A, so it is rounded otherwise (1e-7 relative in float32).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from rayft.trials.adapter_layout import LayerSize
from rayft.trials.batch_layout import BatchLayout, LayoutHolder, TrialSegment, masks
from rayft.trials.rank_bucket import RankBucket
from rayft.trials.types import UnsharedBase

SavedTensors = tuple[Tensor | None, Tensor, Tensor | None]
"""Of one segment, for its backward pass: see `_LayerSegment.forward`."""


class PackedLinear(nn.Module):
    """A frozen linear layer and the adapters of all trials."""

    def __init__(self, base: nn.Module, index: int, size: LayerSize, current: LayoutHolder) -> None:
        super().__init__()
        self.base, self.index, self.size = base, index, size
        self.current = current

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, d_in) -> (B, T, d_out), also (B T, d_in) -> (B T, d_out)."""
        layout = self.current.layout
        if layout is None:
            return self.base(x)
        if x.shape[:-1] not in ((layout.rows, layout.length), (layout.rows * layout.length,)):
            raise UnsharedBase(
                f"{self.size.name} gets an input of shape {tuple(x.shape)}: its rows are not those "
                "of the batch, so trials cannot share it",
                fix="leave it out of the targets, or set sweep.pack=off",
            )
        dtype = _arithmetic(x, layout)
        if type(self.base) is nn.Linear:
            return _PackedLora.apply(x, None, self.current.anchor, self, layout, dtype)
        return _PackedLora.apply(x, self.base(x), self.current.anchor, self, layout, dtype)

    @property
    def base_weight(self) -> Tensor:
        """W."""
        return cast(Tensor, self.base.weight)  # torch: an attribute of a module is Tensor | Module

    @property
    def base_bias(self) -> Tensor | None:
        """b."""
        return cast("Tensor | None", self.base.bias)  # torch: as above

    def product(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """x W^T without the bias."""
        if type(self.base) is nn.Linear:
            return functional.linear(x.to(dtype), self.base.weight.to(dtype))
        y = self.base(x.to(dtype))
        return y if self.base_bias is None else y - self.base_bias

    def input_grad(self, g: Tensor, dtype: torch.dtype) -> Tensor:
        """g W, the gradient of `product` with respect to x."""
        if type(self.base) is nn.Linear:
            return g.to(dtype) @ self.base.weight.to(dtype)
        with torch.enable_grad():  # a quantised layer knows its own backward pass
            x = g.new_zeros(*g.shape[:-1], self.size.d_in, dtype=dtype, requires_grad=True)
            return torch.autograd.grad(self.product(x, dtype), x, g.to(dtype))[0]

    def factor(self, segment: TrialSegment, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """DoRA: m / ||W + s B A|| (n, 1, d_out) in `dtype`, and 1 / ||W + s B A|| (n, d_out)."""
        bucket, at = segment.bucket, (segment.low, segment.high)
        inverse = bucket.derived(self.index, lambda: self._inverse_norm(bucket))[slice(*at)]
        m = bucket.view("params", self.index, "lora_magnitude", *at)
        return (m * inverse)[:, None].to(dtype), inverse

    def _inverse_norm(self, bucket: RankBucket) -> Tensor:
        a, b = (
            bucket.view("params", self.index, group, 0, len(bucket.members))
            for group in ("lora_A", "lora_B")
        )
        b = bucket.scaling * b  # (n, R, d_out)
        cross = self.product(a, a.dtype).to(b.dtype)  # A W^T (n, R, d_out)
        cross = 2 * cross + torch.bmm(torch.bmm(a, a.transpose(1, 2)), b)
        return (bucket.norms[self.index] + (cross * b).sum(1)).clamp_(min=0).rsqrt_()


def _arithmetic(x: Tensor, layout: BatchLayout) -> torch.dtype:
    """Of the adapters' products: autocast's, else that of the adapters themselves."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return layout.segments[0].bucket.params.dtype


@dataclass(frozen=True)
class _LayerSegment:
    """One segment at one layer."""

    layer: PackedLinear
    segment: TrialSegment
    length: int  # T
    dtype: torch.dtype

    def cut(self, flat: Tensor) -> Tensor:
        """(B T, d) -> (n, t, d), a view."""
        return self.segment.cut(flat, self.length)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (n, R, d_in), B^T (n, R, d_out) in the arithmetic of the products."""
        at = (self.segment.low, self.segment.high, self.dtype)
        bucket, index = self.segment.bucket, self.layer.index
        return bucket.operand(index, "lora_A", *at), bucket.operand(index, "lora_B", *at)

    def inputs(self, flat: Tensor, mask: Tensor | None) -> Tensor:
        """z (n, t, d_in) in the arithmetic of the products."""
        z = self.cut(flat)
        return (z if mask is None else z * mask).to(self.dtype)

    def collect(self, group: str, left: Tensor, right: Tensor) -> None:
        """Add the batched product to the gradients of `group`."""
        at = (self.segment.low, self.segment.high)
        _add_product(self.segment.bucket.view("grads", self.layer.index, group, *at), left, right)

    def forward(self, flat: Tensor, out: Tensor, mask: Tensor | None) -> SavedTensors:
        """Change the rows of `out`, which hold W x + b; [mask, (s A z)^T (n, R, t), what c
        multiplies (n, t, d_out) with DoRA]."""
        a, b = self.factors()
        y, z = self.cut(out), self.inputs(flat, mask)
        h = torch.bmm(a, z.transpose(1, 2)).mul_(self.segment.scaling)
        if not self.segment.bucket.layout.dora:
            _add_product(y, h.transpose(1, 2), b)
            return mask, h, None
        c, _ = self.layer.factor(self.segment, self.dtype)
        if mask is None:
            bias = self.layer.base_bias
            u = y.to(self.dtype) if bias is None else y.to(self.dtype) - bias
            u = torch.baddbmm(u, h.transpose(1, 2), b)
            y.copy_(u * c if bias is None else u * c + bias)
        else:
            once = self.layer.product(z, self.dtype)
            u = torch.baddbmm(once, h.transpose(1, 2), b)
            y.add_(u * c - once)
        return mask, h, u

    def backward(
        self, flat: Tensor, g: Tensor, outer: Tensor, kept: SavedTensors
    ) -> tuple[Tensor, Tensor | None]:
        """Gradients of the adapters; (gradient of (A z)^T (n, R, t), gradient of W z or None).

        `g` (B T, d_out) arrives; `outer` becomes the gradient of W x + b."""
        mask, h, u = kept
        self.segment.bucket.reached.add((self.layer.index, self.segment.low, self.segment.high))
        _, b = self.factors()
        gy, through = self.cut(g).to(self.dtype), None
        if u is not None:
            c, inverse = self.layer.factor(self.segment, self.dtype)
            at = (self.segment.low, self.segment.high)
            gm = self.segment.bucket.view("grads", self.layer.index, "lora_magnitude", *at)
            gm.add_((gy * u).sum(1).to(gm.dtype) * inverse)
            gu = gy * c
            if mask is None:
                self.cut(outer).copy_(gu)
            else:
                through = gu - gy
            gy = gu
        self.collect("lora_B", h, gy)
        dh = torch.bmm(b, gy.transpose(1, 2)).mul_(self.segment.scaling)
        self.collect("lora_A", dh, self.inputs(flat, mask))
        return dh, through

    def add_input_grad(
        self, gx: Tensor, dh: Tensor, through: Tensor | None, mask: Tensor | None
    ) -> None:
        """Add the adapters' part to the gradient of x, (B T, d_in)."""
        a, _ = self.factors()
        if mask is None:
            _add_product(self.cut(gx), dh.transpose(1, 2), a)
            return
        gz = torch.bmm(dh.transpose(1, 2), a)
        if through is not None:
            gz += self.layer.input_grad(through, self.dtype)
        self.cut(gx).add_(gz * mask)


def _add_product(to: Tensor, left: Tensor, right: Tensor) -> None:
    if to.dtype == left.dtype:
        to.baddbmm_(left, right)
    else:
        to.add_(torch.bmm(left, right))


class _PackedLora(torch.autograd.Function):
    """The equations above. `base_out` is W x + b where the base layer computed it itself."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        base_out: Tensor | None,
        anchor: Tensor,
        layer: PackedLinear,
        layout: BatchLayout,
        dtype: torch.dtype,
    ) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            if base_out is None:
                bias = None if layer.base_bias is None else layer.base_bias.to(dtype)
                out = functional.linear(x.to(dtype), layer.base_weight.to(dtype), bias)
            else:
                ctx.mark_dirty(base_out)
                out = base_out
            x = x.contiguous()
            flat, into = x.view(-1, layer.size.d_in), out.view(-1, layer.size.d_out)
            kept: list[Tensor | None] = []
            parts = [
                _LayerSegment(layer, segment, layout.length, dtype) for segment in layout.segments
            ]
            for number, part in enumerate(parts):
                mask = None
                if layer.training:
                    mask = masks(layout, layer.index, number, part.cut(flat))
                kept += part.forward(flat, into, mask)
        ctx.save_for_backward(x, *kept)
        ctx.layer, ctx.parts, ctx.fused = layer, parts, base_out is None
        return out

    @staticmethod
    @once_differentiable
    # torch's own signature is (ctx, *grads); there is one output
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # see above
        ctx: Any, g: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Adds to the buckets' gradients; returns those of x and of `base_out`."""
        layer: PackedLinear = ctx.layer
        parts: list[_LayerSegment] = ctx.parts
        x, *kept = ctx.saved_tensors
        flat, g_flat = x.view(-1, layer.size.d_in), g.contiguous().view(-1, layer.size.d_out)
        saved: list[SavedTensors] = [
            tuple(kept[3 * number : 3 * number + 3]) for number in range(len(parts))
        ]
        outer = g_flat
        if any(u is not None and mask is None for mask, _, u in saved):
            outer = g_flat.clone()
        back = [
            part.backward(flat, g_flat, outer, one) for part, one in zip(parts, saved, strict=True)
        ]
        gx = None
        if ctx.needs_input_grad[0]:
            dtype = parts[0].dtype
            if ctx.fused:
                gx = layer.input_grad(outer, dtype)
            else:
                gx = torch.zeros(flat.shape, dtype=dtype, device=flat.device)
            for part, one, (dh, through) in zip(parts, saved, back, strict=True):
                part.add_input_grad(gx, dh, through, one[0])
            gx = gx.view(x.shape).to(x.dtype)
        return gx, None if ctx.fused else outer.view(g.shape), None, None, None, None
