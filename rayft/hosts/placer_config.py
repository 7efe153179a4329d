"""What the trial placer works with: the cluster's share of a sweep, and data of other trials."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import ray

from rayft.cluster.driver_context import DriverContext
from rayft.compose.job import PreparedData
from rayft.config.run import Run

ATTEMPTS = 100_000  # numbers of attempts that one start of a sweep may give its trials


@dataclass(frozen=True)
class PlacerConfig:
    """What a placer works with: plain data."""

    config: dict[str, object]  # Run.resolved() of the sweep
    home: str  # address of the sweep's folder
    packs: int  # at most
    slots: int
    own_runs: int  # runs of their own at the same time
    cpus: float  # of a pack
    gpus: float
    start: int  # number of this start of the sweep: part of attempt names
    lease: str  # id of the driver's claim on the sweep
    driver: DriverContext
    environment: dict[str, str]
    dashboard: bool  # without one, runs of their own would hang
    facts: dict[str, object] = field(default_factory=dict)


# The packs hold every CPU that Ray shares out: a task that asked for one would wait for ever.
@ray.remote(num_cpus=0, max_retries=2)
def prepare_trial_data(config: Mapping[str, object], driver: DriverContext) -> PreparedData:
    """Tokenise what a trial reads, where the space changes its data."""
    from rayft.compose.data import prepare_data

    driver.enter()
    return prepare_data(
        Run.model_validate(config), lambda function, items: [function(item) for item in items]
    )


def what_is_read(run: Run) -> list[object]:
    """What decides tokens and masks, as JSON."""
    model = run.model
    names = [model.path, model.revision, model.tokenizer, model.chat_template]
    return [run.data.model_dump(mode="json"), run.objective.model_dump(mode="json"), *names]
