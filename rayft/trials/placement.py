"""Which pack a trial goes into, and when one moves: pure functions that the placer of a sweep and
the simulator drive. First come, first served; a trial moves only to a pack with nothing to do.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Protocol, TypeVar


class PackLoad(Protocol):
    """What the rules see of a pack."""

    @property
    def key(self) -> str | None:
        """Of the base that is loaded (trials.plan.pack_key); None before the first."""
        ...

    @property
    def trials(self) -> Collection[object]:
        """Who is in."""
        ...

    @property
    def ready(self) -> bool:
        """Its process is there."""
        ...

    @property
    def full(self) -> bool:
        """It refused a trial for memory, and nobody has left since."""
        ...

    @property
    def moving(self) -> bool:
        """One of its trials is on its way to another pack."""
        ...


P = TypeVar("P", bound=PackLoad)


def choose_pack(packs: Iterable[P], key: str, slots: int) -> P | None:
    """The emptiest pack that may take a trial of this key; None where all are taken.

    A pack that is empty is as good as a new one whatever it has loaded: only its base changes.
    """
    ready = [pack for pack in packs if pack.ready]
    fit = [p for p in ready if p.key == key and len(p.trials) < slots and not p.full]
    best = min(fit, key=lambda pack: len(pack.trials), default=None)
    empty = [pack for pack in ready if not pack.trials]
    fresh = [pack for pack in empty if pack.key is None] or empty
    if best is not None and (not best.trials or not fresh):
        return best
    return fresh[0] if fresh else None


def choose_donor(packs: Sequence[P], waiting: int) -> P | None:
    """The pack that gives its youngest trial to one that has nothing to do: at the end of a sweep
    the last trials must not share one core while others idle. None where nobody has to move.

    Args:
        waiting: trials without a place.
    """
    idle = [pack for pack in packs if pack.ready and not pack.trials and pack.key]
    fullest = max(packs, key=lambda pack: len(pack.trials), default=None)
    if waiting or not idle or fullest is None or len(fullest.trials) < 2:
        return None
    shared = any(pack.key == fullest.key for pack in idle)
    return fullest if shared and not fullest.moving else None
