"""What is done about Tune's events, and what is shown of a sweep."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection
from concurrent.futures import wait

import ray
from ray.exceptions import RayActorError, RayError

from rayft.config.run import Run
from rayft.config.sweep import AshaSpec
from rayft.hosts.overview import HostsOverview
from rayft.hosts.trial_host import ActorHandle
from rayft.records.ledger import LedgerTrial, TrialParams
from rayft.records.run_record import Status
from rayft.sweeps.state import SweepState
from rayft.sweeps.trial import TuneResult
from rayft.sweeps.view import SweepSnapshot

LEAVE = 300.0  # seconds that a trial gets to leave: its last commit may be large, storage slow


class LeavingTrials:
    """Trials on their way out of their hosts.

    Args:
        placer: told who is to leave.
    """

    def __init__(self, placer: ActorHandle) -> None:
        self._placer, self._asked = placer, {}
        self._closed = threading.Event()

    def ask(self, trial: str, status: Status, *, keep: bool) -> None:
        """Have the trial leave; returns at once. `status`: what it is from now on, unless it has
        ended by itself; `keep`: with its state committed."""
        self.done(trial)  # it may be on its way to a pause
        self._asked[trial] = self._placer.leave.remote(trial, keep, status).future()

    def pause(self, trial: str) -> None:
        """Have the trial leave, to enter again later; returns at once."""
        self._asked[trial] = self._placer.pause.remote(trial).future()

    def done(self, trial: str) -> bool:
        """Wait, LEAVE seconds at most; whether nothing writes the trial's folder any more."""
        asked, end = self._asked.get(trial), time.monotonic() + LEAVE
        while asked is not None and not asked.done() and not self._closed.is_set():
            if time.monotonic() > end:
                return False
            wait([asked], 0.5)
        return True

    def hostless(self) -> bool:
        """Whether the placer is dead, and every host with it."""
        try:
            ray.get(self._placer.ready_host.remote(), timeout=30)
        except RayActorError:
            return True
        except (RayError, TimeoutError):  # busy: it lives
            return False
        return False

    def close(self) -> None:
        """All hosts are gone."""
        self._closed.set()


class SweepCallback:
    """TrialListener: the state, and the placer that gets places back.

    Args:
        must_end: whether the phase must end now.
        paused: trials that wait at a rung; to Tune they have ended.
        at_once: trials that have a place at the same time.
        begun: set once the sweep exists on storage; Tune waits for it when it has a first trial.
    """

    def __init__(
        self,
        state: SweepState,
        leaving: LeavingTrials,
        must_end: Callable[[], bool],
        paused: Callable[[], Collection[str]],
        at_once: int,
        begun: threading.Event,
    ) -> None:
        self._state, self._leaving, self._begun = state, leaving, begun
        self._must_end, self._paused, self._at_once = must_end, paused, at_once
        self._predicted = False

    def started(self, trial: str, params: TrialParams) -> None:
        self._begun.wait()
        self._state.mark("first trial")
        self._leaving.done(trial)  # a promoted one must not enter before it has left
        self._state.started(trial, params)

    def reported(self, trial: str, params: TrialParams, result: TuneResult) -> None:
        self._state.reported(trial, params, result)
        if not self._predicted and "params_trainable" in result:
            self._predicted = True
            size = disk(self._state.run, params, result["params_trainable"], self._at_once)
            self._state.news.append(f"checkpoints will take {size / 2**20:,.0f} MiB at most")

    def ended(self, trial: str, params: TrialParams, result: TuneResult) -> None:
        """The slot is asked back at once, so that the next trial gets it."""
        if trial in self._paused():
            self._leaving.pause(trial)
            self._state.paused(trial)
            return
        if not self._state.interrupted:
            running = result.get("status", "running") == "running"
            self._leaving.ask(trial, "stopped", keep=not running or self._state.is_best(trial))
        self._state.ended(trial, params, result)

    def broke(self, trial: str, params: TrialParams, why: str) -> None:
        """Where the placer died it is not the trial's fault: the driver stops,
        and the trial goes on with the same command."""
        if self._leaving.hostless():
            return
        self._leaving.ask(trial, "failed", keep=False)
        self._state.broke(trial, params, why)

    def must_end(self) -> bool:
        return self._must_end()

    def finish(self) -> None:
        """The phase was ended from outside: Tune says nothing of the trials that still ran. With a
        best one among the others they are over; else they go on with the same command."""
        found = self._state.best() is not None
        status: Status = "stopped" if found else "interrupted"
        running = [trial.id for trial in self._state.searched() if not trial.over]
        for trial in running:
            self._leaving.ask(trial, status, keep=self._state.is_best(trial) or not found)
        for trial in running:
            self._leaving.done(trial)
            if found:
                self._state.stop(trial)


def disk(run: Run, params: TrialParams, trainable: float, at_once: int) -> float:
    """Bytes that checkpoints of a sweep can take at one time: weights and two moments in fp32,
    train.keep and the best of every trial that trains, or waits at a rung, the winner's, and one
    more being written.

    Args:
        params, trainable: of one trial; where the space holds ranks, the largest one counts.
    """
    widest = 1.0
    for path, domain in run.swept.space.items():
        own = params.get(path)
        if path.endswith(".rank") and isinstance(own, int) and own:
            widest = max(end for end in domain.ends() if isinstance(end, int)) / own
    each = 12 * trainable * widest
    scheduler = run.swept.scheduler
    if isinstance(scheduler, AshaSpec) and scheduler.promote:  # who waits keeps a state
        at_once = max(at_once, run.swept.count)
    return each * (at_once * (run.train.keep + 2) + 2)


def snapshot_of(state: SweepState, seen: HostsOverview) -> SweepSnapshot:
    """The sweep as people see it.

    Args:
        seen: what TrialPlacer.overview returned.
    """
    spec = state.spec
    trials = list(state.ledger.trials.values())
    counts: dict[str, int] = {}
    for trial in trials:
        counts[trial.status] = counts.get(trial.status, 0) + 1
    over = sum(trial.over for trial in trials)
    total = max(spec.count, len(trials))
    packs = seen.packs.values()
    base = next((r.metrics.get("base_loss") for t in trials for r in t.reports), None)
    return SweepSnapshot(
        metric=spec.metric,
        total=total,
        counts=counts,
        waiting=seen.waiting,
        slots=int(sum(pack["slots"] for pack in packs)),
        busy=int(sum(pack["trials"] for pack in packs)),
        tokens_per_s=sum(pack["tokens"] / pack["seconds"] for pack in packs if pack["seconds"]),
        seconds=state.seconds,
        left=state.seconds / over * (total - over) if over > 2 else None,
        best=state.best(),
        base=base if spec.metric == "eval_loss" else None,
        running=_running(state, trials),
    )


def _running(
    state: SweepState, trials: list[LedgerTrial]
) -> list[tuple[LedgerTrial, float | None]]:
    """The best first; those that have not reported yet last."""
    metric, mode = state.spec.metric, state.spec.mode
    found: list[tuple[LedgerTrial, float | None]] = []
    for trial in trials:
        if not trial.over:
            report = trial.best(metric, mode)
            found.append((trial, None if report is None else report.metrics[metric]))
    sign = 1 if mode == "min" else -1
    return sorted(found, key=lambda pair: (pair[1] is None, sign * (pair[1] or 0.0)))
