"""A sweep that is cut off and goes on takes the decisions of one that was never cut off: Ray Tune's
own schedulers, driven with any interleaving of reports, cut anywhere, rebuilt from the ledger."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.tune import Checkpoint
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler

from rayft.config.load import load
from rayft.records.ledger import fold
from rayft.sweeps.schedule import scheduler
from rayft.sweeps.scheduler_replay import ReplayedScheduler
from rayft.sweeps.trial import POINTER, SCORE, scheduler_score

STEPS, EVERY = 90, 10
SPACE = {"optim.lr": {"loguniform": [1e-5, 1e-2]}, "optim.clip": {"choice": [0.5, 1.0, 2.0]}}
KINDS = [
    {"kind": "asha", "factor": 2},
    {"kind": "asha", "grace": 20, "factor": 3},
    "median",
    {"kind": "pbt", "every": 20, "quantile": 0.4},
    {"kind": "pbt", "quantile": 0.25},
]


def swept(kind: Any, mode: str = "min") -> Any:
    return load(
        {
            "name": "s", "model": "builtin:tiny", "data": {"train": "a", "eval": "b"},
            "train": {"steps": STEPS, "eval_every": EVERY},
            "sweep": {
                "trials": 8, "space": SPACE, "search": "random", "mode": mode,
                "metric": "eval_loss", "scheduler": kind,
            },
        }
    )  # fmt: skip


RUNS = {(json.dumps(kind), mode): swept(kind, mode) for kind in KINDS for mode in ("min", "max")}


@dataclass
class Controller:
    """What Tune's schedulers ask of its controller; saves of a trial that runs are there at
    once."""

    folder: str
    trials: list[Trial] = field(default_factory=list)
    search_alg = None

    def get_trials(self) -> list[Trial]:
        return self.trials

    def get_live_trials(self) -> list[Trial]:
        return [trial for trial in self.trials if not trial.is_finished()]

    def pause_trial(self, trial: Trial, should_checkpoint: bool) -> None:
        trial.set_status(Trial.PAUSED)

    def _schedule_trial_save(self, trial: Trial, result: Any) -> Checkpoint:
        return Checkpoint.from_directory(self.folder)


class Sweep:
    """Drives a scheduler as Tune's controller and rayft's book do, and keeps the ledger."""

    def __init__(self, run: Any, folder: str, rows: list[dict]) -> None:
        self.run, self.rows, self.decisions = run, list(rows), []
        self.how = ReplayedScheduler(scheduler(run), run, fold(rows))
        self.controller = Controller(folder)
        self.trials: dict[str, Trial] = {}
        self.copied: set[str] = set()
        book = fold(rows)
        for name in self.how.stopped:  # as sweeps.driver does
            known = book.trials[name]
            self.write(name, "stopped", known.step, known.params)
        book = fold(self.rows)
        self.over = {name for name, trial in book.trials.items() if trial.over}
        for trial in book.trials.values():
            if not trial.over:
                self.begin(trial.id, trial.params)
                self.copied |= {trial.id} if self.trials[trial.id].checkpoint else set()

    def write(self, trial: str, status: str, step: int, params: dict, **more: Any) -> None:
        line = {"trial": trial, "time": 1.0, "status": status, "step": step, "params": dict(params)}
        self.rows.append(line | more)

    def begin(self, name: str, params: dict) -> None:
        made = Trial("x", stub=True, config=dict(params), trial_name_creator=lambda _: name)
        self.trials[name] = made
        self.controller.trials.append(made)
        self.how.on_trial_add(self.controller, made)
        made.set_status(Trial.RUNNING)
        self.write(name, "running", 0, made.config)

    def report(self, name: str, step: int, loss: float) -> None:
        """What tune_controller.py does with a result, in its order."""
        trial = self.trials[name]
        result = {"trial_id": trial.trial_id, "step": step, SCORE: loss, "status": "running"}
        metrics = {"eval_loss": loss}
        facts = {"donor": "whoever"} if name in self.copied else {}
        self.copied.discard(name)
        status = "diverged" if loss > 8.5 else "done" if step >= STEPS else ""
        if status:
            score = scheduler_score(status, metrics, "eval_loss", self.run.sweep.mode)
            told = result | {"status": status, SCORE: score}
            self.how.on_trial_complete(self.controller, trial, told)
            self.write(name, status, step, trial.config, **metrics, **facts)
            self.end(name)
            return
        said = self.how.on_trial_result(self.controller, trial, result | facts)
        config = {key: trial.config[key] for key in sorted(trial.config)}
        self.decisions.append((name, step, said, config))
        self.write(name, "running", step, trial.config, **metrics, **facts)
        if trial.status == Trial.PAUSED:  # it goes on as a copy
            self.copied.add(name)
            trial.set_status(Trial.RUNNING)
        if said == TrialScheduler.STOP:
            self.how.on_trial_complete(self.controller, trial, result)
            self.write(name, "stopped", step, trial.config)
            self.end(name)

    def end(self, name: str) -> None:
        self.trials[name].set_status(Trial.TERMINATED)
        self.over.add(name)


@st.composite
def stories(draw: Any) -> list[tuple[str, int, float]]:
    """(trial, step, loss) in the order in which a sweep hears them: trials begin one after another
    and go on at any pace. Losses have ties."""
    count = draw(st.integers(3, 6))
    steps = dict.fromkeys([f"t{n:04d}" for n in range(1, count + 1)], 0)
    told = []
    for _ in range(draw(st.integers(12, 45))):
        name = draw(st.sampled_from(sorted(steps)))
        steps[name] += EVERY
        if steps[name] <= STEPS:
            told.append((name, steps[name], draw(st.integers(10, 90)) / 10))
    return told


def params_of(name: str) -> dict:
    number = int(name[1:])
    return {"optim.lr": 10 ** (-5 + number / 3), "optim.clip": [0.5, 1.0, 2.0][number % 3]}


def told_to(sweep: Sweep, story: list[tuple[str, int, float]]) -> Sweep:
    for name, step, loss in story:
        if name not in sweep.trials and name not in sweep.over:
            sweep.begin(name, params_of(name))
        if name not in sweep.over:
            sweep.report(name, step, loss)
    return sweep


@pytest.mark.parametrize("kind", KINDS, ids=str)
@settings(max_examples=50, deadline=None)
@given(
    story=stories(), share=st.floats(0, 1), lost=st.booleans(), mode=st.sampled_from(["min", "max"])
)
def test_decisions_after_a_cut_are_those_of_an_unbroken_sweep(
    tmp_path_factory, kind, story, share, lost, mode
):
    """`lost`: the driver died between its scheduler's verdict and the line that says so. What was
    reported before is reported again, as hosts do."""
    folder, run = str(tmp_path_factory.getbasetemp()), RUNS[json.dumps(kind), mode]
    cut = int(share * len(story))
    whole = told_to(Sweep(run, folder, []), story)
    first = told_to(Sweep(run, folder, []), story[:cut])
    rows = first.rows
    if lost and rows and rows[-1]["status"] == "stopped":
        rows = rows[:-1]
    second = Sweep(run, folder, rows)
    for name, step, loss in story[:cut]:
        again = len(second.decisions)
        if name not in second.over | second.copied:
            second.report(name, step, loss)
            assert all(d[2] == TrialScheduler.CONTINUE for d in second.decisions[again:])
    second.decisions.clear()
    told_to(second, story[cut:])
    assert second.decisions == whole.decisions[len(first.decisions) :]
    assert second.over == whole.over


def test_a_copy_that_was_decided_on_is_made_after_the_cut(tmp_path):
    """Its driver died before the trial had left its own state: it goes on from its donor's."""
    run = RUNS[json.dumps(KINDS[-1]), "min"]
    story = [("t0001", 10, 1.0), ("t0002", 10, 5.0), ("t0003", 10, 3.0), ("t0004", 10, 4.0)]
    story += [("t0001", 20, 1.0), ("t0002", 20, 5.0)]
    first = told_to(Sweep(run, str(tmp_path), []), story)
    name, step, said, config = first.decisions[-1]
    assert (name, said) == ("t0002", TrialScheduler.NOOP) and config != params_of("t0002")
    second = Sweep(run, str(tmp_path), first.rows)
    copy = second.trials["t0002"]
    pointer = json.loads((Path(copy.checkpoint.path) / POINTER).read_text())
    assert pointer["trial"] == "t0001" and pointer["heard"] == 20
    assert pointer["folder"].endswith("s/trials/t0001/checkpoints/step-20-0")
    assert copy.config == config
    assert all(trial.checkpoint is None for trial in second.trials.values() if trial is not copy)
    heard = [*first.rows, first.rows[-1] | {"step": 30, "donor": "t0001", "eval_loss": 2.0}]
    assert Sweep(run, str(tmp_path), heard).trials["t0002"].checkpoint is None


@pytest.mark.parametrize("kind", ["asha", "median"])
def test_a_report_that_is_told_again_meets_no_fuller_rung(tmp_path, kind):
    """A trial among the best when it was judged is not stopped by what others reported since."""
    story = [("t0001", 10, 3.0)] + [(f"t{n:04d}", 10, 2.0 - n / 10) for n in range(2, 7)]
    first = told_to(Sweep(swept(kind), str(tmp_path), []), story)
    assert [said for _, _, said, _ in first.decisions] == [TrialScheduler.CONTINUE] * 6
    again = Sweep(first.run, str(tmp_path), first.rows)
    again.report("t0001", 10, 3.0)
    assert again.decisions[-1][2] == TrialScheduler.CONTINUE
