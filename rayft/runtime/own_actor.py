"""A trial that is a Ray Train run of its own, as a host: the same questions as a pack answers."""

from __future__ import annotations

from typing import Any

import ray

from rayft.compose.job import Prepared
from rayft.config.run import Run
from rayft.runtime.driver_context import DriverContext
from rayft.runtime.own import OwnSeat
from rayft.trials.types import Told


@ray.remote(num_cpus=0, max_concurrency=8)
class OwnHost:
    """Holds one seat. `next` blocks in a thread of its own: `leave` and `save` get through."""

    def __init__(self, driver: DriverContext) -> None:
        driver.enter()  # a relative model path means the driver's
        self._seat: OwnSeat | None = None

    def begin(
        self,
        config: dict[str, Any],
        prepared: Prepared,
        source: str | None,
        divergence: float,
        heard: int,
    ) -> None:
        """Start, or continue, the run."""
        run = Run.model_validate(config)
        self._seat = OwnSeat(run, prepared, source=source, divergence=divergence, heard=heard)

    def next(self, trial: str) -> Told:
        """The next report."""
        return self._seat.next()

    def save(self, trial: str) -> str:
        """A committed checkpoint's folder."""
        return self._seat.save()

    def leave(self, trial: str, keep: bool) -> None:
        """Stop the run and free what it held."""
        self._seat.leave(keep=keep)
