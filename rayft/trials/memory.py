"""What fits: the memory of a pack as its trials take it.

    bytes = base + 16 P (parameters, gradients, two moments; P padded) + activations per token
            * tokens of one forward pass

A pass has the rows of as many trials as together have `pass_tokens` tokens, padding included, or
one trial's micro-batch where that is larger: beyond that activations do not grow with the trials.
A trial that is parked (slot_table.py) has no gradients and takes part in no pass: 12 P, in host
memory. Which ones are parked changes, so the largest are taken to be in. Beside a GPU a best state
that waits to be written (12 P for some seconds) is in host memory too, and not counted.

Activations per token are measured on a trial's own batch before it is in: on the first trial, and
again on every one that keeps more than those before it (a higher rank, dropout masks, DoRA).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

ADAM = 16  # bytes per adapter parameter in float32
PARKED = 12  # of them without gradients
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


class MemoryLoad:
    """The claims of all who are in, summed as they come and go."""

    def __init__(self, claims: Iterable[MemoryClaim] = ()) -> None:
        self.params = self.rows = 0
        self.params_of, self.rows_of, self.lengths = Counter[int](), Counter[int](), Counter[int]()
        for claim in claims:
            self.add(claim)

    def add(self, claim: MemoryClaim) -> None:
        self._count(claim, 1)

    def remove(self, claim: MemoryClaim) -> None:
        self._count(claim, -1)

    @property
    def trials(self) -> int:
        """How many."""
        return self.lengths.total()

    def _count(self, claim: MemoryClaim, sign: int) -> None:
        self.params += sign * claim.params
        self.rows += sign * claim.rows
        for counter, value in (
            (self.params_of, claim.params),
            (self.rows_of, claim.rows),
            (self.lengths, claim.length),
        ):
            counter[value] += sign
            if not counter[value]:
                del counter[value]


@dataclass
class MemoryBudget:
    """The memory of one pack."""

    device: torch.device
    base: int  # bytes of the base model
    limit: int  # bytes the pack may use
    per_token: float = 0.0  # bytes of activations; 0 until it is measured
    slots: int | None = None  # trials that are not parked, at most
    pass_tokens: int | None = None  # of a forward pass, where one trial has not more
    host_limit: int = 0  # bytes of host memory that trials parked beside a GPU may use
    _ranks: dict[tuple[bool, bool], int] = field(default_factory=dict)  # kind -> highest measured

    def need(self, load: MemoryLoad) -> int:
        """Bytes with these trials in, at most."""
        if not load.trials:
            return self.base
        resident = min(load.trials, self.slots or load.trials)
        stepped = min(load.params, resident * max(load.params_of))
        length, most = max(load.lengths), max(load.rows_of)
        tokens = length * min(load.rows, resident * most)
        if self.pass_tokens is not None:
            tokens = min(tokens, max(self.pass_tokens, length * most))
        parked = 0 if self.device.type == "cuda" else PARKED * (load.params - stepped)
        return int(self.base + ADAM * stepped + parked + self.per_token * tokens)

    def need_host(self, load: MemoryLoad) -> int:
        """Bytes of host memory for those that are parked beside a GPU, at most."""
        if self.device.type != "cuda" or self.slots is None or load.trials <= self.slots:
            return 0
        return PARKED * (load.params - self.slots * min(load.params_of))

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
