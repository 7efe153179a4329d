"""scale.workers >= 1: connect, preflight, prepare the data in Ray tasks, attempts."""

from __future__ import annotations

import os

from rayft.cluster import preflight
from rayft.cluster.connect import ceiling, cluster_hardware, connected, nodes
from rayft.cluster.interrupt import Interrupt
from rayft.cluster.map_tasks import map_on_ray
from rayft.compose.job import AttemptOutcome, PreparedData
from rayft.config.run import Run
from rayft.storage.folder import Storage
from rayft.training import launch
from rayft.training.attempts import run_attempts
from rayft.training.state import RunState
from rayft.training.types import DataPreparer, Engine


def train_on_cluster(
    run: Run,
    state: RunState,
    interrupt: Interrupt,
    engine: Engine | None,
    prepare: DataPreparer,
    again: str,
) -> AttemptOutcome:
    """All attempts of a run on Ray.

    Raises:
        RayftError: refused, failed for good, or interrupted.
    """
    interrupt.check()
    address = os.environ.get("RAY_ADDRESS")
    state.note(f"joining Ray at {address}" if address else "starting Ray on this machine")
    with connected(interrupt=interrupt) as watch:
        interrupt.arm()  # ray.init installs a SIGTERM handler that ends the process
        interrupt.check()
        living, limit = nodes(), ceiling()
        gpus = preflight.gpus_per_worker(run, living)
        preflight.feasible(run, living, gpus, limit)
        preflight.storage_everywhere(state.home, living)
        if run.data.cache is not None:  # by default it lies in the storage just checked
            preflight.storage_everywhere(Storage.open(run.data.cache), living, "data.cache")
        prepared: PreparedData = prepare(run, map_on_ray(interrupt))
        interrupt.check()
        state.begin(prepared, cluster_hardware())

        def once(number: int) -> AttemptOutcome:
            if watch is not None:
                watch.settle()
            workers = preflight.workers_now(run.scale, nodes(), gpus)
            state.note(f"starting {workers} workers" + f", attempt {number + 1}" * bool(number))
            return launch.launch_attempt(
                state.job(prepared),
                run.scale,
                workers=workers,
                gpus=gpus,
                engine=engine,
                patient=limit is not None,
                interrupt=interrupt,
                heard=state.hear,
            )

        return run_attempts(
            once,
            retries=run.scale.retries,
            reached=lambda: state.reached,
            wait=interrupt.sleep,
            failed=state.failed,
            again=again,
        )
