"""Retries: which failure is worth another attempt, and when to stop with a diagnosis.

`decide` is pure; `run_attempts` only carries it out. Ray Train's own retries are off
(FailureConfig(max_failures=0)) because they restart at once, without end and without looking at
what failed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from rayft.core.errors import (
    DamagedError,
    DeadGradientError,
    InUseError,
    PermanentStorageError,
    RayftError,
    first_line,
)
from rayft.training.failure import AttemptFailure, WorkerFailed, hint

T = TypeVar("T")

SAME = 3  # the same error at the same step so often is no accident
FINAL = frozenset({2, 3, 4, 5, 75})  # exit codes that another attempt cannot change
HOPELESS = (PermanentStorageError, DeadGradientError, DamagedError, InUseError)  # whatever code
FIRST_DELAY, LONGEST_DELAY = 1.0, 60.0  # seconds


@dataclass(frozen=True)
class EndedAttempt:
    """How one attempt ended, and how far it had come."""

    failure: AttemptFailure
    reached: int  # last finished step


@dataclass(frozen=True)
class RetryAfter:
    """Try again after `delay` seconds."""

    delay: float


@dataclass(frozen=True)
class GiveUp:
    """Stop; `reason` completes the sentence "stopped: ..."."""

    reason: str


def decide(history: Sequence[EndedAttempt], retries: int) -> RetryAfter | GiveUp:
    """What to do after the last attempt of `history` failed.

    Args:
        history: failed attempts, oldest first; never empty.
        retries: attempts after the first one (scale.retries). An attempt that finishes a step
            which none before it had finished made progress: it counts as a first one again.
    """
    last = history[-1]
    hopeless = isinstance(last.failure.error, HOPELESS)
    if last.failure.exit_code in FINAL or hopeless:
        return GiveUp("another attempt cannot change this")
    stalled, furthest = 0, -1
    for attempt in history:
        stalled = 1 if attempt.reached > furthest else stalled + 1
        furthest = max(furthest, attempt.reached)
    if _repeats(history):
        return GiveUp(f"the same error at the same step {SAME} times")
    if stalled > retries:
        return GiveUp(f"{len(history)} failed attempt{'s' * (len(history) > 1)}")
    return RetryAfter(min(LONGEST_DELAY, FIRST_DELAY * 2 ** (stalled - 1)))


def _repeats(history: Sequence[EndedAttempt]) -> bool:
    tail = [(one.failure.fingerprint, one.failure.step) for one in history[-SAME:]]
    return len(tail) == SAME and len(set(tail)) == 1


def run_attempts(
    launch: Callable[[int], T],
    *,
    retries: int,
    reached: Callable[[], int],
    wait: Callable[[float], None],
    failed: Callable[[AttemptFailure, RetryAfter | GiveUp], str],
    again: str,
) -> T:
    """Call `launch(number of the attempt)` until it returns, or until `decide` says to stop.

    Args:
        launch: raises WorkerFailed or a RayftError; anything else is a defect of rayft and
            passes through.
        reached: the last finished step, of this or an earlier attempt.
        wait: sleeps, or raises InterruptedRun when the user wants to stop meanwhile.
        failed: told of every failure; keeps the full traceback and returns where.
        again: the command that continues the run.

    Raises:
        RayftError: the diagnosis, at most 15 lines.
    """
    history: list[EndedAttempt] = []
    while True:
        try:
            return launch(len(history))
        except WorkerFailed as error:
            failure = error.failure
        except RayftError as error:
            failure = AttemptFailure(type(error).__name__, error.what, str(error), 0.0, error=error)
        history.append(EndedAttempt(failure, reached()))
        verdict = decide(history, retries)
        kept = failed(failure, verdict)
        if isinstance(verdict, GiveUp):
            raise diagnosis(failure, verdict, kept, again)
        wait(verdict.delay)


def diagnosis(failure: AttemptFailure, verdict: GiveUp, kept: str, again: str) -> RayftError:
    """The error that ends the run: what, which rank and step, why, where the traceback lies."""
    if failure.error is not None:
        own = failure.error
        fix = own.fix or again
        if isinstance(own, PermanentStorageError):
            fix = f"{own.fix or 'mend it'}, then continue from the last checkpoint: {again}"
        return type(own)(own.what, where=failure.where, cause=own.cause, fix=fix)
    message = first_line(failure.message)
    return RayftError(
        f"training failed: {failure.kind}{': ' * bool(message)}{message}\n"
        f"  stopped: {verdict.reason}\n  traceback: {kept}",
        where=failure.where,
        cause=hint(failure),
        fix=f"mend the cause, then continue from the last checkpoint: {again}",
    )
