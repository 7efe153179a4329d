"""scale.workers: 0: the attempt runs in this process, without Ray, for debuggers and tests."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist

from rayft.cluster.interrupt import Interrupt
from rayft.compose.job import AttemptJob, AttemptOutcome, Item, Made, ProgressEvent
from rayft.core.errors import InterruptedRun
from rayft.core.process import remove_dead, temporary
from rayft.training.failure import WorkerFailed, caught
from rayft.training.state import RunState
from rayft.training.types import Engine

_ENV = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}


class _LocalSignals:
    """Signals without a distance."""

    def __init__(self, state: RunState, interrupt: Interrupt) -> None:
        self._state, self._interrupt = state, interrupt

    def stop_requested(self) -> bool:
        if self._interrupt.forced:
            raise InterruptedRun("stopped at once, without a save")
        return self._interrupt.asked

    def progress(self, event: ProgressEvent) -> None:
        self._state.hear([event])


def attempt_in_process(
    job: AttemptJob, gpus: float | None, engine: Engine, state: RunState, interrupt: Interrupt
) -> AttemptOutcome:
    """Run `job` here.

    Raises:
        WorkerFailed: whatever went wrong; the original exception is its cause.
        InterruptedRun: stopped at once by a second signal.
    """
    cuda = torch.cuda.is_available() and gpus != 0
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    if not cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with _group("nccl" if cuda else "gloo"):
        try:
            return engine(job, 0, 1, device, _LocalSignals(state, interrupt))
        except InterruptedRun:
            raise
        except Exception as error:  # as in a worker: every error becomes a report
            step = state.hear([])
            current = None if step is None else step + 1
            raise WorkerFailed(caught(error, rank=0, step=current)) from error


@contextmanager
def _group(backend: str) -> Generator[None]:
    """The process group of one that a Ray worker would have, unless the caller has one already."""
    if dist.is_initialized():
        yield
        return
    former = {name: os.environ.get(name) for name in _ENV}
    os.environ.update(_ENV)
    remove_dead()
    with temporary("group") as folder:
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()
            for name, value in former.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


def machine_hardware() -> dict[str, object]:
    """What run.json says of this machine."""
    cuda = torch.cuda.is_available()
    return {
        "nodes": 1,
        "cpus": os.cpu_count(),
        "gpus": torch.cuda.device_count() if cuda else 0,
        "accelerators": [torch.cuda.get_device_name(0)] if cuda else [],
        "machine": platform.machine(),
    }


def map_in_process(function: Callable[[Item], Made], items: Sequence[Item]) -> list[Made]:
    """A TaskMapper without Ray."""
    return [function(item) for item in items]
