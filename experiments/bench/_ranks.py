"""What all ranks of a benchmark do together: time a block of steps, agree, count what they send."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

import torch
import torch.distributed as dist
from _common import synchronise


def block(steps: Callable[[int], None], count: int, device: torch.device) -> float:
    """Seconds per step of `count` steps, all ranks together."""
    synchronise(device)
    dist.barrier()
    began = time.perf_counter()
    steps(count)
    synchronise(device)
    dist.barrier()
    return (time.perf_counter() - began) / count


def agreed(answer: bool, device: torch.device) -> bool:
    """Rank 0's, on every rank: all must leave in the same turn."""
    box = torch.tensor([float(answer)], device=device)
    dist.broadcast(box, src=0)
    return bool(box)


def collectives(steps: Callable[[int], None]) -> dict[str, int]:
    """Of one step on this rank: {operation: how often}."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        steps(1)
    names = (event.name for event in seen.events())
    return dict(Counter(name for name in names if name.startswith("c10d::")))
