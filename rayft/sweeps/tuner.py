"""Ray Tune, set up for one phase of a sweep: searcher, thin trials, and what is told of them."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any, Protocol

import ray
from ray import tune
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import ConcurrencyLimiter, SearchAlgorithm, Searcher, SearchGenerator

from rayft.config.run import Run
from rayft.core.errors import first_line
from rayft.core.process import temporary
from rayft.hosts.trial_host import ActorHandle
from rayft.records.ledger import TrialParams
from rayft.sweeps.trial import TuneResult, trial_class

_SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the ledger is the log
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # rayft's own handler asks for a stop
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000",  # the ledger is the state
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "TUNE_FORCE_TRIAL_CLEANUP_S": "5",
    "RAY_AIR_NEW_OUTPUT": "0",
}


WAITING = 2  # trials beyond the slots: they wait, so that a freed slot is taken at the next step


class TrialListener(Protocol):
    """Who wants to know what becomes of trials; called from Tune's thread."""

    def started(self, trial: str, params: TrialParams) -> None:
        """It runs, or runs again."""
        ...

    def reported(self, trial: str, params: TrialParams, result: TuneResult) -> None:
        """One report."""
        ...

    def ended(self, trial: str, params: TrialParams, result: TuneResult) -> None:
        """Its own end, or its scheduler's verdict."""
        ...

    def broke(self, trial: str, params: TrialParams, why: str) -> None:
        """An error that no host reported."""
        ...

    def must_end(self) -> bool:
        """The phase must end now."""
        ...


class _DriverOnly:
    """Something that lives on the driver. Tune pickles its settings for a restore that rayft never
    asks for (the ledger is the state), so what is pickled is an empty one."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (None,)

    def __deepcopy__(self, memo: dict[int, Any]) -> _DriverOnly:
        return self


class _TrialNames(_DriverOnly):
    """Tune's trial to rayft's trial id."""

    def __init__(self, name_of: Callable[[str], str]) -> None:
        self._name_of = name_of

    def __call__(self, trial: Any) -> str:
        return self._name_of(trial.trial_id)


class _PhaseStopper(_DriverOnly, tune.Stopper):
    """Ends the phase when the listener says so."""

    def __init__(self, must_end: Callable[[], bool]) -> None:
        self._must_end = must_end

    def __call__(self, trial_id: str, result: TuneResult) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._must_end()


class _ListenerCallback(_DriverOnly, tune.Callback):
    """Passes Tune's events to the listener under rayft's names."""

    def __init__(self, listener: TrialListener) -> None:
        self._listener = listener

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._listener.started(str(trial), dict(trial.config))

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: TuneResult, **info: Any
    ) -> None:
        self._listener.reported(str(trial), dict(trial.config), result)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._listener.ended(str(trial), dict(trial.config), trial.last_result or {})

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        error = trial.get_pickled_error() or trial.get_error()
        why = f"{type(error).__name__}: {first_line(str(error))}"
        self._listener.broke(str(trial), dict(trial.config), why)


class _SearcherAdapter(_DriverOnly, SearchAlgorithm):
    """The searcher, as Tune's schedulers all take it. Population-based training refuses Tune's own
    wrapper, because a searcher that learns would be misled by settings that change later; those
    that rayft lets stand there (random, grid: config/sweep_rules.py) do not learn."""

    def __init__(self, searcher: SearchGenerator) -> None:
        self._searcher = searcher

    @property
    def total_samples(self) -> Any:
        return self._searcher.total_samples

    def add_configurations(self, experiments: Any) -> None:
        self._searcher.add_configurations(experiments)

    def next_trial(self) -> Any:
        return self._searcher.next_trial()

    def on_trial_result(self, trial_id: str, result: TuneResult) -> None:
        self._searcher.on_trial_result(trial_id, result)

    def on_trial_complete(
        self, trial_id: str, result: TuneResult | None = None, error: bool = False
    ) -> None:
        self._searcher.on_trial_complete(trial_id, result, error)

    def is_finished(self) -> bool:
        return self._finished or self._searcher.is_finished()


class TunerThread(threading.Thread):
    """Tuner.fit() beside the main thread, which shows progress and takes signals.

    Args:
        name_of: rayft's trial id for one of Tune's.
        count: trials of this phase at most; the searcher may end it earlier.
        most: trials at once, those that wait for a slot included.
    """

    def __init__(
        self,
        run: Run,
        placer: ActorHandle,
        searcher: Searcher,
        scheduler: TrialScheduler,
        listener: TrialListener,
        *,
        name_of: Callable[[str], str],
        count: int,
        most: int,
    ) -> None:
        super().__init__(name="rayft-tune", daemon=True)
        self.error: Exception | None = None
        for name, value in _SETTINGS.items():
            os.environ.setdefault(name, value)
        os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(most)
        self._folder = temporary("tune")
        # On the driver's node: Tune keeps its pointer files there, and nothing else of a trial.
        here = f"node:{ray.util.get_node_ip_address()}"
        place = tune.PlacementGroupFactory([{"CPU": 0, here: 0.001}])
        sweep = run.swept
        limited = ConcurrencyLimiter(searcher, max_concurrent=most)
        self._tuner = tune.Tuner(
            trial_class(run.name, placer, sweep.metric, sweep.mode, place),
            tune_config=tune.TuneConfig(
                search_alg=_SearcherAdapter(SearchGenerator(limited)),
                scheduler=scheduler,
                num_samples=count,
                reuse_actors=True,
                trial_name_creator=_TrialNames(name_of),
                trial_dirname_creator=_TrialNames(name_of),
            ),
            run_config=tune.RunConfig(
                name=run.name,
                storage_path=self._folder.name,
                stop=_PhaseStopper(listener.must_end),
                callbacks=[_ListenerCallback(listener)],
                failure_config=tune.FailureConfig(max_failures=3),
                # a pointer is made when population-based training asks for one, never else
                checkpoint_config=tune.CheckpointConfig(
                    checkpoint_frequency=0, checkpoint_at_end=False
                ),
                verbose=0,
            ),
        )

    def run(self) -> None:
        """Keeps the error for the main thread."""
        try:
            self._tuner.fit()
        except Exception as error:  # a thread has nobody to raise to; the main thread does it
            self.error = error
        finally:
            self._folder.cleanup()
