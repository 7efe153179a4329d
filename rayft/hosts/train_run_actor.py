"""A trial that is a Ray Train run of its own, as a host: the same questions as a pack answers."""

from __future__ import annotations

from typing import Any

import ray

from rayft.cluster.driver_context import DriverContext
from rayft.compose.job import PreparedData
from rayft.config.run import Run
from rayft.hosts.train_run import TrainRun
from rayft.records.run_record import Status
from rayft.trials.types import TrialReport


@ray.remote(num_cpus=0, max_concurrency=8)
class TrainRunActor:
    """Holds one TrainRun. `next` blocks in a thread of its own: `leave` and `save` get through."""

    def __init__(self, driver: DriverContext) -> None:
        driver.enter()  # a relative model path means the driver's
        self._train_run: TrainRun | None = None

    def begin(
        self,
        config: dict[str, Any],
        prepared: PreparedData,
        source: str | None,
        divergence: float,
        heard: int,
    ) -> None:
        """Start, or continue, the run."""
        run = Run.model_validate(config)
        self._train_run = TrainRun(run, prepared, source=source, divergence=divergence, heard=heard)

    def next(self, trial: str) -> TrialReport:
        """The next report."""
        return self._train_run.next()

    def save(self, trial: str) -> str:
        """A committed checkpoint's folder."""
        return self._train_run.save()

    def leave(self, trial: str, keep: bool, status: Status) -> None:
        """Stop the run and free what it held."""
        self._train_run.leave(status, keep=keep)
