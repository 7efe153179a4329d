"""The placement of a sweep's trials, simulated: makespan, and how full the slots are.

Packs run in lock-step: one step of a pack with n trials takes a + b n seconds (a: what a step costs
whatever its width; b: what a trial's tokens cost). The rule is that of hosts/placer.py: a central
queue, first come first served; a freed slot goes to the next in the queue; once nobody waits, a
pack with at least two trials fewer than the fullest one gets one of its trials, for one step's
delay. Units: seconds and optimizer steps.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class SimulatedSweep:
    """What a simulated sweep came to."""

    makespan: float  # seconds
    bound: float  # seconds: max(all work at full width / packs, the longest trial alone)
    fullness: float  # share of slot-seconds taken, until 95 % of the trial-steps were done
    moves: int


@dataclass
class _SimulatedPack:
    trials: dict[int, float] = field(default_factory=dict)  # trial -> step count at which it ends
    steps: float = 0.0  # taken so far
    since: float = 0.0  # time of `steps`
    version: int = 0  # older events of this pack mean nothing


def asha_lengths(count: int, steps: int, grace: int, factor: int, seed: int = 0) -> list[int]:
    """(count,) steps of each trial when one in `factor` survives each rung."""
    rng = random.Random(seed)
    lengths = []
    for _ in range(count):
        length = grace
        while length < steps and rng.random() < 1 / factor:
            length *= factor
        lengths.append(min(length, steps))
    return lengths


def simulate(lengths: Sequence[int], packs: int, slots: int, a: float, b: float) -> SimulatedSweep:
    """Run trials of these lengths, in this order, on `packs` packs of `slots` slots."""
    return _Simulation(lengths, packs, slots, a, b).go()


class _Simulation:
    def __init__(self, lengths: Sequence[int], packs: int, slots: int, a: float, b: float) -> None:
        self.lengths, self.slots, self.a, self.b = lengths, slots, a, b
        self.packs = [_SimulatedPack() for _ in range(packs)]
        self.next = 0  # in the queue
        self.events: list[tuple[float, int, int]] = []  # time, version, pack
        self.by_count: list[set[int]] = [set() for _ in range(slots + 1)]
        self.by_count[0] = set(range(packs))
        self.moves = 0
        self.taken = self.clock = self.done = 0.0  # slot-seconds, seconds, trial-steps

    def go(self) -> SimulatedSweep:
        total = sum(self.lengths)
        for _ in range(self.slots):  # spread: every pack gets one before any gets two
            for index in range(len(self.packs)):
                self._take(index, 0.0)
        for index in range(len(self.packs)):
            self._plan(index)
        running = sum(len(pack.trials) for pack in self.packs)
        slots = len(self.packs) * self.slots
        fullness = 1.0
        while self.events:
            now, version, index = heapq.heappop(self.events)
            pack = self.packs[index]
            if version != pack.version:
                continue
            self.taken += running * (now - self.clock)
            self.clock = now
            running -= self._finish(index, now)
            running += self._take(index, now)
            self._balance(index, now)
            self._plan(index)
            if self.done <= 0.95 * total and now > 0:
                fullness = self.taken / (slots * now)
        return SimulatedSweep(self.clock, self._bound(total), fullness, self.moves)

    def _bound(self, total: float) -> float:
        wide = (self.a + self.b * self.slots) / self.slots  # seconds of a trial-step at full width
        longest = max(self.lengths) * (self.a + self.b)
        return max(total * wide / len(self.packs), longest)

    def _finish(self, index: int, now: float) -> int:
        """Take out whoever is at its end; how many."""
        pack = self.packs[index]
        self._advance(pack, now)
        over = [trial for trial, end in pack.trials.items() if end <= pack.steps + 1e-6]
        for trial in over:
            self._count(index, -1)
            del pack.trials[trial]
            self.done += self.lengths[trial]
        return len(over)

    def _take(self, index: int, now: float) -> int:
        """Fill the free slots from the queue; how many came."""
        pack, came = self.packs[index], 0
        limit = 1 if now == 0.0 else self.slots
        while self.next < len(self.lengths) and len(pack.trials) < self.slots and came < limit:
            self._count(index, 1)
            pack.trials[self.next] = pack.steps + self.lengths[self.next]
            self.next += 1
            came += 1
        return came

    def _balance(self, index: int, now: float) -> None:
        pack = self.packs[index]
        if self.next < len(self.lengths):
            return
        fullest = next(n for n in range(self.slots, -1, -1) if self.by_count[n])
        if fullest < len(pack.trials) + 2:
            return
        other = next(iter(self.by_count[fullest]))
        donor = self.packs[other]
        self._advance(donor, now)
        trial = max(donor.trials)
        left = donor.trials.pop(trial) - donor.steps
        donor.version += 1
        # bookkeeping after the pop: counts are taken from the sets, not from the dicts
        self.by_count[fullest].discard(other)
        self.by_count[fullest - 1].add(other)
        self._plan(other)
        self._count(index, 1)
        pack.trials[trial] = pack.steps + left + 1  # one step's delay
        self.moves += 1

    def _count(self, index: int, change: int) -> None:
        count = len(self.packs[index].trials)
        self.by_count[count].discard(index)
        self.by_count[count + change].add(index)

    def _advance(self, pack: _SimulatedPack, now: float) -> None:
        if pack.trials:
            pack.steps += (now - pack.since) / (self.a + self.b * len(pack.trials))
        pack.since = now

    def _plan(self, index: int) -> None:
        pack = self.packs[index]
        pack.version += 1
        if pack.trials:
            left = min(pack.trials.values()) - pack.steps
            end = pack.since + max(left, 0.0) * (self.a + self.b * len(pack.trials))
            heapq.heappush(self.events, (end, pack.version, index))
