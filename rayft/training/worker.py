"""What runs in every Ray Train worker: get ready, agree on the config, execute the job."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib import metadata

import ray.train
import ray.train.torch
import torch
import torch.distributed as dist

from rayft.cluster.driver_context import DriverContext
from rayft.compose.job import AttemptJob, ProgressEvent
from rayft.config.run import Run
from rayft.core.errors import RayftError
from rayft.training.control import WorkerSignals
from rayft.training.failure import WorkerFailed, caught
from rayft.training.telemetry import RayGauges
from rayft.training.types import Engine

AGREED = ("rayft", "torch", "transformers", "peft", "deepspeed", "ray")


@dataclass(frozen=True)
class WorkerTask:
    """What the driver hands to every worker: plain data, and `engine`, a module-level function."""

    job: AttemptJob
    control: str  # name of the control actor
    cpus: float
    driver: DriverContext  # so that relative paths and addresses mean the same
    engine: Engine | None = None  # default: rayft.compose.execute.execute


class WatchedSignals:
    """WorkerSignals that also feed Ray's metrics."""

    def __init__(self, signals: WorkerSignals, gauges: RayGauges) -> None:
        self._signals, self._gauges = signals, gauges

    def stop_requested(self) -> bool:
        return self._signals.stop_requested()

    def progress(self, event: ProgressEvent) -> None:
        self._gauges.observe(event)
        self._signals.progress(event)


def work(config: dict[str, WorkerTask]) -> dict[str, object]:
    """The Train function. Returns the fields of the AttemptOutcome.

    Raises:
        WorkerFailed: whatever went wrong, as plain data with rank and step.
    """
    task = config["task"]
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    signals = WorkerSignals(task.control, rank)
    try:
        device = ready(task, context.get_local_rank())
        check_same_everywhere(task.job, rank, world)
        gauges = RayGauges(str(task.job.config["name"]), rank)
        outcome = (task.engine or default_engine())(
            task.job, rank, world, device, WatchedSignals(signals, gauges)
        )
        return vars(outcome)
    except Exception as error:  # everything must become a report: foreign errors may not pickle
        step = None if signals.step is None else signals.step + 1
        raise WorkerFailed(caught(error, rank=rank, step=step)) from None
    finally:
        signals.close()


def default_engine() -> Engine:
    """rayft's own."""
    from rayft.compose.execute import execute

    return execute


def ready(task: WorkerTask, local_rank: int) -> torch.device:
    """Threads, working directory and device of this process. RANK, WORLD_SIZE and the process group
    are Ray's work and already there; the device is the one Ray assigned."""
    threads = max(1, int(task.cpus))
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)
    task.driver.enter()
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        return device
    if torch.cuda.current_device() != device.index:
        raise RayftError(
            f"Ray gave this worker {device}, torch uses cuda:{torch.cuda.current_device()}",
            where=f"local rank {local_rank}",
        )
    return device


def check_same_everywhere(job: AttemptJob, rank: int, world: int) -> None:
    """Every rank must train the same config with the same code.

    Raises:
        RayftError: naming the ranks that differ from rank 0.
    """
    digest = Run.model_validate(job.config).digest()
    own = {"config": digest} | {name: version(name) for name in AGREED}
    every: list[dict[str, str]] = [{} for _ in range(world)]
    if world > 1:
        dist.all_gather_object(every, own)
    else:
        every = [own]
    wrong = {
        f"rank {other}: {key} {theirs[key]}, rank 0 has {every[0][key]}"
        for other, theirs in enumerate(every)
        for key in own
        if theirs[key] != every[0][key]
    }
    if every[0]["config"] != job.digest:
        wrong.add(f"all ranks: config {every[0]['config']}, the driver has {job.digest}")
    if wrong:
        raise RayftError(
            "\n".join(["the workers do not agree:", *(f"  {line}" for line in sorted(wrong))]),
            where=f"rank {rank}, before step 1",
            cause="nodes with different installations",
            fix="install the same versions on every node",
        )


def version(package: str) -> str:
    """Its installed version, `-` when it is absent."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "-"
