"""What the runtime takes from below, as types: an engine, and the preparation of data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from rayft.compose.job import Job, Outcome, Prepared, Signals
from rayft.config.run import Run

if TYPE_CHECKING:  # torch only for the type: the driver of a Ray run does not need it
    import torch

    Engine = Callable[[Job, int, int, torch.device, Signals], Outcome]
else:
    Engine = Callable[..., Outcome]


class Mapper(Protocol):
    """Applies a module-level function to many small work items, somewhere; results in order."""

    def __call__(self, function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]: ...


class Prepare(Protocol):
    """Tokenises the data of a run, or finds it in the cache."""

    def __call__(self, run: Run, mapper: Mapper) -> Prepared: ...
