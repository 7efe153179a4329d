"""A trial that is a Ray Train run of its own, as a host: the same questions as a pack answers."""

from __future__ import annotations

from collections.abc import Mapping

import ray

from rayft.cluster.driver_context import DriverContext
from rayft.compose.job import PreparedData
from rayft.config.run import Run
from rayft.core.errors import RayftError
from rayft.hosts.train_run import TrainRun
from rayft.records.run_record import Status
from rayft.trials.types import TrialReport


# Ray's overloads of `remote` do not know max_concurrency
@ray.remote(num_cpus=0, max_concurrency=8)  # pyright: ignore[reportCallIssue, reportUntypedClassDecorator]  # see above
class TrainRunActor:
    """Holds one TrainRun. `next` blocks in a thread of its own: `leave` and `save` get through."""

    def __init__(self, driver: DriverContext) -> None:
        driver.enter()  # a relative model path means the driver's
        self._train_run: TrainRun | None = None

    def begin(
        self,
        config: Mapping[str, object],
        prepared: PreparedData,
        source: str | None,
        divergence: float,
        heard: int,
    ) -> None:
        """Start, or continue, the run."""
        run = Run.model_validate(config)
        self._train_run = TrainRun(run, prepared, source=source, divergence=divergence, heard=heard)

    def _begun(self) -> TrainRun:
        if self._train_run is None:
            raise RayftError("this run has not begun")
        return self._train_run

    def next(self, trial: str) -> TrialReport:
        """The next report."""
        return self._begun().next()

    def save(self, trial: str) -> str:
        """A committed checkpoint's folder."""
        return self._begun().save()

    def leave(self, trial: str, keep: bool, status: Status) -> None:
        """Stop the run and free what it held."""
        self._begun().leave(status, keep=keep)
