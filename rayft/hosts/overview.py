"""What a sweep's hosts look like at one moment, for people and for the ledger."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class HostsOverview:
    """All hosts of a sweep."""

    packs: dict[str, dict[str, float]] = field(default_factory=dict)
    """By name: the numbers of trials.meter.PackMeter, and trials, slots and memory."""
    waiting: int = 0  # trials without a place in a pack
    own_runs: int = 0  # trials that train as runs of their own
    news: list[str] = field(default_factory=list)  # lines for people since the last look
