"""One attempt on one rank, from start-up to the last commit; all that training/ calls.

Nothing here knows Ray: with one rank and no process group the same code trains in-process.
"""

from __future__ import annotations

import time
from dataclasses import replace

import torch
import torch.distributed as dist

from rayft.compose.arithmetic import settled
from rayft.compose.assemble import RunParts, assemble
from rayft.compose.data import open_corpus
from rayft.compose.gradient_check import GradientCheck
from rayft.compose.job import AttemptJob, AttemptOutcome, DriverSignals, ProgressEvent
from rayft.compose.loop import LoopHooks, StepRunner, StepSchedule, train
from rayft.compose.publish import EXPORT, choose_commit, publish
from rayft.compose.session import RunSession, peak_memory
from rayft.config.run import Run
from rayft.core.protocols import Engine
from rayft.models.quiet import hush
from rayft.records.run_progress import RunProgress
from rayft.records.run_record import RunRecord, stored_record
from rayft.storage.folder import Storage


def execute(
    job: AttemptJob, rank: int, world: int, device: torch.device, signals: DriverSignals
) -> AttemptOutcome:
    """Train from the newest commit (or from the start) to the end, or to a stop request.

    Raises:
        RayftError: with the exit code of what went wrong; the last commit stays intact.
    """
    began = time.monotonic()
    hush()
    run, said = settled(Run.model_validate(job.config), device)
    if said and rank == 0:
        signals.progress(ProgressEvent("warn", text=said))
    storage = Storage.open(run.storage).child(run.name).existing()
    parts = assemble(run, open_corpus(run, job.data_dir, job.data_hash), device)
    session = RunSession(job, parts, storage, signals, began)
    schedule = StepSchedule(parts.steps, run.train.eval_every, run.train.save_every)
    try:
        resumed = session.restore()
        progress = session.progress
        if rank == 0:
            signals.progress(_started(parts, progress))
        if resumed is None:
            _begin(job, session, schedule)
        progress = session.progress
        hooks = LoopHooks(signals.stop_requested, session.log, session.evaluate, session.save)
        stepper = stepper_of(parts)
        status = train(stepper, schedule, progress, hooks)
    except BaseException:  # a signal too: what is being saved gets its moment
        session.abandon()
        raise
    session.finish()
    # The last collective: no rank waits in one, and runs into its timeout, while rank 0 exports.
    outcome = _outcome(status, session)
    if status == "done" and rank == 0 and job.export:
        signals.progress(ProgressEvent("export", progress.step))
        record = _record(job, storage, parts, progress)
        publish(parts.built, record, choose_commit(storage, record), storage.child(EXPORT))
    return outcome


def stepper_of(parts: RunParts[Engine]) -> StepRunner:
    """The steps of an attempt on this rank; made before the first of them."""
    built = parts.built
    check = GradientCheck(built.step, built.groups, parts.engine)
    return StepRunner(parts.engine, built.objective, parts.stream, parts.lrs, check, built.methods)


def _begin(job: AttemptJob, session: RunSession[Engine], schedule: StepSchedule) -> None:
    """From the start, with the base model's evaluation; or from another run's state, which is
    saved at once as this run's own."""
    if not job.source:
        session.evaluate(0)
        return
    session.clone(job.source, schedule)
    session.save(session.progress.step, session.progress.best is not None)


def _started(parts: RunParts[Engine], progress: RunProgress) -> ProgressEvent:
    return ProgressEvent(
        "start",
        progress.step,
        parts.steps,
        groups=tuple(group.name for group in parts.built.groups),
        params_total=parts.params_total,
        params_trainable=parts.params_trainable,
    )


def _record(
    job: AttemptJob, storage: Storage, parts: RunParts[Engine], progress: RunProgress
) -> RunRecord:
    """What the model card tells: the driver's record, with this attempt's results."""
    run = parts.run  # its record may be damaged; the driver writes it again when this is told
    first = RunRecord(run.name, "running", job.config, job.digest, job.data_hash, run.seed)
    record = (stored_record(storage) or first).advanced(progress, parts.size)
    return replace(record, status="done", seconds=progress.seconds)


def _outcome(status: str, session: RunSession[Engine]) -> AttemptOutcome:
    return AttemptOutcome(
        status=status,
        progress=session.progress,
        size=session.parts.size,
        peak_memory=_largest(peak_memory(session.device), session.device),
        seconds=time.monotonic() - session.began,
    )


def _largest(value: int, device: torch.device) -> int:
    """The maximum over ranks."""
    if not (dist.is_available() and dist.is_initialized()):
        return value
    box = torch.tensor([value], dtype=torch.int64, device=device)
    dist.all_reduce(box, op=dist.ReduceOp.MAX)
    return int(box)
