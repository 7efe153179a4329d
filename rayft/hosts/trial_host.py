"""What a pack and a run of its own both answer, so that searchers and schedulers cannot tell them
apart."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any, Protocol, TypeAlias

from rayft.records.run_record import Status
from rayft.trials.types import TrialReport

ActorHandle: TypeAlias = Any
"""Of a Ray actor; Ray's own types do not know the methods behind `.remote`."""


class TrialHost(Protocol):
    """A Ray actor that trains trials: `PackActor`, `TrainRunActor`. From outside every method is
    called by `.remote`; while one waits, others get through."""

    def next(self, trial: str) -> TrialReport | Awaitable[TrialReport]:
        """Wait for the next report; the last one again and again once the trial is over."""
        ...

    def save(self, trial: str) -> str | Awaitable[str]:
        """Commit its present state; the address of the checkpoint folder.

        Raises:
            RayftError: it is not in, or no commit comes.
        """
        ...

    def leave(self, trial: str, keep: bool, status: Status) -> Awaitable[None] | None:
        """Stop it and free what it held; nothing in its folder is written any more on return.

        Args:
            keep: with its best state committed; else without checkpoints.
            status: what its run.json says from now on, unless it has ended by itself.
        """
        ...
