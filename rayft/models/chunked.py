"""Summed next-token loss of every row, without ever holding the logits of a batch.

    nll[b] = sum_{t trained} (logsumexp_v z[b, t, v] - z[b, t, y[b, t]]),   z = cap(m (W h + bias))
    dz     = softmax(z) - onehot(y),    dh = dz' W,    dW = sum_t rel[b] dz'[t]^T h[t]

The head's gradient is formed in the forward pass, chunk by chunk, so nothing is computed twice
(Wijmans et al. 2024, "Cut Your Losses", and Hsu et al. 2024, "Liger Kernel", avoid the logits in
fused GPU kernels; here the GEMMs are torch's own and run on any device).

Shapes: B rows, T tokens, H hidden, V vocabulary, N trained positions, n positions of a chunk; cap
is Gemma's `c tanh(z / c)`, m a constant multiplier (Cohere, Granite). Loss in nats, float32, of
float64 models float64.
Left out: label smoothing, class weights, z-loss; a second derivative.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

MAX_CHUNK = 1024  # positions: 0.5 GiB of float32 logits at a vocabulary of 128k
SHARE = 8  # chunk logits are at most 1 / SHARE of the whole logits


@dataclass(frozen=True)
class LogitMap:
    """What the model does to `W h` before the softmax."""

    multiplier: float = 1.0
    softcap: float | None = None

    def forward(self, z: Tensor) -> Tensor:
        """(n, V) -> (n, V), in place where it can."""
        if self.multiplier != 1.0:
            z = z * self.multiplier
        if self.softcap is not None:
            z = torch.tanh(z / self.softcap) * self.softcap
        return z

    def backward(self, dz: Tensor, z: Tensor) -> Tensor:
        """Gradient with respect to the input, from the gradient and the value of the output."""
        if self.softcap is not None:
            dz = dz * (1 - (z.to(dz.dtype) / self.softcap) ** 2)
        return dz * self.multiplier if self.multiplier != 1.0 else dz


def chunk_size(positions: int, trained: int) -> int:
    """Positions per chunk: equal chunks, each at most 1/8 of all B T positions and MAX_CHUNK."""
    most = max(1, min(MAX_CHUNK, positions // SHARE))
    chunks = max(1, -(-trained // most))
    return max(1, -(-trained // chunks))


def row_sums(nll: Tensor, positions: Tensor, rows: int, length: int) -> Tensor:
    """(N,) -> (B,). Scattered to (B, T) and summed, which has one order of additions on every
    device; index_add does not."""
    table = torch.zeros(rows * length, dtype=nll.dtype, device=nll.device)
    return table.index_copy(0, positions, nll).view(rows, length).sum(dim=1)


class ChunkedNll(torch.autograd.Function):
    """The equation above for a plain linear head."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        positions: Tensor,
        targets: Tensor,
        scale: Tensor,
        logit_map: LogitMap,
        grad: bool,
    ) -> Tensor:
        """hidden (B, T, H), weight (V, H), bias (V,) or None, positions and targets (N,), scale
        (B,) -> (B,). `grad`: form gradients (False under no_grad)."""
        rows, length, width = hidden.shape
        device = hidden.device.type
        dtype = weight.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        need_h, need_w, need_b = (grad and need for need in ctx.needs_input_grad[:3])
        with torch.autocast(device, enabled=False):
            flat = hidden.detach().reshape(-1, width)
            w = weight.detach().to(dtype)
            b = None if bias is None else bias.detach().to(dtype)
            # Rows of one solo run share one scale, so rel is exactly 1 and bf16 loses nothing.
            unit = scale.max() if rows else scale.sum()
            rel = torch.where(unit > 0, scale / unit, torch.zeros_like(scale))  # (B,)
            exact = torch.float64 if dtype == torch.float64 else torch.float32
            nll = torch.empty(len(positions), dtype=exact, device=hidden.device)
            dh = flat.new_empty(len(positions), width) if need_h else None
            dw = torch.zeros_like(weight, dtype=exact) if need_w else None
            db = torch.zeros_like(bias, dtype=exact) if need_b and bias is not None else None
            step = chunk_size(rows * length, len(positions))
            for start in range(0, len(positions), step):
                part = slice(start, start + step)
                h = flat[positions[part]].to(dtype)  # (n, H)
                z = logit_map.forward(functional.linear(h, w, b))  # (n, V)
                logp = torch.log_softmax(z, dim=-1, dtype=exact)
                target = targets[part, None]
                nll[part] = -logp.gather(1, target).squeeze(1)
                if not (need_h or need_w or need_b):
                    continue
                dz = logp.exp_()
                dz.scatter_add_(1, target, torch.full_like(target, -1, dtype=dz.dtype))
                dz = logit_map.backward(dz, z).to(dtype)
                del z, logp
                if dh is not None:
                    torch.mm(dz, w, out=dh[part]) if dh.dtype == dtype else dh[part].copy_(dz @ w)
                weighted = h * rel[positions[part] // length, None].to(dtype)
                if dw is not None:
                    _accumulate(dw, dz, weighted)
                if db is not None:
                    db += rel[positions[part] // length].to(exact) @ dz.to(exact)
        ctx.save_for_backward(positions, scale, unit, dh, dw, db)
        ctx.shape, ctx.dtypes = hidden.shape, (weight.dtype, None if bias is None else bias.dtype)
        return row_sums(nll, positions, rows, length)

    @staticmethod
    @once_differentiable
    # torch's own signature is (ctx, *grads); there is one output
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # see above
        ctx: Any, upstream: Tensor
    ) -> tuple[Tensor | None, ...]:
        """upstream (B,): for dh any weights of the rows; for dW it must be c * scale."""
        positions, scale, unit, dh, dw, db = ctx.saved_tensors
        rows, length, width = ctx.shape
        grad_h = grad_w = grad_b = None
        if dh is not None:
            grad_h = dh.new_zeros(rows * length, width)
            weights = upstream[positions // length, None].to(dh.dtype)
            grad_h.index_copy_(0, positions, dh * weights)
            grad_h = grad_h.view(rows, length, width)
        if dw is not None or db is not None:
            factor = _common_factor(upstream, scale, positions // length) * unit
            grad_w = None if dw is None else (dw * factor).to(ctx.dtypes[0])
            grad_b = None if db is None else (db * factor).to(ctx.dtypes[1])
        return grad_h, grad_w, grad_b, None, None, None, None, None


def _accumulate(dw: Tensor, dz: Tensor, h: Tensor) -> None:
    """dw (V, H) += dz^T h, products in the dtype of dz."""
    if dz.dtype == dw.dtype:
        dw.addmm_(dz.T, h)
    else:
        dw.add_(dz.T @ h)


def _common_factor(upstream: Tensor, scale: Tensor, rows: Tensor) -> Tensor:
    """The scalar c with upstream = c * scale on `rows` (those that train anything); an error where
    there is none."""
    counted = torch.zeros_like(scale).index_fill_(0, rows, 1.0)
    upstream, scale = upstream * counted, scale * counted
    square = (scale * scale).sum()
    c = torch.where(square > 0, (upstream * scale).sum() / square, torch.zeros_like(square))
    gap = (upstream - c * scale).abs().max()
    wrong = gap > 1e-4 * upstream.abs().max()  # NaN is not larger: divergence is found by the norm
    if wrong.device.type != "cpu":
        # To ask would make the host wait in every backward pass. An objective that does it wrong is
        # told so by the contract tests, on a CPU; here its run stops at a norm that is no number.
        return torch.where(wrong, torch.full_like(c, torch.nan), c)
    if wrong:
        raise RuntimeError(
            "row_nll formed the head's gradient for the row weights it was given as `scale`, but "
            "the backward pass weights the rows otherwise; pass the weights that are really used, "
            "or freeze the head"
        )
    return c


def plain_nll(
    hidden: Tensor,
    head: nn.Module,
    positions: Tensor,
    targets: Tensor,
    logit_map: LogitMap,
) -> Tensor:
    """(B,) float32 for a head that is not a plain linear layer (adapters in it, quantised): the
    module itself is called per chunk, and again in the backward pass."""
    rows, length, width = hidden.shape
    flat = hidden.reshape(-1, width)

    def part_nll(h: Tensor, target: Tensor) -> Tensor:
        z = logit_map.forward(head(h))
        exact = z if z.dtype == torch.float64 else z.float()
        return functional.cross_entropy(exact, target, reduction="none")

    step = chunk_size(rows * length, len(positions))
    # At least one call, be it empty: collective hooks of a sharded head must run on every rank.
    parts = [
        checkpoint(
            part_nll,
            flat[positions[start : start + step]],
            targets[start : start + step],
            use_reentrant=False,
        )
        for start in range(0, max(1, len(positions)), step)
    ]
    return row_sums(torch.cat(parts), positions, rows, length)
