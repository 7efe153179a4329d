"""Successive halving that pauses and promotes: by hand, and cut anywhere."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler

from rayft.config.load import load
from rayft.records.ledger import LedgerContents, fold
from rayft.search.searcher import SpaceSearcher
from rayft.sweeps.promotion import PromotingScheduler
from rayft.sweeps.schedule import scheduler
from rayft.sweeps.scheduler_replay import ReplayedScheduler
from rayft.sweeps.trial import SCORE, scheduler_score

EVERY, STEPS = 10, 90
PAUSE = TrialScheduler.STOP


def swept(trials: int = 9, factor: float = 3, mode: str = "min") -> Any:
    return load(
        {
            "name": "s", "model": "builtin:tiny", "data": {"train": "a", "eval": "b"},
            "train": {"steps": STEPS, "eval_every": EVERY},
            "sweep": {
                "trials": trials, "space": {"optim.lr": {"loguniform": [1e-5, 1e-2]}},
                "search": "random", "mode": mode, "metric": "eval_loss",
                "scheduler": {"kind": "asha", "factor": factor, "promote": True},
            },
        }
    )  # fmt: skip


class Sweep:
    """Searcher and scheduler as Tune's controller drives them, and the ledger as rayft keeps it.

    A story is a list of numbers: which of the trials under way reports next.
    """

    def __init__(self, run: Any, rows: list[dict], at_once: int, loss: Any) -> None:
        self.run, self.rows, self.at_once, self.loss = run, list(rows), at_once, loss
        self.how = ReplayedScheduler(scheduler(run), run, fold(rows))
        self.search = SpaceSearcher(run, fold(rows), self.how)
        self.under_way: dict[str, tuple[str, Trial]] = {}
        self.asked = 0
        self.said: list[tuple[str, int, str]] = []
        self.finished = False
        self.steps = {
            t.id: t.reports[-1].step if t.reports else 0 for t in fold(rows).trials.values()
        }
        self.over = {t.id for t in fold(rows).trials.values() if t.over}

    def write(self, name: str, status: str, step: int, **more: Any) -> None:
        line = {
            "trial": name,
            "time": 1.0,
            "status": status,
            "step": step,
            "params": self.params[name],
        }
        self.rows.append(line | more)

    @property
    def params(self) -> dict:
        return self.search._params

    def fill(self) -> None:
        while len(self.under_way) < self.at_once and not self.finished:
            self.asked += 1
            params = self.search.suggest(f"tune-{self.asked}")
            if params is None:
                return
            if params == self.search.FINISHED:
                self.finished = True
                return
            name = self.search.name_of(f"tune-{self.asked}")
            trial = Trial(
                "x",
                stub=True,
                trial_id=f"tune-{self.asked}",
                trial_name_creator=lambda _, name=name: name,
            )
            self.how.on_trial_add(None, trial)
            self.under_way[name] = (f"tune-{self.asked}", trial)
            self.write(name, "running", self.steps.setdefault(name, 0))

    def report(self, name: str) -> None:
        """The next evaluation of a trial under way."""
        tune_id, trial = self.under_way[name]
        self.steps[name] += EVERY
        step, loss = self.steps[name], self.loss(name, self.steps[name])
        status = "diverged" if loss > 8.5 else "done" if step >= STEPS else "running"
        score = scheduler_score(status, {"eval_loss": loss}, "eval_loss", self.run.sweep.mode)
        result = {"step": step, SCORE: score, "status": status, "eval_loss": loss}
        if status == "running":
            verdict = self.how.on_trial_result(None, trial, dict(result))
            self.write(name, "running", step, eval_loss=loss)
            self.said.append((name, step, verdict))
            if verdict == TrialScheduler.CONTINUE:
                self.search.on_trial_result(tune_id, result)
                return
        self.how.on_trial_complete(None, trial, dict(result))
        self.search.on_trial_complete(tune_id, result)
        if status != "running":
            self.write(name, status, step, eval_loss=loss)
            self.over.add(name)
        del self.under_way[name]

    def told(self, story: list[int]) -> Sweep:
        for number in story:
            self.fill()
            if not self.under_way:
                break
            names = sorted(self.under_way)
            self.report(names[number % len(names)])
        self.fill()
        return self


def by_number(name: str, step: int) -> float:
    """The higher the number, the better; all learn alike."""
    return 5.0 - int(name[1:]) / 10 - step / 1000


def test_who_waits_and_who_goes_on_by_hand():
    """Factor 3, rungs at 10 and 30: floor(n / 3) of n go on; at the end ceil(n / 3) of them."""
    how = PromotingScheduler(90, 10, 3, "min")
    assert how.milestones == [10, 30]
    trials = {name: Trial("x", stub=True, trial_id=name) for name in "abcdef"}

    def said(name: str, step: int, score: float) -> str:
        return how.on_trial_result(None, trials[name], {"step": step, SCORE: score})

    assert [said("a", 10, 3.0), said("b", 10, 2.0)] == [PAUSE, PAUSE]
    assert how.promotable(final=False) is None and how.promotable(final=True) == "b"
    assert said("c", 10, 4.0) == PAUSE  # three are there: the best of them goes on
    assert how.promotable(final=False) == "b"
    how.promote("b")
    assert how.promotable(final=False) is None
    assert said("d", 10, 1.0) == TrialScheduler.CONTINUE  # it is the best of four at once
    assert said("d", 20, 0.9) == TrialScheduler.CONTINUE
    assert said("d", 30, 0.8) == PAUSE  # alone at the second rung
    assert said("b", 30, 1.8) == PAUSE
    how.on_trial_complete(None, trials["e"], {"step": 7, SCORE: 1e9, "status": "diverged"})
    how.on_trial_remove(None, trials["f"])  # failed: it says nothing
    assert how.promotable(final=False) is None  # five: one goes on, and b has
    how.on_trial_complete(None, trials["e"], {"step": 9, SCORE: 1e9, "status": "diverged"})
    assert how.promotable(final=True) == "d"
    how.promote("d")
    assert how.promotable(final=True) is None  # of five two went on, of two at the second rung one


@pytest.mark.parametrize("how_lost", ["diverged", "failed"])
def test_who_is_lost_above_a_rung_leaves_its_place_to_those_that_wait(how_lost):
    """Three trials, one may go on; it goes on and is lost, so the next one does."""
    how = PromotingScheduler(90, 10, 3, "min")
    trials = {name: Trial("x", stub=True, trial_id=name) for name in "abc"}
    for score, name in enumerate("abc"):
        how.on_trial_result(None, trials[name], {"step": 10, SCORE: float(score)})
    for name in "abc":
        assert how.promotable(final=True) == name
        how.promote(name)
        assert how.promotable(final=True) is None
        if how_lost == "failed":
            how.on_trial_remove(None, trials[name])
        else:
            told = {"step": 17, SCORE: 1e9, "status": "diverged"}
            how.on_trial_complete(None, trials[name], told)


def test_a_sweep_that_was_closed_wakes_nobody_up():
    """Its trials that waited are over: `stopped` in the ledger."""
    run = swept(4)
    whole = Sweep(run, [], 1, by_number).told([0, 0])
    assert whole.how.paused
    rows = list(whole.rows)
    for name in whole.how.paused:
        whole.write(name, "stopped", whole.steps[name])
    again = ReplayedScheduler(scheduler(run), run, fold(whole.rows))
    assert again.paused == [] and again.promote(final=True) is None
    waiting = ReplayedScheduler(scheduler(run), run, fold(rows))
    assert waiting.paused and waiting.promote(final=True) is not None


def test_the_last_one_always_reaches_the_end():
    for trials in range(1, 12):
        whole = Sweep(swept(trials), [], 2, by_number).told([0] * 400)
        assert whole.finished and not whole.under_way
        assert f"t{trials:04d}" in whole.over
        assert set(whole.over) | set(whole.how.paused) == {f"t{n + 1:04d}" for n in range(trials)}


def test_fewer_steps_than_where_trials_are_only_stopped():
    """What pausing is for: the first trials of a rung do not simply run on. Ten orders of 16 trials
    that keep their order; both ways train the best one to its end."""
    pausing = swept(16)
    stopping = load(pausing.resolved(), ["sweep.scheduler.promote=false"])
    spent = {True: 0, False: 0}
    for seed in range(10):
        order = random.Random(seed).sample(range(16), 16)

        def loss(name: str, step: int, order: list[int] = order) -> float:
            return 3.0 + order[int(name[1:]) - 1] / 10 - step / 1000

        for run in (pausing, stopping):
            whole = Sweep(run, [], 2, loss).told([0, 1] * 200)
            best = f"t{order.index(0) + 1:04d}"
            assert whole.finished and whole.steps[best] == STEPS
            spent[run.sweep.scheduler.promote] += sum(whole.steps.values())
    assert spent[True] < 0.85 * spent[False], spent


@pytest.mark.parametrize("factor", [2, 3])
@settings(max_examples=60, deadline=None)
@given(
    story=st.lists(st.integers(0, 5), min_size=8, max_size=60), share=st.floats(0, 1),
    losses=st.lists(st.integers(10, 90), min_size=12, max_size=12),
    mode=st.sampled_from(["min", "max"]),
)  # fmt: skip
def test_a_cut_sweep_decides_and_promotes_as_an_unbroken_one(factor, story, share, losses, mode):
    """One trial at a time: what is under way at the cut comes first in both."""

    def loss(name: str, step: int) -> float:
        return losses[int(name[1:]) % 12] / 10 - step / 1000

    run, cut = swept(8, factor, mode), int(share * len(story))
    whole = Sweep(run, [], 1, loss).told(story)
    first = Sweep(run, [], 1, loss).told(story[:cut])
    second = Sweep(run, first.rows, 1, loss).told(story[cut:])
    assert second.said == whole.said[len(first.said) :]
    assert (second.over, second.steps) == (whole.over, whole.steps)
    assert sorted(second.how.paused) == sorted(whole.how.paused)


@settings(max_examples=60, deadline=None)
@given(
    story=st.lists(st.integers(0, 5), min_size=8, max_size=60), share=st.floats(0, 1),
    losses=st.lists(st.integers(10, 84), min_size=12, max_size=12),
)  # fmt: skip
def test_rungs_and_who_waits_survive_a_cut_with_many_under_way(story, share, losses):
    """What is paused, and what would go on next, is what the ledger says."""
    run = swept(8)
    first = Sweep(run, [], 3, lambda name, step: losses[int(name[1:]) % 12] / 10)
    first.told(story[: int(share * len(story))])
    again = ReplayedScheduler(scheduler(run), run, fold(first.rows))
    assert sorted(again.paused) == sorted(first.how.paused) and again.stopped == []
    for final in (False, True):
        assert again.promote(final=final) == first.how.promote(final=final)


def test_a_pause_that_the_ledger_does_not_follow_up_stays_a_pause():
    """A driver that dies right after the verdict: the trial's last line is its report."""
    run = swept()
    rows = [
        {"trial": f"t{n:04d}", "time": 1.0, "status": "running", "step": 10,
         "params": {"optim.lr": 1e-3 * n}, "eval_loss": 3.0 + n}
        for n in (1, 2)
    ]  # fmt: skip
    how = ReplayedScheduler(scheduler(run), run, fold(rows))
    assert sorted(how.paused) == ["t0001", "t0002"]
    search = SpaceSearcher(run, fold(rows), how)
    assert search.suggest("a") is not None and search.name_of("a") == "t0003"
    on = [*rows, {"trial": "t0001", "time": 2.0, "status": "running", "step": 10, "params": {}}]
    assert ReplayedScheduler(scheduler(run), run, fold(on)).paused == ["t0002"]
    assert ReplayedScheduler(scheduler(run), run, LedgerContents()).paused == []
