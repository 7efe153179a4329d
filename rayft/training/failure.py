"""What went wrong in an attempt, as plain data: who failed first, where, and what helps."""

from __future__ import annotations

import re
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from rayft.core.address import redact
from rayft.core.errors import RayftError, first_line

# Errors that a rank only sees because another rank went away first.
_SECONDARY = re.compile(
    r"connection (closed|reset|refused)|broken pipe|\bgloo\b|\bnccl|watchdog|TCPStore|socket"
    r"|process group|timed? ?out",
    re.IGNORECASE,
)
_GPU_OOM = re.compile(r"CUDA out of memory|OutOfMemoryError|CUBLAS_STATUS_ALLOC_FAILED")
_HOST_OOM = re.compile(
    r"\bOOM\b|out of memory|low on memory|memory (pressure|monitor)|cannot allocate memory",
    re.IGNORECASE,
)
_VOLATILE = re.compile(r"0x[0-9a-fA-F]+|[0-9a-f]{12,}|\d+(\.\d+)*")


@dataclass(frozen=True)
class AttemptFailure:
    """One failed rank, or a failure outside of any rank (rank None)."""

    kind: str  # class name of the exception
    message: str
    trace: str
    when: float  # seconds since the epoch
    rank: int | None = None
    step: int | None = None  # being computed, 1-based; of a dead process: as last heard of rank 0
    error: RayftError | None = None  # set when rayft itself raised it
    died: bool = False  # the process ended without a word (kill -9, OOM killer, node loss)

    @property
    def exit_code(self) -> int:
        """What the command would exit with if this ended the run."""
        return self.error.exit_code if self.error else 1

    @property
    def fingerprint(self) -> str:
        """Equal for the same mistake: class and message without numbers, addresses and ids."""
        return f"{self.kind}: {_VOLATILE.sub('#', first_line(self.message))}"

    @property
    def where(self) -> str:
        """`rank 1, step 15`, as far as known."""
        own = self.error.where if self.error else ""
        parts = [("rank", self.rank), ("step", self.step)]
        known = [f"{n} {v}" for n, v in parts if v is not None and f"{n} " not in own]
        return ", ".join([*known, own] if own else known)


class WorkerFailed(Exception):
    """Carries a Failure from a worker to the driver. Foreign exceptions may not survive pickling;
    this always does."""

    def __init__(self, failure: AttemptFailure) -> None:
        super().__init__(failure)
        self.failure = failure

    def __str__(self) -> str:
        return f"{self.failure.where}: {self.failure.kind}: {first_line(self.failure.message)}"


def caught(
    error: BaseException, *, rank: int | None = None, step: int | None = None
) -> AttemptFailure:
    """The Failure of an exception that is being handled here."""
    own = error if isinstance(error, RayftError) else None
    return AttemptFailure(
        kind=type(error).__name__,
        message=own.what if own else redact(str(error)),
        trace=redact("".join(traceback.format_exception(error))),
        when=time.time(),
        rank=rank,
        step=step,
        error=own,
    )


def first(failures: Sequence[AttemptFailure]) -> AttemptFailure:
    """The one that made the others fail: rayft's own refusals, then dead processes and real errors,
    then what a rank only saw because a peer was gone; among equals the earliest."""

    def order(failure: AttemptFailure) -> tuple[int, float]:
        if failure.error is not None:
            return 0, failure.rank or 0  # all ranks refuse together: the lowest speaks
        if failure.died or not _SECONDARY.search(failure.message):
            return 1, failure.when
        return 2, failure.when

    return min(failures, key=order)


def at_step(failures: Mapping[int, AttemptFailure], step: int | None) -> list[AttemptFailure]:
    """Failures with the step filled in where the rank did not know it."""
    return [
        failure if failure.step is not None else replace(failure, step=step)
        for failure in failures.values()
    ]


def hint(failure: AttemptFailure) -> str:
    """The likely cause, one sentence; empty when there is nothing better than the message."""
    text = f"{failure.kind}: {failure.message}"
    if _GPU_OOM.search(text) and not failure.died:
        return (
            "out of GPU memory: lower train.micro_batch, set train.gradient_checkpointing: true, "
            "or use strategy zero3_offload"
        )
    if _HOST_OOM.search(text):
        return (
            "out of host memory: lower train.micro_batch or scale.workers, give workers more "
            "memory, or do not offload to CPU"
        )
    if failure.died:
        return (
            "the worker process was killed (kill -9, the kernel's OOM killer) or its node was lost"
        )
    if _SECONDARY.search(text):
        return "a rank lost contact with the others: network, or a rank that hangs"
    return ""
