"""`rayft train` and `rayft.train`: run a config, or continue the unfinished run of that name."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

from rayft.compose.job import Outcome
from rayft.config.rules import refuse
from rayft.config.run import Run
from rayft.core.errors import InterruptedRun, PermanentStorageError
from rayft.core.lease import Lease
from rayft.core.record import RunRecord
from rayft.core.storage import Storage, reachable
from rayft.runtime import trackers
from rayft.runtime.attempts import persevere
from rayft.runtime.book import Book, Fence
from rayft.runtime.first_look import first_look
from rayft.runtime.interrupt import Interrupt, handling
from rayft.runtime.progress import View, view
from rayft.runtime.types import Engine, Prepare

AGAIN = "the same command"


@dataclass(frozen=True)
class Seat:
    """What a run is part of, where it is not alone: a trial of a sweep, or its winner."""

    view: View
    interrupt: Interrupt  # the sweep's way to stop it
    source: str = ""  # checkpoint folder of another trial to begin from
    fence: Fence = lambda now: None  # of the sweep
    export: bool = False


def train(
    run: Run,
    *,
    engine: Engine | None = None,
    prepare: Prepare | None = None,
    again: str = AGAIN,
    seat: Seat | None = None,
    restart: bool = False,
    insist: bool = True,
) -> RunRecord:
    """Train until the run is done, through failures; a done run is returned as it is.

    Args:
        engine: what one worker executes; default rayft.compose.execute.execute.
        prepare: how data is tokenised; default rayft's own.
        again: the command that continues this run, for messages.
        seat: for a trial of a sweep; default: a run of its own, on this terminal.
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
    book = _book(home, run, seat, insist)
    try:
        if book.done and not restart:
            return _done(book)
        if seat is None:
            first_look(run, home, book.note)
        with (
            handling() if seat is None else nullcontext(seat.interrupt) as interrupt,
            Lease.held(home, interrupt.stop) as lease,
        ):
            book.home = home.existing()
            book.fence, book.lease = _fence(lease, seat), lease.id
            # Another driver may have ended while this one began.
            (book.restart if restart else book.reread)()
            if book.done:
                return _done(book)
            if book.record.attempts and not restart:
                book.note(f"continuing run {run.name} ({book.record.status}): {home.shown()}")
            try:
                return _train(run, book, interrupt, engine, prepare or _prepare(), again)
            except BaseException:  # whatever it was, the lost lease is why
                if not lease.lost:
                    raise
                why = lease.error()
                gone = isinstance(why, PermanentStorageError)
                # From None: a traceback in the folder of the run would be a write too.
                raise (book.with_last_commit(why) if gone else why) from None
    finally:
        book.close()


def _fence(lease: Lease, seat: Seat | None) -> Fence:
    def fence(now: bool) -> None:
        lease.check(now)
        if seat is not None:
            seat.fence(now)

    return fence


def _book(home: Storage, run: Run, seat: Seat | None, insist: bool) -> Book:
    if seat is not None:
        return Book(home, run, seat.view, source=seat.source, export=seat.export, insist=False)
    reachable(home)
    return Book(home, run, view(), insist=insist)


def _done(book: Book) -> RunRecord:
    record = book.record
    book.note(f"run {record.name} is done ({record.steps} steps): {book.home.shown()}")
    return record


def _train(
    run: Run, book: Book, interrupt: Interrupt, engine: Engine | None, prepare: Prepare, again: str
) -> RunRecord:
    try:
        if run.scale.workers == 0:
            outcome = _alone(run, book, interrupt, engine, prepare, again)
        else:
            from rayft.runtime.fleet import run_fleet

            outcome = run_fleet(run, book, interrupt, engine, prepare, again)
    except PermanentStorageError as error:
        book.broke(error)
        raise book.with_last_commit(error) from error.__cause__
    except BaseException as error:
        book.broke(error)
        raise
    record = book.finish(outcome)
    if record.status == "interrupted":
        raise InterruptedRun(
            f"saved at step {record.steps} of {record.steps_total}", fix=f"continue with {again}"
        )
    return record


def _alone(
    run: Run, book: Book, interrupt: Interrupt, engine: Engine | None, prepare: Prepare, again: str
) -> Outcome:
    from rayft.runtime import solo

    prepared = prepare(run, solo.in_process)
    interrupt.check()
    book.begin(prepared, solo.hardware())
    return persevere(
        lambda _: solo.launch(
            book.job(prepared), run.scale.gpus, engine or _engine(), book, interrupt
        ),
        retries=0,  # what failed here would fail again: same process, same memory
        reached=lambda: book.reached,
        wait=interrupt.sleep,
        failed=book.failed,
        again=again,
    )


def _engine() -> Engine:
    from rayft.compose.execute import execute

    return execute


def _prepare() -> Prepare:
    from rayft.compose.data import prepare_data

    return prepare_data
