"""Schedulers: what a sweep that goes on has learned from the trials before."""

import pytest
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler

from rayft.config.load import load
from rayft.records.ledger import LedgerContents, fold
from rayft.sweeps.schedule import scheduler
from rayft.sweeps.scheduler_replay import ReplayedScheduler
from rayft.sweeps.trial import SCORE


class Controller:
    def get_live_trials(self):
        return []


def swept(kind: str, mode: str = "min", search: str = "optuna"):
    return load(
        {
            "name": "s", "model": "builtin:tiny", "data": {"train": "a", "eval": "b"},
            "train": {"steps": 90, "eval_every": 10},
            "sweep": {
                "trials": 8, "space": {"optim.lr": {"loguniform": [1e-5, 1e-2]}},
                "mode": mode, "metric": "eval_loss", "scheduler": kind, "search": search,
            },
        }
    )  # fmt: skip


def lines(trial: str, *losses: float, status: str = "stopped", **facts):
    """A trial that told `losses` every ten steps, and ended."""
    base = {"trial": trial, "time": 1.0, "params": {}, **facts}
    told = [
        base | {"status": "running", "step": 10 * (n + 1), "eval_loss": loss}
        for n, loss in enumerate(losses)
    ]
    return [*told, base | {"status": status, "step": 10 * len(losses)}]


def verdict(run, book: LedgerContents, *losses: float) -> str:
    """On a new trial, at its last report."""
    how = ReplayedScheduler(scheduler(run), run, book)
    trial = Trial("x", stub=True, trial_name_creator=lambda _: "fresh")
    how.on_trial_add(Controller(), trial)
    said = [
        how.on_trial_result(Controller(), trial, {"step": 10 * (n + 1), SCORE: loss})
        for n, loss in enumerate(losses)
    ]
    assert said[:-1] == [TrialScheduler.CONTINUE] * (len(said) - 1)
    return said[-1]


PAST = fold(
    [line for n in range(4) for line in lines(f"t{n}", *(3.0 + n / 10 - k / 10 for k in range(4)))]
)


@pytest.mark.parametrize("kind", ["asha", "median"])
def test_a_bad_trial_is_stopped_as_if_the_sweep_had_never_been_cut_off(kind):
    run = swept(kind)
    assert verdict(run, LedgerContents(), 9.0) == TrialScheduler.CONTINUE
    assert verdict(run, PAST, 9.0) == TrialScheduler.STOP
    assert verdict(run, PAST, 2.0, 1.9, 1.8) == TrialScheduler.CONTINUE


def test_larger_can_be_better():
    assert verdict(swept("asha", "max"), PAST, 9.0) == TrialScheduler.CONTINUE
    assert verdict(swept("asha", "max"), PAST, 2.0) == TrialScheduler.STOP


def test_a_diverged_trial_is_the_worst_and_a_repetition_does_not_count():
    end = lines("t0", 0.1, status="diverged")[-1]
    low = fold([end | {"eval_loss": 0.1}])  # its last number is none
    assert verdict(swept("asha"), low, 9.0) == TrialScheduler.CONTINUE
    again = fold(lines("t0-s1", 0.1, origin="t0"))
    assert verdict(swept("asha"), again, 9.0) == TrialScheduler.CONTINUE


def test_a_trial_that_broke_says_nothing_of_its_settings():
    end = lines("t0", 0.1, status="failed")[-1] | {"eval_loss": 0.1}
    worst = fold([end, *lines("t1", 3.0)])
    assert verdict(swept("asha"), worst, 2.9) == TrialScheduler.CONTINUE
    assert verdict(swept("asha"), worst, 3.1) == TrialScheduler.STOP
