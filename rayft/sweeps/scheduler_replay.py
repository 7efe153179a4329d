"""A sweep that goes on decides as one that was never cut off: what the ledger says was reported, in
its order, is reported to Ray Tune's scheduler again before anything new is.

Decisions already taken stand: a report that was judged before the sweep was cut off is not judged
again when its trial says it once more, and a trial whose last report was judged "stop" is stopped.
The draws of population-based training are a function of the sweep's seed, the trial and the step.
Tune looks past the interface of schedulers in one place (`_trial_state`, `_take_over`), and so do
we: the trials of the past are its own class, without a process.
"""

from __future__ import annotations

import random
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
from ray.tune import Checkpoint
from ray.tune.experiment import Trial
from ray.tune.schedulers import (
    FIFOScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)

from rayft.config.run import Run
from rayft.core.process import temporary
from rayft.records.ledger import LedgerContents, metrics_in
from rayft.records.run_record import ENDED
from rayft.storage.folder import Storage
from rayft.sweeps.promotion import PromotingScheduler
from rayft.sweeps.trial import SCORE, TuneResult, scheduler_score, write_pointer

Controller: TypeAlias = Any
"""Tune's, or `_PastController`, which answers what schedulers ask of one."""


class ReplayedScheduler(TrialScheduler):
    """`how`, under rayft's ids of trials, with the past of the ledger.

    Args:
        how: fresh.
        run: with a sweep block.
        ledger: what the ledger says; repetitions with other seeds are no part of the search.

    Attributes:
        stopped: unfinished trials that `how` has stopped at their last report; the driver was cut
            off before it could write so.
    """

    def __init__(self, how: TrialScheduler, run: Run, ledger: LedgerContents) -> None:
        super().__init__()
        self._how, self._run = how, run
        self._metric = how.metric
        self._trials: dict[str, Trial] = {}  # by rayft's id, as `how` knows them
        self._names: dict[str, str] = {}  # Tune's id -> rayft's
        self._judged: dict[str, int] = {}  # trial -> last step that was judged
        self._told: dict[str, TuneResult] = {}  # last report of each trial of the past
        self._stops: set[str] = set()  # at their last report
        self._copies: set[str] = set()  # told to go on from another trial, and not heard since
        self._past: Controller = _PastController(
            Storage.open(run.storage).child(run.name, "trials")
        )
        over: set[str] = set()
        for row in ledger.lines:
            if not (row.get("origin") or row["trial"] in over):
                self._replay(row)
                if row["status"] in ENDED:
                    over.add(str(row["trial"]))
        self.stopped = sorted(self._stops - over)
        for name in self.stopped:
            self._finish(name, self._told[name])

    def __reduce__(self) -> tuple[Any, ...]:
        """Tune pickles it for a restore that rayft never asks for: the ledger is the state."""
        return FIFOScheduler, ()

    def __deepcopy__(self, memo: dict[int, Any]) -> ReplayedScheduler:
        return self

    # ---- the past

    def _replay(self, row: Mapping[str, Any]) -> None:
        """One line of the ledger."""
        name, status, step = row["trial"], row["status"], int(row["step"])
        if name not in self._trials:
            self._trials[name] = Trial(
                "rayft", stub=True, trial_id=name, config=dict(row["params"])
            )
            self._trials[name].set_status(Trial.RUNNING)
            self._names[name] = name
            self._how.on_trial_add(self._past, self._trials[name])
        trial, sweep = self._trials[name], self._run.swept
        metrics = metrics_in(row)
        score = scheduler_score(status, metrics, sweep.metric, sweep.mode)
        told = {"trial_id": name, "step": step, SCORE: score, "status": status}
        if status in ENDED:
            self._finish(name, self._told.get(name, {}) if status == "stopped" else told)
            self._go_on(name)  # a pause writes no such line: who is over waits no more
        elif metrics:
            self._copies.discard(name)
            self._judge(self._past, name, told | {"donor": row.get("donor", "")})
            if trial.status == Trial.PAUSED:
                self._copies.add(name)
            trial.set_status(Trial.RUNNING)
            self._told[name] = told
        else:  # it was started: nothing that waits is, unless it was promoted
            self._go_on(name)
        trial.set_config(dict(row["params"]))  # as it was drawn then

    @property
    def paused(self) -> list[str]:
        """Trials that wait at a rung."""
        how = self._how
        waiting = how.paused if isinstance(how, PromotingScheduler) else {}
        return [self._names[trial] for trial in waiting]

    @property
    def visits(self) -> int:
        """How often a trial may be started: once, and once more per rung that it waits at."""
        how = self._how
        return 1 + len(how.milestones) if isinstance(how, PromotingScheduler) else 1

    def promote(self, *, final: bool) -> str | None:
        """The trial that goes on from its rung; None without one.

        Args:
            final: there are no more trials to start.
        """
        how = self._how
        found = how.promotable(final=final) if isinstance(how, PromotingScheduler) else None
        if found is None:
            return None
        self._go_on(self._names[found])
        return self._names[found]

    def _go_on(self, name: str) -> None:
        if isinstance(self._how, PromotingScheduler):
            self._how.promote(self._trials[name].trial_id)

    def _finish(self, name: str, told: TuneResult) -> None:
        self._end(self._past, name, told)
        self._trials[name].set_status(Trial.TERMINATED)

    # ---- both

    def _judge(self, controller: Controller, name: str, result: TuneResult) -> str:
        """What becomes of a trial after a report."""
        step = int(result["step"])
        if result.get("donor"):  # the steps of a copy are new ones
            self._judged.pop(name, None)
        if step <= self._judged.get(name, -1):
            return self.CONTINUE
        if name in self._stops and isinstance(self._how, MedianStoppingRule):
            return self.CONTINUE  # an older rayft let it go on; Tune's rule takes no more of it
        self._judged[name] = step
        self._stops.discard(name)
        self._go_on(name)  # it was heard beyond its rung, whatever the ledger has lost
        with _seeded(f"{self._run.seed}/{name}/{step}"):
            said = self._how.on_trial_result(controller, self._trials[name], dict(result))
        if said == self.STOP and not isinstance(self._how, PromotingScheduler):
            self._stops.add(name)
        return said

    def _end(self, controller: Controller, name: str, result: TuneResult) -> None:
        """A trial that broke says nothing of its settings."""
        if result.get("status") == "failed" or SCORE not in result:
            self._how.on_trial_remove(controller, self._trials[name])
        else:
            self._how.on_trial_complete(controller, self._trials[name], dict(result))

    # ---- what Tune asks: see ray.tune.schedulers.TrialScheduler

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        """Both were given when it was made."""
        return self._how.set_search_properties(metric, mode, **spec)

    def on_trial_add(self, tune_controller: Controller, trial: Trial) -> None:
        """A trial of the past goes on where it was."""
        name, before = str(trial), self._trials.get(str(trial))
        if before is None:
            self._how.on_trial_add(tune_controller, trial)
            self._trials[name] = trial
            self._names[trial.trial_id] = name
        elif before is not trial and isinstance(self._how, PopulationBasedTraining):
            self._take_over(tune_controller, before, trial)

    def _take_over(self, controller: Controller, before: Trial, trial: Trial) -> None:
        """Population-based training acts on Tune's own trial, not on the one of the past."""
        name = str(trial)
        how = cast("PopulationBasedTraining", self._how)  # its only caller has looked
        states: dict[Trial, Any] = how._trial_state  # pyright: ignore[reportPrivateUsage]  # see above
        self._how.on_trial_add(controller, trial)
        states[trial] = states.pop(before)
        self._trials[name] = trial
        if name in self._copies:
            kept, copied = trial.run_metadata.checkpoint_manager, before.latest_checkpoint_result
            if kept is not None and copied is not None:
                kept.register_checkpoint(copied)

    def on_trial_result(self, tune_controller: Controller, trial: Trial, result: TuneResult) -> str:
        """Each report is judged once."""
        return self._judge(tune_controller, str(trial), result)

    def on_trial_complete(
        self, tune_controller: Controller, trial: Trial, result: TuneResult
    ) -> None:
        """Its own end, or that of a stopped one."""
        self._end(tune_controller, str(trial), result)

    def on_trial_error(self, tune_controller: Controller, trial: Trial) -> None:
        """Its process died; Tune adds it again, or gives it up."""

    def on_trial_remove(self, tune_controller: Controller, trial: Trial) -> None:
        """It ended while it waited."""
        self._how.on_trial_remove(tune_controller, self._trials[str(trial)])

    def choose_trial_to_run(self, tune_controller: Controller) -> Trial | None:
        """Which one that waits comes first."""
        return self._how.choose_trial_to_run(tune_controller)

    def debug_string(self) -> str:
        """For Tune's log."""
        return self._how.debug_string()

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the ledger is the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Never asked for."""


class _PastController:
    """What schedulers ask of Tune's controller, for trials without a process.

    Args:
        trials: storage of their folders.
    """

    search_alg = None

    def __init__(self, trials: Storage) -> None:
        self._trials = trials
        self._folder = temporary("tune")

    def get_live_trials(self) -> list[Trial]:
        """None waits for another one to yield."""
        return []

    get_trials = get_live_trials

    def pause_trial(self, trial: Trial, should_checkpoint: bool = True) -> None:
        """It goes on from another one's state."""
        trial.set_status(Trial.PAUSED)

    def _schedule_trial_save(self, trial: Trial, result: TuneResult) -> Any:
        """Where the trial's commit of this step was; who copies it takes the newest where retention
        has deleted that one (checkpoint.reader.donated)."""
        name, step = trial.trial_id, int(result["step"])
        place = Path(self._folder.name) / f"{name}-{step}"
        place.mkdir(exist_ok=True)
        folder = self._trials.child(name, "checkpoints", f"step-{step}-0").uri
        write_pointer(str(place), name, folder, step)
        return Checkpoint.from_directory(str(place))


@contextmanager
def _seeded(text: str) -> Generator[None]:
    """Tune draws from the global generators; inside they depend on `text` alone."""
    ours, numpys = random.getstate(), np.random.get_state()
    random.seed(text)
    np.random.seed(random.getrandbits(32))
    try:
        yield
    finally:
        random.setstate(ours)
        np.random.set_state(numpys)
