"""What a run takes from below, as types: an engine, and the preparation of data."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from rayft.compose.job import AttemptJob, AttemptOutcome, DriverSignals, PreparedData, TaskMapper
from rayft.config.run import Run

if TYPE_CHECKING:  # torch only for the type: the driver of a Ray run does not need it
    import torch

    Engine = Callable[[AttemptJob, int, int, torch.device, DriverSignals], AttemptOutcome]
else:
    Engine = Callable[..., AttemptOutcome]


class DataPreparer(Protocol):
    """Tokenises the data of a run, or finds it in the cache."""

    def __call__(self, run: Run, mapper: TaskMapper) -> PreparedData: ...
