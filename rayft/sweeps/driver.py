"""`rayft sweep` and `rayft.sweep`: search, repeat the winner with other seeds, leave the best and
the report. The same command continues a sweep that was cut off."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection

import ray
from ray.exceptions import RayActorError, RayError
from ray.tune.schedulers import FIFOScheduler

from rayft.cluster.interrupt import Interrupt, handling
from rayft.config.rules import refuse
from rayft.config.run import Run
from rayft.core.errors import DivergedError, InterruptedRun, RayftError, StorageError
from rayft.hosts.overview import HostsOverview
from rayft.hosts.trial_host import ActorHandle
from rayft.records.run_record import SweepRecord, SweepWinner
from rayft.search.searcher import FixedSearcher, SpaceSearcher
from rayft.storage.folder import Storage
from rayft.storage.lease import Lease
from rayft.sweeps.best import refit, write_config
from rayft.sweeps.callback import SweepCallback, snapshot_of
from rayft.sweeps.cluster import close_placer, leave_best, open_cluster
from rayft.sweeps.ending import goes_on, leave_report, no_result_error, placer_lost_error
from rayft.sweeps.prior import learned
from rayft.sweeps.schedule import scheduler
from rayft.sweeps.scheduler_replay import ReplayedScheduler
from rayft.sweeps.state import SweepState
from rayft.sweeps.tuner import WAITING, TunerThread
from rayft.sweeps.view import SweepView, sweep_view
from rayft.training.storage_check import check_storage

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
    run.swept  # noqa: B018  # refused first where there is none
    refuse(run)
    view = sweep_view()
    home = Storage.open(run.storage).child(run.name)
    try:
        check_storage(run, home, view.note)
        with handling() as interrupt, Lease.held(home, interrupt.stop) as lease:
            state = SweepState(home, run, lease)
            try:
                return _SweepDriver(run, state, view, interrupt, again).go()
            finally:
                state.close()
    finally:
        view.close()


class _SweepDriver:
    """One start of a sweep, on the driver."""

    def __init__(
        self, run: Run, state: SweepState, view: SweepView, interrupt: Interrupt, again: str
    ) -> None:
        self.run, self.state, self.view, self.again = run, state, view, again
        self.interrupt = interrupt
        self.reason = ""  # why the search ended early
        self.begun = threading.Event()  # trials may start
        self._looked = self._noted = 0.0

    # ---- from start to end

    def go(self) -> SweepRecord:
        """All phases."""
        state, shown = self.state, self.state.home.shown()
        known = state.ledger.trials.values()
        if state.record.status == "done" and not goes_on(state):
            self.view.note(f"sweep {self.run.name} is done: {shown}/report.html")
            return state.record
        if known:
            over = sum(trial.over for trial in known)
            self.view.note(f"continuing sweep {self.run.name}: {over} trials over, {shown}")
        self.prior = learned(state)
        try:
            with open_cluster(self.run, state, self.view, self.interrupt) as self.cluster:
                self._phases(self.cluster.placer)
        except BaseException as error:  # the record must say how the sweep ended
            self._broke(error)
            raise
        return self._finish()

    def _phases(self, placer: ActorHandle) -> None:
        self._search(placer)
        self._seeds(placer)
        self._show(placer, force=True)
        best, spec = self.state.summary(), self.run.swept
        if best is None:
            return
        self.state.fence(now=True)
        write_config(self.state.home, self.run, best, spec.metric)
        if spec.refit:
            close_placer(placer)  # the packs leave the cluster to it
            self._refit(best)
        else:
            self.view.note(f"best: {leave_best(placer, self.state, best).splitlines()[0]}")

    def _search(self, placer: ActorHandle) -> None:
        if self.state.record.starts:  # what it knows may be mended then
            self.cluster.begin()
        replayed = ReplayedScheduler(scheduler(self.run), self.run, self.state.ledger)
        for name in replayed.stopped:
            self.state.stop(name)
        searcher = SpaceSearcher(self.run, self.state.ledger, replayed, self.prior)
        left = self.run.swept.count - sum(trial.over for trial in self.state.searched())
        callback = self._callback(self._over, lambda: replayed.paused)
        if left <= 0 or self._over():
            self.cluster.begin()
            if not self._asked():
                callback.finish()
            return
        phase = TunerThread(
            self.run,
            placer,
            searcher,
            replayed,
            callback,
            name_of=searcher.name_of,
            count=left * replayed.visits,
            most=min(left, self.cluster.at_once + WAITING),
        )
        self._follow(phase, placer)
        if self.reason or replayed.paused:
            callback.finish()  # who still waits is not promoted any more
        self.state.write(stopped_by=self.reason or ("grid" if searcher.exhausted else "trials"))

    def _seeds(self, placer: ActorHandle) -> None:
        """The winner again, with other seeds, to its full length."""
        best = self.state.best()
        if self.run.swept.seeds == 1 or best is None or self.interrupt.asked:
            return
        wanted = {}
        for number in range(1, self.run.swept.seeds):
            name = f"{best[0].id}-s{number}"
            known = self.state.ledger.trials.get(name)
            if known is None or not known.over:
                wanted[name] = best[0].params | {"seed": self.run.seed + number}
        if not wanted:
            return
        self.view.note(f"{best[0].id} again with {len(wanted)} other seeds")
        self.state.origins |= dict.fromkeys(wanted, best[0].id)
        searcher = FixedSearcher(wanted)
        phase = TunerThread(
            self.run,
            placer,
            searcher,
            FIFOScheduler(),
            self._callback(self._asked, tuple),
            name_of=searcher.name_of,
            count=len(wanted),
            most=len(wanted),
        )
        self._follow(phase, placer)

    def _refit(self, best: SweepWinner) -> None:
        """best/ trained again, for train.steps; the packs have left the cluster to it."""
        self.view.note(f"{best.trial} again, for {self.run.train.steps} steps")
        record = refit(
            self.run, self.state.home, best, self.again, self.interrupt, self.state.fence
        )
        metric = record.eval.get(self.run.swept.metric)
        self.state.write(refit={"metric": metric, "step": record.steps, "seconds": record.seconds})

    # ---- while a phase runs

    def _follow(self, phase: TunerThread, placer: ActorHandle) -> None:
        """Show, and pass signals on, until Tune is done. A sweep begins while the processes of its
        first trials start.

        Raises:
            InterruptedRun: after a signal, once every trial is committed.
            InUseError, RayftError: the lease is lost; at once.
        """
        phase.start()
        try:
            self.cluster.begin()
        finally:
            self.begun.set()
        while phase.is_alive():
            phase.join(PERIOD)
            self.state.fence()
            self._show(placer)
            if self.interrupt.asked and not self.state.interrupted:
                self.state.interrupted = True  # trials that run now are not over
                self.view.note("stopping after this step; once more to stop at once")
            if self.interrupt.forced:
                break
        self._print_news()
        if self.interrupt.asked:
            raise self.interrupt.ended("stopped; what was committed is kept", fix=self.again)
        if isinstance(phase.error, RayftError):
            raise phase.error
        if phase.error is not None:
            raise RayftError(f"Ray Tune failed: {phase.error}") from phase.error

    def _callback(
        self, must_end: Callable[[], bool], paused: Callable[[], Collection[str]]
    ) -> SweepCallback:
        cluster = self.cluster
        return SweepCallback(
            self.state, cluster.leaving, must_end, paused, cluster.at_once, self.begun
        )

    def _asked(self) -> bool:
        return self.interrupt.asked

    def _over(self) -> bool:
        """Whether the search must end now; keeps the reason."""
        if self._asked():
            return True
        limit = self.run.swept.max_seconds
        if limit is not None and self.state.seconds > limit:
            self.reason = "max_seconds"
        elif self.state.reached_target():
            self.reason = "target"
        return bool(self.reason)

    def _show(self, placer: ActorHandle, force: bool = False) -> None:
        """Ask the placer now and then, and show."""
        now = time.monotonic()
        self._print_news()
        if now - self._looked < LOOK and not force:
            return
        self._looked = now
        try:
            seen: HostsOverview = ray.get(placer.overview.remote(), timeout=10)
        except RayActorError as error:
            raise self._placer_lost() from error
        except (RayError, TimeoutError):
            return
        self.state.news += seen.news
        self.view.show(snapshot_of(self.state, seen))
        if now - self._noted > LEDGER_PERIOD or force:
            self._noted = now
            for name, numbers in seen.packs.items():
                self.state.pack(name, numbers)

    def _placer_lost(self) -> RayftError:
        """Every host went with the placer: no trial can go on under this driver."""
        self.state.fence(now=True)  # it may have left because the lease is lost
        self.state.interrupted = True  # trials that ran are not over
        self.interrupt.stop()  # Tune's thread too
        return placer_lost_error(self.again)

    def _print_news(self) -> None:
        while self.state.news:
            self.view.note(self.state.news.pop(0))

    def _finish(self) -> SweepRecord:
        state = self.state
        best = state.summary()
        if best is None:
            error = no_result_error(state, self.reason)
            state.write(status="diverged" if isinstance(error, DivergedError) else "failed")
            leave_report(state, self.view)
            raise error
        state.write(status="done", best=best, base=state.base())
        leave_report(state, self.view)
        return state.record

    def _broke(self, error: BaseException) -> None:
        """sweep.json must say what happened; never hides the error itself.

        Raises:
            InUseError, RayftError: the lease is lost, whatever else came of it; nothing is written.
        """
        self.state.interrupted = True
        if self.state.fenced:
            self.state.fence()
        if self.state.record.starts == 0:
            return
        status = "interrupted" if isinstance(error, InterruptedRun) else "failed"
        try:
            text = "" if type(error) is InterruptedRun else str(error)
            self.state.write(status=status, error=text, best=self.state.summary())
            leave_report(self.state, self.view)
        except StorageError as lost:
            self.view.note(f"warning: sweep.json still says running: {lost.what}")
