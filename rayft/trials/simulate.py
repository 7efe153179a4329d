"""The placement of a sweep's trials, simulated: makespan, and how full the slots are.

Packs run in lock-step: one step of a pack with n trials takes a + b n seconds (a: what a step costs
whatever its width; b: what a trial's tokens cost). Who goes where is decided by `placement`, as in
a real sweep; a trial that moves loses one step's time. Units: seconds and optimizer steps.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from rayft.trials.placement import choose_donor, choose_pack

KEY = "base"  # all trials share one


@dataclass(frozen=True)
class SimulatedSweep:
    """What a simulated sweep came to."""

    makespan: float  # seconds
    bound: float  # seconds: max(all work at full width / packs, the longest trial alone)
    fullness: float  # share of slot-seconds taken, until 95 % of the trial-steps were done
    moves: int


@dataclass(eq=False)
class _SimulatedPack:
    """A placement.PackLoad that is always there, never out of memory."""

    trials: dict[int, float] = field(default_factory=dict)  # trial -> step count at which it ends
    steps: float = 0.0  # taken so far
    since: float = 0.0  # time of `steps`
    version: int = 0  # older events of this pack mean nothing
    key: str = KEY
    ready: bool = True
    full: bool = False
    moving: bool = False


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
        self.queue = deque(range(len(lengths)))
        self.events: list[tuple[float, int, int, _SimulatedPack]] = []  # time, order, version, pack
        self.moves = 0
        self._order = itertools.count()
        self.taken = self.clock = self.done = 0.0  # slot-seconds, seconds, trial-steps

    def go(self) -> SimulatedSweep:
        total = sum(self.lengths)
        self._admit(self.packs)
        for pack in self.packs:
            self._plan(pack)
        running = sum(len(pack.trials) for pack in self.packs)
        slots = len(self.packs) * self.slots
        fullness = 1.0
        while self.events:
            now, _, version, pack = heapq.heappop(self.events)
            if version != pack.version:
                continue
            self.taken += running * (now - self.clock)
            self.clock = now
            running -= self._finish(pack)
            running += self._admit([pack])  # all others are full
            if not pack.trials:
                self._move_to(pack)
            self._plan(pack)
            if self.done <= 0.95 * total and now > 0:
                fullness = self.taken / (slots * now)
        return SimulatedSweep(self.clock, self._bound(total), fullness, self.moves)

    def _bound(self, total: float) -> float:
        wide = (self.a + self.b * self.slots) / self.slots  # seconds of a trial-step at full width
        longest = max(self.lengths) * (self.a + self.b)
        return max(total * wide / len(self.packs), longest)

    def _finish(self, pack: _SimulatedPack) -> int:
        """Take out whoever is at its end; how many."""
        self._advance(pack)
        over = [trial for trial, end in pack.trials.items() if end <= pack.steps + 1e-6]
        for trial in over:
            del pack.trials[trial]
            self.done += self.lengths[trial]
        return len(over)

    def _admit(self, packs: Sequence[_SimulatedPack]) -> int:
        """Give places to those who wait longest; how many got one."""
        came = 0
        while self.queue and (pack := choose_pack(packs, KEY, self.slots)) is not None:
            trial = self.queue.popleft()
            pack.trials[trial] = pack.steps + self.lengths[trial]
            came += 1
        return came

    def _move_to(self, idle: _SimulatedPack) -> None:
        donor = choose_donor(self.packs, len(self.queue))
        if donor is None:
            return
        self._advance(donor)
        trial = max(donor.trials)
        left = donor.trials.pop(trial) - donor.steps
        self._plan(donor)
        idle.trials[trial] = idle.steps + left + 1  # one step's delay
        self.moves += 1

    def _advance(self, pack: _SimulatedPack) -> None:
        if pack.trials:
            pack.steps += (self.clock - pack.since) / (self.a + self.b * len(pack.trials))
        pack.since = self.clock

    def _plan(self, pack: _SimulatedPack) -> None:
        pack.version += 1
        if pack.trials:
            left = min(pack.trials.values()) - pack.steps
            end = pack.since + max(left, 0.0) * (self.a + self.b * len(pack.trials))
            heapq.heappush(self.events, (end, next(self._order), pack.version, pack))
