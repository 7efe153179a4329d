"""Retry policy and failure reports, without Ray."""

import pickle

import pytest

from rayft.core.errors import (
    DivergedError,
    InterruptedRun,
    PermanentStorageError,
    RayftError,
    StorageError,
)
from rayft.training.attempts import (
    SAME,
    EndedAttempt,
    GiveUp,
    RetryAfter,
    decide,
    diagnosis,
    run_attempts,
)
from rayft.training.failure import AttemptFailure, WorkerFailed, caught, first, hint


def failure(message="boom", step=15, **more):
    return AttemptFailure(
        **{"kind": "ValueError", "trace": "", "when": 0.0} | more, message=message, step=step
    )


def died(step, rank=0):
    return failure("killed", step, kind="WorkerDied", died=True, rank=rank)


def test_delays_double_until_the_bound_and_start_again_after_progress():
    history, delays = [], []
    for reached in (10, 10, 10, 10, 30):
        history.append(EndedAttempt(died(step=len(history)), reached))
        delays.append(decide(history, retries=9).delay)
    assert delays == [1, 2, 4, 8, 1]
    long = [EndedAttempt(died(step=n), 0) for n in range(9)]
    assert decide(long, retries=20) == RetryAfter(60.0)


@pytest.mark.parametrize("retries", [0, 1, 3])
def test_attempts_without_progress_are_bounded(retries):
    history = [EndedAttempt(died(step=n), 0) for n in range(retries + 1)]
    assert isinstance(decide(history, retries), GiveUp)
    if retries:
        assert isinstance(decide(history[:-1], retries), RetryAfter)


def test_a_run_that_keeps_making_progress_is_never_given_up():
    history = [EndedAttempt(died(step=n + 1), n) for n in range(1, 50)]
    assert decide(history, retries=1) == RetryAfter(1.0)


def test_the_same_error_at_the_same_step_three_times_ends_it():
    history = [EndedAttempt(failure(f"boom at 0x{n:x}ff"), 14) for n in range(SAME)]
    assert isinstance(decide(history[:2], retries=9), RetryAfter)
    verdict = decide(history, retries=9)
    assert isinstance(verdict, GiveUp) and "same error" in verdict.reason
    assert isinstance(decide([*history[:2], EndedAttempt(failure(step=16), 14)], 9), RetryAfter)
    assert isinstance(decide([*history[:2], EndedAttempt(failure("other"), 14)], 9), RetryAfter)


def test_refusals_are_final_and_storage_is_tried_again():
    final = EndedAttempt(failure(error=DivergedError("nan")), 14)
    assert isinstance(decide([final], retries=9), GiveUp)
    again = EndedAttempt(failure(error=StorageError("503")), 14)
    assert isinstance(decide([again], retries=9), RetryAfter)


def test_the_first_failure_is_the_cause_not_what_peers_saw():
    peer = failure("Connection closed by peer [10.0.0.1]:4", rank=0, when=1.0)
    dead = died(15, rank=1)
    own = failure(rank=2, when=9.0, error=StorageError("disk full"))
    assert first([peer, dead]) is dead
    assert first([peer, dead, own]) is own
    assert first([peer]) is peer


def test_reports_survive_pickling_whatever_was_raised():
    class Local(Exception):
        def __init__(self, a, b):
            super().__init__(a)

    try:
        raise Local("no pickle", 2)
    except Local as error:
        report = caught(error, rank=1, step=7)
    back = pickle.loads(pickle.dumps(WorkerFailed(report))).failure
    assert back == report and back.where == "rank 1, step 7"
    assert "raise Local" in back.trace
    own = caught(DivergedError("nan", where="step 3"), rank=0)
    assert pickle.loads(pickle.dumps(own)).exit_code == 5


def test_the_diagnosis_names_rank_step_cause_trace_and_command():
    text = str(
        diagnosis(
            failure(
                "CUDA out of memory. " + "x" * 500 + "\n" * 40, rank=1, kind="OutOfMemoryError"
            ),
            GiveUp("the same error at the same step 3 times"),
            "/runs/r/errors/attempt-3.txt",
            "rayft train a.yaml",
        )
    )
    assert len(text.splitlines()) <= 15
    for part in ("rank 1, step 15", "OutOfMemoryError", "micro_batch", "attempt-3.txt", "a.yaml"):
        assert part in text
    refused = diagnosis(failure(error=DivergedError("nan")), GiveUp("-"), "-", "again")
    assert isinstance(refused, DivergedError) and "step 15" in str(refused)


def test_hints():
    assert "kill" in hint(died(1))
    assert "host memory" in hint(failure("Worker exit: OOM, memory monitor", died=True))
    assert hint(failure("boom")) == ""


def test_persevere_waits_as_decided_and_returns_the_result():
    waits, kept, steps = [], [], iter([5, 5, 9])

    def launch(number):
        if number < 3:
            raise WorkerFailed(died(step=10 + number))
        return "outcome"

    result = run_attempts(
        launch,
        retries=3,
        reached=lambda: next(steps),
        wait=waits.append,
        failed=lambda one, verdict: kept.append((one.step, verdict)) or "kept",
        again="again",
    )
    assert result == "outcome" and waits == [1.0, 2.0, 1.0]
    assert [step for step, _ in kept] == [10, 11, 12]


def test_persevere_stops_at_once_when_interrupted():
    def launch(number):
        raise InterruptedRun("now")

    with pytest.raises(InterruptedRun):
        run_attempts(launch, retries=3, reached=lambda: 0, wait=pytest.fail,
                  failed=lambda one, verdict: "kept", again="")  # fmt: skip


def test_persevere_raises_the_diagnosis():
    def launch(number):
        raise WorkerFailed(failure(rank=0))

    with pytest.raises(RayftError, match="same error at the same step"):
        run_attempts(launch, retries=9, reached=lambda: 14, wait=lambda delay: None,
                  failed=lambda one, verdict: "kept", again="")  # fmt: skip


def test_storage_that_refuses_for_good_is_not_tried_again():
    for kind, verdict in ((PermanentStorageError, GiveUp), (StorageError, RetryAfter)):
        own = kind("no space")
        one = EndedAttempt(AttemptFailure(kind.__name__, "no space", "", 0.0, error=own), 4)
        assert isinstance(decide([one], 3), verdict)
    told = str(diagnosis(one_permanent(), GiveUp("no"), "there", "rayft train c.yaml"))
    assert "next: mend it, then continue from the last checkpoint: rayft train c.yaml" in told


def one_permanent():
    own = PermanentStorageError("no space", cause="the disk is full")
    return AttemptFailure("PermanentStorageError", "no space", "", 0.0, error=own)
