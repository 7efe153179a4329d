"""One trial as Ray Tune sees it: a thin client, no torch, no CPU, of the placer and of a host.

The model, the data and the numbers live in a host (a pack, or a Ray Train run of its own). Tune's
actor only joins, waits for the next report, and is used again for the next trial. What a trial
costs is one idle process.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.tune import PlacementGroupFactory, Trainable

from rayft.core.errors import RayftError, first_line
from rayft.hosts.trial_host import ActorHandle
from rayft.records.ledger import TrialParams
from rayft.trials.types import TrialReport

SCORE = "score"  # the sweep's metric, always finite: schedulers cannot compare with NaN
WORST = 1e9
POINTER = "pointer.json"
_FACTS = ("time_this_iter_s", "time_total_s", "time_since_restore", "timestamp", "pid")
_NOT_METRICS = ("step", "status", "error_text", "score", "done", "donor", "training_iteration")
TuneResult = dict[str, Any]
"""What Tune, its scheduler and its searcher see of a report: `tune_result`, and Tune's own."""


def error_line(error: RayTaskError) -> str:
    """The first line of what was raised on the other side."""
    cause = error.cause
    text = cause.what if isinstance(cause, RayftError) else str(cause)
    return f"{type(cause).__name__}: {first_line(text)}"


def scheduler_score(status: str, metrics: Mapping[str, float], metric: str, mode: str) -> float:
    """What a report is worth to a scheduler."""
    value = math.nan if status in ("diverged", "failed") else metrics.get(metric, math.nan)
    worst = WORST if mode == "min" else -WORST
    return value if math.isfinite(value) else worst


def tune_result(report: TrialReport, metric: str, mode: str) -> TuneResult:
    """What Tune, its scheduler and its searcher get to see."""
    finite = {name: value for name, value in report.metrics.items() if math.isfinite(value)}
    return {
        **finite,
        "step": report.step,
        "status": report.status,
        "error_text": report.error,
        SCORE: scheduler_score(report.status, finite, metric, mode),
        "done": report.status != "running",
    }


def metrics_of(result: TuneResult) -> dict[str, float]:
    """The finite numbers of a result that are the trial's own."""
    return {
        name: value
        for name, value in result.items()
        if isinstance(value, int | float)
        and not isinstance(value, bool)
        and name not in (*_FACTS, *_NOT_METRICS)
        and not name.startswith(("iterations_", "time_", "timesteps_", "episodes_"))
        and math.isfinite(value)
    }


def write_pointer(place: str, trial: str, folder: str | None, heard: int) -> None:
    """What Tune takes for a checkpoint of `trial`: the address of its commit on storage.

    Args:
        place: a local folder of Tune's.
        folder: of the commit; None: it has none.
        heard: the last step that was told before it.
    """
    pointer = {"trial": trial, "folder": folder, "heard": heard}
    (Path(place) / POINTER).write_text(json.dumps(pointer))


class SweepTrial(Trainable):
    """Joins at its first step, so that a checkpoint to start from may be given before."""

    _placer: ActorHandle
    _metric: str
    _mode: str

    def setup(self, config: TrialParams) -> None:
        """Tune calls it once per process."""
        self._begin(config)

    def _begin(self, config: TrialParams) -> None:
        self._params = dict(config)
        self._source: dict[str, Any] | None = None
        self._host: ActorHandle = None
        self._donor, self._pack = "", ""
        self._heard = 0  # step of the last report

    def step(self) -> TuneResult:
        """Wait for the next report. A host that dies is left for another one: the trial continues
        there from its last commit."""
        while True:
            try:
                if self._host is None:
                    asked = (self.trial_name, self._params, self._source, self._heard)
                    self._host, self._pack = ray.get(self._placer.enter.remote(*asked))
                    self._source = None
                report: TrialReport = ray.get(self._host.next.remote(self.trial_name))
                if report.status not in ("moved", "lost"):
                    return self._result(report)
                self._host = None
                if report.status == "lost":
                    ray.get(self._placer.host_lost.remote(self.trial_name, report.error))
            except RayTaskError as error:  # refused; another try changes nothing
                return self._result(
                    TrialReport(self.trial_name, 0, {}, "failed", error_line(error))
                )
            except RayActorError:
                self._host = None
                ray.get(self._placer.host_lost.remote(self.trial_name, "its process died"))

    def _result(self, report: TrialReport) -> TuneResult:
        self._heard = max(self._heard, report.step)
        result = tune_result(report, self._metric, self._mode) | {"pack": self._pack}
        if self._donor:
            result["donor"], self._donor = self._donor, ""
        return result

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """A pointer to the trial's state, which is on storage when this returns."""
        folder: str | None = None
        if self._host is not None:
            folder = str(ray.get(self._host.save.remote(self.trial_name)))
        write_pointer(checkpoint_dir, self.trial_name, folder, self._heard)

    def load_checkpoint(  # pyright: ignore[reportIncompatibleMethodOverride]  # Tune gives a path
        self, checkpoint_dir: str
    ) -> None:
        """Population-based training: go on from another trial's state, with this config."""
        pointer = json.loads((Path(checkpoint_dir) / POINTER).read_text())
        if pointer["folder"]:
            self._source, self._heard = pointer, pointer["heard"]
            self._donor = pointer["trial"] if pointer["trial"] != self.trial_name else ""
            self._host = None

    def reset_config(self, new_config: TrialParams) -> bool:
        """The process serves another trial, or the same one with other settings."""
        self._begin(new_config)
        return True


def trial_class(
    sweep: str, placer: ActorHandle, metric: str, mode: str, place: PlacementGroupFactory
) -> type[SweepTrial]:
    """SweepTrial at this placer. Ray's dashboard shows its processes by the name of the class, and
    Tune's own wrappers would all have the same."""
    name = f"rayft-{sweep}-trial"

    def resources(cls: type[SweepTrial], config: TrialParams) -> PlacementGroupFactory:
        return place

    facts = {"_placer": placer, "_metric": metric, "_mode": mode, "__qualname__": name}
    facts["default_resource_request"] = classmethod(resources)
    return type(name, (SweepTrial,), facts)
