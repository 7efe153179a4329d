"""What fits: the memory of a pack as its trials take it.

    bytes = base + 16 P (parameters, gradients, two moments; P padded) + activations per token
            * rows of one forward pass * longest row

Activations per token are measured on a trial's own batch before it is in: on the first trial, and
again on every one that keeps more than those before it (a higher rank, dropout masks, DoRA).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

ADAM = 16  # bytes per adapter parameter in float32
SLACK = 0.05  # of a GPU: what the allocator cannot use, and the libraries' own
CGROUP = ("memory.max", "memory/memory.limit_in_bytes")  # version 2, version 1


@dataclass(frozen=True)
class MemoryClaim:
    """What one trial needs."""

    params: int  # of its row
    rows: int  # of its largest micro-batch
    length: int  # tokens of its longest row
    rank: int
    kind: tuple[bool, bool]  # dropout, DoRA


@dataclass
class MemoryBudget:
    """The memory of one pack."""

    device: torch.device
    base: int  # bytes of the base model
    limit: int  # bytes the pack may use
    per_token: float = 0.0  # bytes of activations; 0 until it is measured
    _ranks: dict[tuple[bool, bool], int] = field(default_factory=dict)  # kind -> highest measured

    def need(self, claims: Iterable[MemoryClaim]) -> int:
        """Bytes with these trials in."""
        claims = list(claims)
        length = max((claim.length for claim in claims), default=0)
        tokens = length * sum(claim.rows for claim in claims)
        adapters = ADAM * sum(claim.params for claim in claims)
        return int(self.base + adapters + self.per_token * tokens)

    def knows(self, claim: MemoryClaim) -> bool:
        """Whether a trial that keeps at least as much per token has been measured."""
        return self._ranks.get(claim.kind, 0) >= claim.rank

    def measure(self, claim: MemoryClaim, run: Callable[[], int]) -> None:
        """`run` does a forward and backward pass and returns its tokens, padding included."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            before = torch.cuda.memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            tokens = run()
            torch.cuda.synchronize(self.device)
            used = torch.cuda.max_memory_allocated(self.device) - before
        else:
            tokens, used = _bytes_kept(run)
        self.per_token = max(self.per_token, used / max(tokens, 1))
        self._ranks[claim.kind] = claim.rank


def model_bytes(model: nn.Module) -> int:
    """Parameters and buffers, each once."""
    tensors = {t.untyped_storage().data_ptr(): t for t in (*model.parameters(), *model.buffers())}
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors.values())


def memory_limit(device: torch.device, share: float = 1.0) -> int:
    """Bytes that a process with this share of the device may use: less than its share where others
    hold memory of the GPU already."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        within_reach = free + torch.cuda.memory_reserved(device)
        return int((1 - SLACK) * min(share * total, within_reach))
    return int(share * host_memory())


def host_memory(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of this machine, or of the container that this process is in."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for name in CGROUP:
        if (cgroup / name).exists():
            text = (cgroup / name).read_text().strip()
            limits += [int(text)] if text.isdigit() else []  # else "max"
    return min(limits)


def _bytes_kept(run: Callable[[], int]) -> tuple[int, int]:
    """(tokens, bytes that autograd keeps): on the CPU nothing counts allocations."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        tokens = run()
    return tokens, sum(kept.values())
