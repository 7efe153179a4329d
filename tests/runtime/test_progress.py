"""What a person sees, and trackers that misbehave."""

import threading

import pytest

from rayft.compose.job import ProgressEvent
from rayft.core.errors import ConfigError
from rayft.training import trackers
from rayft.training.progress import ProgressLines, StepPace, clock, si, step_line
from rayft.training.trackers import Trackers, numbers


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def step(number, **more):
    rates = more.pop("lr", {"all": 1e-3})
    return ProgressEvent("step", number, numbers={"loss": 2.0} | more, lr=rates)


def test_plain_lines_are_few_and_never_miss_an_event():
    time, out = Clock(), []
    lines = ProgressLines(out.append, time)
    lines.show(ProgressEvent("start", 0, 1000))
    for number in range(1, 1001):
        time.now += 0.1  # 100 s in all
        lines.show(step(number))
        if number % 250 == 0:
            lines.show(ProgressEvent("eval", number, numbers={"eval_loss": 1.5}))
    steps = [line for line in out if line.startswith("step") and "loss 2.0" in line]
    assert steps[0].startswith("step 1/1000") and steps[-1].startswith("step 1000/1000")
    assert len(steps) <= 22
    assert sum("eval_loss 1.5" in line for line in out) == 4


def test_fast_runs_print_first_and_last():
    time, out = Clock(), []
    lines = ProgressLines(out.append, time)
    lines.show(ProgressEvent("start", 0, 40))
    for number in range(1, 41):
        lines.show(step(number))
    assert len(out) == 3


def test_the_line_has_all_that_matters():
    time = Clock()
    pace = StepPace(time)
    pace.take(ProgressEvent("start", 99, 200))
    time.now = 3.0  # start-up and the first step say nothing about the rest
    pace.take(ProgressEvent("step", 100, 200))
    time.now = 13.0
    pace.take(ProgressEvent("save", 110))
    time.now = 23.0
    line = step_line(
        step(120, lr={"lora_A": 1e-4, "lora_B": 1.6e-3}, tokens_per_s=5120.0, memory=3 * 2**29),
        pace,
    )
    assert line == (
        "step 120/200  loss 2.0000  lr lora_A=1.0e-04 lora_B=1.6e-03  5.1k tok/s  1.50 GiB"
        "  left 1m20s  saved 10s ago"
    )


def test_units():
    assert [si(7), si(1500), si(2.5e6)] == ["7", "1.5k", "2.5M"]
    assert [clock(5), clock(190), clock(7260)] == ["5s", "3m10s", "2h01m"]


def test_numbers_of_an_event():
    found = {"loss": 1.0, "grad_norm": float("nan")}
    event = ProgressEvent("step", 3, numbers=found, lr={"B": 2.0})
    assert dict(numbers(event)) == {"loss": 1.0, "lr/B": 2.0}


def test_a_failing_tracker_warns_once_and_the_other_goes_on(a_run):
    seen, warned, done = [], [], threading.Event()

    class Broken:
        def log(self, step, values):
            raise ConnectionError("no server")

    class Fine:
        def log(self, step, values):
            seen.append(step)

        def close(self):
            done.set()

    run = a_run(trackers=["mlflow", "wandb"])
    kinds = {"mlflow": lambda run, home: Broken(), "wandb": lambda run, home: Fine()}
    both = Trackers(run, None, warned.append, kinds)
    for number in range(5):
        both.observe(step(number))
    both.close()
    assert done.is_set() and seen == [0, 1, 2, 3, 4]
    assert warned == ["tracker mlflow stopped: ConnectionError: no server"]


def test_a_hanging_tracker_blocks_nothing(a_run, monkeypatch):
    monkeypatch.setattr(trackers, "KEPT", 3)
    monkeypatch.setattr(trackers, "LAST_WORDS", 0.1)
    never = threading.Event()

    class Hanging:
        def log(self, step, values):
            never.wait()

    one = Trackers(
        a_run(trackers=["mlflow"]), None, pytest.fail, {"mlflow": lambda r, h: Hanging()}
    )
    for number in range(100):
        one.observe(step(number))
    one.close()
    never.set()


def test_a_missing_tracker_is_refused_with_the_command(monkeypatch):
    monkeypatch.setitem(trackers._PACKAGES, "wandb", "no_such_package")
    with pytest.raises(ConfigError, match=r"pip install 'rayft\[wandb\]'"):
        trackers.installed(["wandb"])
