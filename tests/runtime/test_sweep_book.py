"""The driver's view of a sweep, without Ray: its ledger, what is best, what people see."""

import math

import pytest

from rayft.config.load import load
from rayft.core.errors import ConfigError
from rayft.core.ledger import read_ledger
from rayft.core.storage import Storage
from rayft.runtime.cluster import Node
from rayft.runtime.room import reasons_alone, room_for
from rayft.runtime.sweepbook import SweepBook, metrics_of
from rayft.runtime.sweepview import PlainLines, table
from rayft.runtime.trial import SCORE, WORST, result_of
from rayft.runtime.watch import state_of
from rayft.trials.types import Told

CONFIG = {
    "name": "s",
    "model": "builtin:tiny",
    "methods": [{"kind": "lora", "rank": 4}],
    "data": {"train": "builtin:docstrings", "eval": [{"path": "held.jsonl"}]},
    "train": {"steps": 20, "eval_every": 10},
    "scale": {"gpus": 0},
    "sweep": {"trials": 8, "space": {"optim.lr": {"loguniform": [1e-5, 1e-2]}}},
}


def run_in(folder, *changes):
    return load(CONFIG | {"storage": str(folder)}, changes)


@pytest.fixture
def book(tmp_path):
    made = SweepBook(Storage.open(str(tmp_path)).child("s"), run_in(tmp_path))
    made.begin()
    yield made
    made.close()


def result(step, loss, standing="running", **more):
    told = Told("t", step, {"eval_loss": loss, "base_loss": 6.0, "seconds": 1.0}, standing)
    return result_of(told, "eval_loss", "min") | {"timestamp": 1, "pid": 2, "trial_id": "x"} | more


def test_reports_and_ends_become_lines(book, tmp_path):
    book.started("t0001", {"optim.lr": 1e-3})
    book.told("t0001", {"optim.lr": 1e-3}, result(10, 5.0, pack="pack-0.1"))
    book.ended("t0001", {"optim.lr": 1e-3}, result(20, 4.0, "done"))
    book.started("t0002", {"optim.lr": 1e-2})
    book.told("t0002", {"optim.lr": 1e-2}, result(10, 4.5))
    book.ended("t0002", {"optim.lr": 1e-2}, result(10, 4.5))  # its scheduler's verdict
    trials = read_ledger(book.home).trials
    assert (trials["t0001"].status, trials["t0002"].status) == ("done", "stopped")
    assert trials["t0001"].pack == "pack-0.1"
    assert [report.step for report in trials["t0001"].reports] == [10, 20]
    assert set(trials["t0001"].reports[0].metrics) == {"eval_loss", "base_loss", "seconds"}
    assert book.summary()["trial"] == "t0001" and book.summary()["metric"] == 4.0


def test_a_nan_is_diverged_never_best_and_a_finite_score_for_schedulers(book):
    found = result(10, math.nan, "diverged")
    assert found[SCORE] == WORST and "eval_loss" not in found and found["done"]
    book.started("t0001", {"optim.lr": 1e-2})
    book.ended("t0001", {"optim.lr": 1e-2}, found | {"error_text": "not a number"})
    assert book.best() is None
    trial = read_ledger(book.home).trials["t0001"]
    assert (trial.status, trial.error) == ("diverged", "not a number")
    assert metrics_of({"eval_loss": math.inf, "loss": 1.0, "done": True}) == {"loss": 1.0}


def test_an_interrupted_trial_is_not_over(book):
    book.started("t0001", {"optim.lr": 1e-2})
    book.interrupted = True
    book.ended("t0001", {"optim.lr": 1e-2}, result(10, 5.0))
    assert read_ledger(book.home).trials["t0001"].status == "running"
    book.interrupted = False
    book.ended("t0001", {"optim.lr": 1e-2}, {})  # time was up before it had reported anything
    assert read_ledger(book.home).trials["t0001"].status == "running"


