"""`rayft train` and `rayft.train`: run a config, or continue the unfinished run of that name."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

from rayft.cluster.interrupt import Interrupt, handling
from rayft.compose.job import AttemptOutcome
from rayft.config.rules import refuse
from rayft.config.run import Run
from rayft.core.errors import InterruptedRun, PermanentStorageError
from rayft.records.run_record import RunRecord
from rayft.storage.folder import Storage, reachable
from rayft.storage.lease import Lease
from rayft.training import trackers
from rayft.training.attempts import run_attempts
from rayft.training.progress import ProgressView, view
from rayft.training.state import Fence, RunState
from rayft.training.storage_check import check_storage
from rayft.training.types import DataPreparer, Engine

AGAIN = "the same command"


@dataclass(frozen=True)
class RunContext:
    """What a run is part of, where it is not alone: a trial of a sweep, or its winner."""

    view: ProgressView
    interrupt: Interrupt  # the sweep's way to stop it
    source: str = ""  # checkpoint folder of another trial to begin from
    fence: Fence = lambda now: None  # of the sweep
    export: bool = False


def train(
    run: Run,
    *,
    engine: Engine | None = None,
    prepare: DataPreparer | None = None,
    again: str = AGAIN,
    context: RunContext | None = None,
    restart: bool = False,
    insist: bool = True,
) -> RunRecord:
    """Train until the run is done, through failures; a done run is returned as it is.

    Args:
        engine: what one worker executes; default rayft.compose.execute.execute.
        prepare: how data is tokenised; default rayft's own.
        again: the command that continues this run, for messages.
        context: for a trial of a sweep; default: a run of its own, on this terminal.
        restart: set checkpoints and metrics aside, and begin at step 0.
        insist: where all its commits are damaged, stop (a trial never does: it begins again).

    Raises:
        ConfigError, DataError, InfeasibleError, DivergedError, StorageError: exit codes 2 to 6.
        InterruptedRun: stopped by a signal, saved; exit code 75.
        InUseError: another driver has this run, or took it over.
        RayftError: failed for good; or its lease was deleted.
    """
    refuse(run)
    trackers.installed(run.trackers)
    home = Storage.open(run.storage).child(run.name)
    state = _run_state(home, run, context, insist)
    try:
        if state.done and not restart:
            return _done(state)
        if context is None:
            check_storage(run, home, state.note)
        with (
            handling() if context is None else nullcontext(context.interrupt) as interrupt,
            Lease.held(home, interrupt.stop) as lease,
        ):
            state.home = home.existing()
            state.fence, state.lease = _fence(lease, context), lease.id
            # Another driver may have ended while this one began.
            (state.restart if restart else state.reread)()
            if state.done:
                return _done(state)
            if state.record.attempts and not restart:
                state.note(f"continuing run {run.name} ({state.record.status}): {home.shown()}")
            try:
                return _train(run, state, interrupt, engine, prepare or _prepare(), again)
            except BaseException:  # whatever it was, the lost lease is why
                if not lease.lost:
                    raise
                why = lease.error()
                gone = isinstance(why, PermanentStorageError)
                # From None: a traceback in the folder of the run would be a write too.
                raise (state.with_last_commit(why) if gone else why) from None
    finally:
        state.close()


def _fence(lease: Lease, context: RunContext | None) -> Fence:
    def fence(now: bool) -> None:
        lease.check(now)
        if context is not None:
            context.fence(now)

    return fence


def _run_state(home: Storage, run: Run, context: RunContext | None, insist: bool) -> RunState:
    if context is not None:
        return RunState(
            home, run, context.view, source=context.source, export=context.export, insist=False
        )
    reachable(home)
    return RunState(home, run, view(), insist=insist)


def _done(state: RunState) -> RunRecord:
    record = state.record
    state.note(f"run {record.name} is done ({record.steps} steps): {state.home.shown()}")
    return record


def _train(
    run: Run,
    state: RunState,
    interrupt: Interrupt,
    engine: Engine | None,
    prepare: DataPreparer,
    again: str,
) -> RunRecord:
    try:
        if run.scale.workers == 0:
            outcome = _train_in_process(run, state, interrupt, engine, prepare, again)
        else:
            from rayft.training.on_cluster import train_on_cluster

            outcome = train_on_cluster(run, state, interrupt, engine, prepare, again)
    except PermanentStorageError as error:
        state.broke(error)
        raise state.with_last_commit(error) from error.__cause__
    except BaseException as error:  # the record must say how the run ended
        state.broke(error)
        raise
    record = state.finish(outcome)
    if record.status == "interrupted":
        raise InterruptedRun(
            f"saved at step {record.steps} of {record.steps_total}", fix=f"continue with {again}"
        )
    return record


def _train_in_process(
    run: Run,
    state: RunState,
    interrupt: Interrupt,
    engine: Engine | None,
    prepare: DataPreparer,
    again: str,
) -> AttemptOutcome:
    from rayft.training import in_process

    prepared = prepare(run, in_process.map_in_process)
    interrupt.check()
    state.begin(prepared, in_process.machine_hardware())
    return run_attempts(
        lambda _: in_process.attempt_in_process(
            state.job(prepared), run.scale.gpus, engine or _engine(), state, interrupt
        ),
        retries=0,  # what failed here would fail again: same process, same memory
        reached=lambda: state.reached,
        wait=interrupt.sleep,
        failed=state.failed,
        again=again,
    )


def _engine() -> Engine:
    from rayft.compose.execute import execute

    return execute


def _prepare() -> DataPreparer:
    from rayft.compose.data import prepare_data

    return prepare_data
