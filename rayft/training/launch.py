"""One attempt as one Ray Train run.

Ray's own checkpoint registry is not used: its snapshot is overwritten in place and without hashes,
and a torn one makes every later start of the same name fail. So every attempt has a name and a
local folder of its own, and the state comes from rayft's commits.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any

from ray.exceptions import RayError
from ray.train import (
    ControllerError,
    FailureConfig,
    RunConfig,
    ScalingConfig,
    TrainingFailedError,
)
from ray.train.torch import TorchConfig, TorchTrainer

from rayft.cluster.driver_context import DriverContext, passed_on
from rayft.cluster.interrupt import Interrupt
from rayft.cluster.preflight import resources
from rayft.compose.job import AttemptJob, AttemptOutcome, ProgressEvent
from rayft.config.run import ScaleSpec
from rayft.core.address import redact
from rayft.core.background import in_background
from rayft.core.process import temporary
from rayft.training.control import DriverControl
from rayft.training.failure import AttemptFailure, WorkerFailed, at_step, caught, first
from rayft.training.types import Engine
from rayft.training.worker import WorkerTask, work

STOPPING = "stopping after this step; once more to stop at once"
PERIOD = 0.2  # seconds between two looks at signals and events
COLLECTIVE_TIMEOUT = 1800  # seconds a collective may take before the process group fails
PLACEMENTS = 1  # further tries of 60 s each to place the workers of an attempt
LEAVE = 20  # seconds that workers get to go away after a forced stop


def launch_attempt(
    job: AttemptJob,
    scale: ScaleSpec,
    *,
    workers: int,
    gpus: float,
    engine: Engine | None,
    patient: bool,
    interrupt: Interrupt,
    heard: Callable[[list[ProgressEvent]], int | None],
) -> AttemptOutcome:
    """Run `job` on `workers` workers until it ends.

    Args:
        patient: an autoscaler may still bring nodes, so wait for them without end.
        heard: takes the events that came in; returns the last finished step, if known.

    Raises:
        WorkerFailed: the first failure of any rank.
        InterruptedRun: stopped at once by a second signal.
    """
    name = f"rayft-{job.config['name']}-{job.attempt}"
    try:
        control = DriverControl(name)
    except RayError as error:
        raise WorkerFailed(caught(error)) from error
    with temporary("attempt") as folder:
        trainer = TorchTrainer(
            work,
            train_loop_config={
                "task": WorkerTask(job, name, scale.cpus, DriverContext.here(), engine),
            },
            torch_config=TorchConfig(
                backend="nccl" if gpus else "gloo", timeout_s=COLLECTIVE_TIMEOUT
            ),
            scaling_config=ScalingConfig(
                num_workers=workers,
                use_gpu=gpus > 0,
                resources_per_worker=resources(scale, gpus),
                placement_strategy=scale.placement,
            ),
            run_config=RunConfig(
                name=name,
                storage_path=folder,
                failure_config=FailureConfig(
                    max_failures=0, controller_failure_limit=-1 if patient else PLACEMENTS
                ),
                worker_runtime_env=_environment(),
            ),
        )
        # Outside of the main thread Ray Train installs no signal handler of its own.
        fit = in_background(lambda: trainer.fit().return_value, "rayft-fit")
        try:
            return _follow(fit, control, interrupt, heard)
        except RayError as error:  # Ray itself is in trouble: the control actor or the cluster
            raise WorkerFailed(caught(error)) from error
        finally:
            if not interrupt.cut_off:  # else both would wait for a cluster that is gone
                control.kill()
                wait([fit], LEAVE)


def _environment() -> dict[str, Any] | None:
    """Variables for workers on other nodes; a local Ray has inherited them, and asking for none
    lets it hand out processes that are already warm."""
    joined = os.environ.get("RAY_ADDRESS")
    return {"env_vars": passed_on()} if joined and passed_on() else None


def _follow(
    fit: Future[Any],
    control: DriverControl,
    interrupt: Interrupt,
    heard: Callable[[list[ProgressEvent]], int | None],
) -> AttemptOutcome:
    """Pass events on and signals down until the attempt ends."""
    told = False
    while not fit.done():
        wait([fit], PERIOD)
        heard(control.drain())
        if interrupt.forced:
            raise interrupt.ended(
                "stopped at once, without a save", fix="the same command continues the run"
            )
        if interrupt.asked and not told:
            control.stop()
            heard([ProgressEvent("warn", text=STOPPING)])
            told = True
    step = heard(control.drain())
    error = fit.exception()
    if error is not None:
        raise WorkerFailed(_failure(error, step)) from error
    if fit.result() is None:
        raise RuntimeError("Ray Train returned nothing from rank 0")
    return AttemptOutcome(**fit.result())


def _failure(error: BaseException, step: int | None) -> AttemptFailure:
    """What made a fit() fail: the first failed rank, or Ray itself."""
    current = None if step is None else step + 1
    if isinstance(error, TrainingFailedError) and "worker_failures" in vars(error):
        ranks = {
            rank: _of_rank(rank, each) for rank, each in vars(error)["worker_failures"].items()
        }
        if ranks:
            return first(at_step(ranks, current))
    if isinstance(error, ControllerError):
        error = error.controller_failure  # what Ray wrapped says more than the wrapper
    return caught(error, step=current)


def _of_rank(rank: int, error: Exception) -> AttemptFailure:
    if isinstance(error, WorkerFailed):
        return error.failure
    text = redact(str(error))
    return AttemptFailure(
        kind="WorkerDied" if type(error).__module__.startswith("ray.") else type(error).__name__,
        message=_why_died(text),
        trace=text,
        when=time.time(),
        rank=rank,
        died=True,
    )


def _why_died(text: str) -> str:
    """Ray's explanation always lists every possible cause; only this part is telling."""
    for line in text.splitlines():
        if "low on memory" in line or "its node has died" in line:
            return line.strip()
    return "the process ended without an error of its own"