def test_losers_lose_their_checkpoints_and_nothing_else(book):
    for number, loss in (("1", 5.0), ("2", 4.0)):
        name = f"t000{number}"
        for file in ("checkpoints/step-20-1/COMMIT.json", "metrics.jsonl", "run.json"):
            book.home.child("trials", name).write_text(file, "{}")
        book.started(name, {"optim.lr": 1e-3})
        book.ended(name, {"optim.lr": 1e-3}, result(20, loss, "done"))
    book.close()
    first, second = (book.home.child("trials", name) for name in ("t0001", "t0002"))
    assert not first.exists("checkpoints") and first.exists("metrics.jsonl")
    assert second.exists("checkpoints/step-20-1/COMMIT.json")


def test_a_target_is_reached(tmp_path):
    made = SweepBook(Storage.open(str(tmp_path)).child("s"), run_in(tmp_path, "sweep.target=4.2"))
    made.begin()
    made.started("t0001", {"optim.lr": 1e-3})
    made.told("t0001", {"optim.lr": 1e-3}, result(10, 4.3))
    assert not made.reached_target()
    made.told("t0001", {"optim.lr": 1e-3}, result(20, 4.1))
    assert made.reached_target()
    made.close()


def test_another_config_under_the_same_name_is_refused(book, tmp_path):
    SweepBook(book.home, run_in(tmp_path, "sweep.trials=99"))  # longer: the same sweep
    with pytest.raises(ConfigError, match="optim.weight_decay: 0.0 -> 0.1"):
        SweepBook(book.home, run_in(tmp_path, "optim.weight_decay=0.1"))
    with pytest.raises(ConfigError, match=r"sweep.space"):
        SweepBook(
            book.home, run_in(tmp_path, "sweep.space.optim.lr={loguniform: [1.0e-6, 1.0e-2]}")
        )


def test_what_people_see(book):
    book.started("t0001", {"optim.lr": 1e-3})
    book.told("t0001", {"optim.lr": 1e-3}, result(10, 5.0))
    book.started("t0002", {"optim.lr": 2e-3})
    book.ended("t0002", {"optim.lr": 2e-3}, result(10, 9.5, "diverged"))
    numbers = {"slots": 2.0, "tokens": 3000.0, "seconds": 3.0, "trials": 1}
    state = state_of(book, {"packs": {"pack-0": numbers}, "waiting": 0})
    lines, now = [], [0.0]
    view = PlainLines(lines.append, lambda: now[0])
    view.show(state)
    view.show(state)  # nothing new
    assert lines == [
        "1 of 8 trials over (1 diverged), 1 running  best t0001 eval_loss 5.0000 (base 6.0000)  "
        "slots 1/2  1.0k tok/s"
    ]
    shown = table(state)
    assert [list(column.cells) for column in shown.columns][0] == ["t0001"]
    assert list(shown.columns[3].cells) == ["lr=0.001"]


def test_room_on_a_cluster():
    four = [Node("a", "a", {"CPU": 4})]
    packed = room_for(load(CONFIG), four)
    assert (packed.packs, packed.slots, packed.alone) == (4, 1, 0) and packed.at_once == 4
    small = room_for(load(CONFIG, ["data.max_length=32", "train.global_batch=8"]), four)
    assert (small.packs, small.slots) == (4, 2)  # four slots, but only eight trials
    fewer = room_for(load(CONFIG, ["sweep.trials=3", "sweep.slots=4"]), four)
    assert (fewer.packs, fewer.slots) == (3, 1)
    big = [Node(name, name, {"CPU": 16, "GPU": 8}) for name in "ab"]
    gpus = load(CONFIG, ["scale.gpus=1", "sweep.trials=500"])
    assert (room_for(gpus, big).packs, room_for(gpus, big).slots) == (16, 16)
    some, why = reasons_alone(
        load(
            CONFIG,
            ["sweep.space={methods.0.rank: {choice: [2, 4]}, model.quant: {choice: [int8, none]}}"],
        )
    )
    assert some and why and "int8" in why[0]
    assert reasons_alone(load(CONFIG, ["sweep.pack=off"])) == (False, ["sweep.pack is off"])
