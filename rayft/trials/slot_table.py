"""Who is in a pack: trials that train, as rows of the buckets, and trials that are parked.

A pack may hold more trials than it trains at a time. Those beyond its slots are parked: their
adapters and moments lie in host memory, page-locked where the device is a GPU, and have neither
gradients nor activations; generators, position in the data and logs stay as they are. At
evaluations trials take turns: one that has just been evaluated gives its slot to the one that has
waited longest.

Paging copies bits, so a trial's numbers are those of a run of its own, whenever it had its turns.
"""

from __future__ import annotations

import resource
from collections.abc import Sequence

import torch
from torch import Tensor

from rayft.trials.memory import MemoryLoad
from rayft.trials.rank_bucket import BucketSet, TrialAdapter
from rayft.trials.slot import TrialSlot

OTHER_FILES = 512  # of the process: libraries, sockets, commits under way


class SlotTable:
    """See the head of this file.

    Args:
        slots: trials that train at a time.
        waiting: trials beyond them.

    Attributes:
        all: by name, in the order of their coming.
        resident: those that train; who has had its slot longest comes first.
        parked: the others; who has waited longest comes first.
        held: of these, who gets no slot until `resume`.
        load: what they all need.
    """

    def __init__(self, buckets: BucketSet, slots: int, waiting: int) -> None:
        self._buckets, self._slots, self._waiting = buckets, slots, waiting
        allow_files(slots + waiting)
        self.all: dict[str, TrialSlot] = {}
        self.resident: dict[str, TrialSlot] = {}
        self.parked: dict[str, TrialSlot] = {}
        self.held: set[str] = set()
        self.load = MemoryLoad()

    @property
    def free(self) -> int:
        """How many more may come."""
        return self._slots + self._waiting - len(self.all)

    def enter(self, slot: TrialSlot) -> None:
        """A trial whose adapter is in the buckets; it is parked where all slots are taken."""
        self.all[slot.trial] = self.resident[slot.trial] = slot
        self.load.add(slot.claim)
        if len(self.resident) > self._slots:
            self._page_out(slot)

    def remove(self, slot: TrialSlot) -> None:
        """It leaves, and the next one gets its slot."""
        del self.all[slot.trial]
        self.load.remove(slot.claim)
        self.held.discard(slot.trial)
        if self.parked.pop(slot.trial, None) is None:
            del self.resident[slot.trial]
            self._buckets.drop(slot.adapter)
        self._fill()

    def park(self, trial: str) -> None:
        """Out of its slot, until `resume`."""
        self.held.add(trial)
        if trial in self.resident:
            self._page_out(self.resident[trial])
            self._fill()

    def resume(self, trial: str) -> None:
        """It waits for a slot behind those that wait already."""
        if trial in self.held:
            self.held.remove(trial)
            self.parked[trial] = self.parked.pop(trial)
            self._fill()

    def take_turns(self, evaluated: Sequence[TrialSlot]) -> None:
        """Of `evaluated`, as many as others wait give up their slots; who had one longest is the
        first to go."""
        waiting, done = len(self.parked) - len(self.held), set(evaluated)
        ready = [slot for slot in self.resident.values() if waiting and slot in done]
        for slot in ready[:waiting]:
            self._page_out(slot)
            self._fill()

    def _fill(self) -> None:
        while len(self.resident) < self._slots:
            slot = next((s for name, s in self.parked.items() if name not in self.held), None)
            if slot is None:
                return
            del self.parked[slot.trial]
            self._buckets.add(slot.adapter, slot.adapter.flat().to(self._buckets.device))
            move_moments(slot, self._buckets.device)
            self.resident[slot.trial] = slot

    def _page_out(self, slot: TrialSlot) -> None:
        del self.resident[slot.trial]
        self.parked[slot.trial] = slot
        self._buckets.drop(slot.adapter)
        if slot.commits.idle:  # else one best state waits, and no more than one
            slot.commits.write()  # it is as large as what is parked
        if self._buckets.device.type == "cuda":
            to_host(slot.adapter)
            move_moments(slot, torch.device("cpu"))


def allow_files(trials: int) -> None:
    """Let this process have as many files open as so many trials need, each its metrics.jsonl: many
    systems begin with 1,024. Where the system allows fewer, the trial that is one too many fails.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    need = trials + OTHER_FILES
    if hard != resource.RLIM_INFINITY:
        need = min(need, hard)
    if soft != resource.RLIM_INFINITY and soft < need:
        resource.setrlimit(resource.RLIMIT_NOFILE, (need, hard))


def to_host(adapter: TrialAdapter) -> None:
    """Parameters that are no rows of a bucket."""
    for param in adapter.params.values():
        param.data = _moved(param.data, torch.device("cpu"))


def move_moments(slot: TrialSlot, device: torch.device) -> None:
    """The optimizer's state of a trial."""
    for param in slot.adapter.params.values():
        state = slot.optimizer.state[param]
        for name, value in state.items():
            state[name] = _moved(value, device)


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """On `device`; page-locked where a GPU's tensor goes to the host. The same one where it is."""
    if tensor.device.type == device.type:
        return tensor
    made = torch.empty_like(tensor, device=device, pin_memory=device.type == "cpu")
    return made.copy_(tensor)
