"""`rayft sweep` and `rayft.sweep`: search, repeat the winner with other seeds, leave the best and
the report. The same command continues a sweep that was cut off."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import ray
from ray.tune.schedulers import FIFOScheduler

from rayft.config.rules import refuse
from rayft.config.run import Run
from rayft.core.errors import ConfigError, DivergedError, InterruptedRun, RayftError, StorageError
from rayft.core.lease import Lease
from rayft.core.record import SweepRecord
from rayft.core.storage import Storage
from rayft.runtime.best import copy_winner, refit, write_config
from rayft.runtime.first_look import first_look
from rayft.runtime.ground import close, ground
from rayft.runtime.interrupt import Interrupt, handling
from rayft.runtime.replay import Replayed
from rayft.runtime.schedule import scheduler
from rayft.runtime.search import Fixed, Search
from rayft.runtime.sweepbook import SweepBook
from rayft.runtime.sweepend import goes_on, leave_report, nothing_found, placer_lost
from rayft.runtime.sweepview import SweepView, sweep_view
from rayft.runtime.tuning import WAITING, Phase
from rayft.runtime.watch import Watch, state_of

PERIOD = 0.5  # seconds between two looks at signals
LOOK = 2.0  # seconds between two looks at the packs
LEDGER_PERIOD = 15.0  # seconds between two lines on the packs


def sweep(run: Run, *, again: str = "the same command") -> SweepRecord:
    """Run the sweep until it is done, through failures; a done sweep is returned as it is.

    Raises:
        ConfigError, DataError, InfeasibleError, StorageError: exit codes 2, 3, 4, 6.
        DivergedError: every trial diverged; the report is there all the same (5).
        InterruptedRun: stopped by a signal; the same command continues it (75).
        InUseError: another driver has this sweep, or took it over.
        RayftError: no trial came to an end; or the lease was deleted.
    """
    if run.sweep is None:
        raise ConfigError("this config has no sweep block", where="sweep", fix=_EXAMPLE)
    refuse(run)
    view = sweep_view()
    home = Storage.open(run.storage).child(run.name)
    try:
        first_look(run, home, view.note)
        with handling() as interrupt, Lease.held(home, interrupt.stop) as lease:
            book = SweepBook(home, run, lease)
            try:
                return _Sweep(run, book, view, interrupt, again).go()
            finally:
                book.close()
    finally:
        view.close()


_EXAMPLE = "add e.g. sweep: {space: {methods.0.rank: {choice: [8, 16, 32]}}}"


class _Sweep:
    """One start of a sweep, on the driver."""

    def __init__(
        self,
        run: Run,
        book: SweepBook,
        view: SweepView,
        interrupt: Interrupt,
        again: str,
    ) -> None:
        self.run, self.book, self.view, self.again = run, book, view, again
        self.interrupt = interrupt
        self.reason = ""  # why the search ended early
        self._looked = self._noted = 0.0

    # ---- from start to end

    def go(self) -> SweepRecord:
        """All phases."""
        book, shown = self.book, self.book.home.shown()
        known = book.book.trials.values()
        if book.record.status == "done" and not goes_on(book):
            self.view.note(f"sweep {self.run.name} is done: {shown}/report.html")
            return book.record
        if known:
            over = sum(trial.over for trial in known)
            self.view.note(f"continuing sweep {self.run.name}: {over} trials over, {shown}")
        try:
            with ground(self.run, book, self.view, self.interrupt) as self.ground:
                self._phases(self.ground.desk)
        except BaseException as error:
            self._broke(error)
            raise
        return self._finish()

    def _phases(self, desk: Any) -> None:
        self._search(desk)
        self._seeds(desk)
        self._look(desk, force=True)
        best, spec = self.book.summary(), self.run.sweep
        if best is None:
            return
        self.book.fence(now=True)
        write_config(self.book.home, self.run, best, spec.metric)
        if spec.refit:
            close(desk)  # the packs leave the cluster to it
            self._refit(best)
        else:
            self._copy(desk, best)

    def _search(self, desk: Any) -> None:
        how = Replayed(scheduler(self.run), self.run, self.book.book)
        for name in how.stopped:
            self.book.stop(name)
        searcher = Search(self.run, self.book.book)
        left = self.run.sweep.count - sum(trial.over for trial in self.book.searched())
        watch = self._watch(self._over)
        if left <= 0 or self._over():
            if not self._asked():
                watch.finish()
            return
        phase = Phase(
            self.run,
            desk,
            searcher,
            how,
            watch,
            name_of=searcher.name_of,
            count=left,
            most=min(left, self.ground.at_once + WAITING),
        )
        self._follow(phase, desk)
        if self.reason:
            watch.finish()
        self.book.write(stopped_by=self.reason or ("grid" if searcher.exhausted else "trials"))

    def _seeds(self, desk: Any) -> None:
        """The winner again, with other seeds, to its full length."""
        best = self.book.best()
        if self.run.sweep.seeds == 1 or best is None or self.interrupt.asked:
            return
        wanted = {}
        for number in range(1, self.run.sweep.seeds):
            name = f"{best[0].id}-s{number}"
            known = self.book.book.trials.get(name)
            if known is None or not known.over:
                wanted[name] = best[0].params | {"seed": self.run.seed + number}
        if not wanted:
            return
        self.view.note(f"{best[0].id} again with {len(wanted)} other seeds")
        self.book.origins |= dict.fromkeys(wanted, best[0].id)
        searcher = Fixed(wanted)
        phase = Phase(
            self.run,
            desk,
            searcher,
            FIFOScheduler(),
            self._watch(self._asked),
            name_of=searcher.name_of,
            count=len(wanted),
            most=len(wanted),
        )
        self._follow(phase, desk)

    def _copy(self, desk: Any, best: dict[str, Any]) -> None:
        """best/ from the winner's own checkpoint, in a process that has torch loaded already."""
        host = ray.get(desk.warm.remote())
        asked = (self.book.home.uri, best["trial"])
        self.book.fence(now=True)
        if host is None:
            said = copy_winner(*asked)
        else:
            copied = host.call.remote(copy_winner, *asked)
            while not ray.wait([copied], timeout=PERIOD)[0]:
                self.book.fence()  # whoever leaves here takes the host along
            said = ray.get(copied)
        self.view.note(f"best: {said.splitlines()[0]}")

    def _refit(self, best: dict[str, Any]) -> None:
        """best/ trained again, for train.steps; the packs have left the cluster to it."""
        self.view.note(f"{best['trial']} again, for {self.run.train.steps} steps")
        how = (self.again, self.interrupt, self.book.fence)
        record = refit(self.run, self.book.home, best, *how)
        metric = record.eval.get(self.run.sweep.metric)
        self.book.write(refit={"metric": metric, "step": record.steps, "seconds": record.seconds})

    # ---- while a phase runs

    def _follow(self, phase: Phase, desk: Any) -> None:
        """Show, and pass signals on, until Tune is done.

        Raises:
            InterruptedRun: after a signal, once every trial is committed.
            InUseError, RayftError: the lease is lost; at once.
        """
        phase.start()
        while phase.is_alive():
            phase.join(PERIOD)
            self.book.fence()
            self._look(desk)
            if self.interrupt.asked and not self.book.interrupted:
                self.book.interrupted = True  # trials that run now are not over
                self.view.note("stopping after this step; once more to stop at once")
            if self.interrupt.forced:
                break
        self._tell()
        if self.interrupt.asked:
            raise self.interrupt.ended("stopped; what was committed is kept", fix=self.again)
        if isinstance(phase.error, RayftError):
            raise phase.error
        if phase.error is not None:
            raise RayftError(f"Ray Tune failed: {phase.error}") from phase.error

    def _watch(self, over: Callable[[], bool]) -> Watch:
        return Watch(self.book, self.ground.leaving, over, self.ground.at_once)

    def _asked(self) -> bool:
        return self.interrupt.asked

    def _over(self) -> bool:
        """Whether the search must end now; keeps the reason."""
        if self._asked():
            return True
        limit = self.run.sweep.max_seconds
        if limit is not None and self.book.seconds > limit:
            self.reason = "max_seconds"
        elif self.book.reached_target():
            self.reason = "target"
        return bool(self.reason)

    def _look(self, desk: Any, force: bool = False) -> None:
        """Ask the desk now and then, and show."""
        now = time.monotonic()
        self._tell()
        if now - self._looked < LOOK and not force:
            return
        self._looked = now
        try:
            seen = ray.get(desk.look.remote(), timeout=10)
        except ray.exceptions.RayActorError as error:
            raise self._placer_lost() from error
        except (ray.exceptions.RayError, TimeoutError):
            return
        self.book.news += seen["news"]
        self.view.show(state_of(self.book, seen))
        if now - self._noted > LEDGER_PERIOD or force:
            self._noted = now
            for name, numbers in seen["packs"].items():
                self.book.pack(name, numbers)

    def _placer_lost(self) -> RayftError:
        """Every host went with the desk: no trial can go on under this driver."""
        self.book.fence(now=True)  # it may have left because the lease is lost
        self.book.interrupted = True  # trials that ran are not over
        self.interrupt.stop()  # Tune's thread too
        return placer_lost(self.again)

    def _tell(self) -> None:
        while self.book.news:
            self.view.note(self.book.news.pop(0))

    def _finish(self) -> SweepRecord:
        book = self.book
        best = book.summary()
        if best is None:
            error = nothing_found(book, self.reason)
            book.write(status="diverged" if isinstance(error, DivergedError) else "failed")
            leave_report(book, self.view)
            raise error
        book.write(status="done", best=best, base=book.base())
        leave_report(book, self.view)
        return book.record

    def _broke(self, error: BaseException) -> None:
        """sweep.json must say what happened; never hides the error itself.

        Raises:
            InUseError, RayftError: the lease is lost, whatever else came of it; nothing is written.
        """
        self.book.interrupted = True
        if self.book.fenced:
            self.book.fence()
        if self.book.record.starts == 0:
            return
        status = "interrupted" if isinstance(error, InterruptedRun) else "failed"
        try:
            text = "" if type(error) is InterruptedRun else str(error)
            self.book.write(status=status, error=text, best=self.book.summary())
            leave_report(self.book, self.view)
        except StorageError as lost:
            self.view.note(f"warning: sweep.json still says running: {lost.what}")
