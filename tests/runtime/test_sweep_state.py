"""The driver's view of a sweep, without Ray: its ledger, what is best, what people see."""

import json
import math
from dataclasses import replace

import pytest

from rayft.checkpoint.folders import folder_names
from rayft.cluster.connect import Node
from rayft.config.load import load
from rayft.config.space import applied
from rayft.core.errors import ConfigError
from rayft.hosts.capacity import cluster_capacity, reasons_not_packed
from rayft.hosts.overview import HostsOverview
from rayft.records.ledger import read_ledger
from rayft.records.run_record import RunRecord
from rayft.storage.folder import Storage
from rayft.storage.jsonl import LineAppender
from rayft.sweeps.callback import snapshot_of
from rayft.sweeps.state import SweepState
from rayft.sweeps.trial import SCORE, WORST, metrics_of, tune_result
from rayft.sweeps.view import PlainLines, table
from rayft.trials.types import TrialReport

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
    made = SweepState(Storage.open(str(tmp_path)).child("s"), run_in(tmp_path))
    made.begin()
    yield made
    made.close()


def result(step, loss, status="running", **more):
    told = TrialReport("t", step, {"eval_loss": loss, "base_loss": 6.0, "seconds": 1.0}, status)
    return (
        tune_result(told, "eval_loss", "min") | {"timestamp": 1, "pid": 2, "trial_id": "x"} | more
    )


def test_reports_and_ends_become_lines(book, tmp_path):
    book.started("t0001", {"optim.lr": 1e-3})
    book.reported("t0001", {"optim.lr": 1e-3}, result(10, 5.0, pack="pack-0.1"))
    book.ended("t0001", {"optim.lr": 1e-3}, result(20, 4.0, "done"))
    book.started("t0002", {"optim.lr": 1e-2})
    book.reported("t0002", {"optim.lr": 1e-2}, result(10, 4.5))
    book.ended("t0002", {"optim.lr": 1e-2}, result(10, 4.5))  # its scheduler's verdict
    trials = read_ledger(book.home).trials
    assert (trials["t0001"].status, trials["t0002"].status) == ("done", "stopped")
    assert trials["t0001"].pack == "pack-0.1"
    assert [report.step for report in trials["t0001"].reports] == [10, 20]
    assert set(trials["t0001"].reports[0].metrics) == {"eval_loss", "base_loss", "seconds"}
    assert book.summary().trial == "t0001" and book.summary().metric == 4.0


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
    made = SweepState(Storage.open(str(tmp_path)).child("s"), run_in(tmp_path, "sweep.target=4.2"))
    made.begin()
    made.started("t0001", {"optim.lr": 1e-3})
    made.reported("t0001", {"optim.lr": 1e-3}, result(10, 4.3))
    assert not made.reached_target()
    made.reported("t0001", {"optim.lr": 1e-3}, result(20, 4.1))
    assert made.reached_target()
    made.close()


def test_another_config_under_the_same_name_is_refused(book, tmp_path):
    SweepState(book.home, run_in(tmp_path, "sweep.trials=99"))  # longer: the same sweep
    with pytest.raises(ConfigError, match="optim.weight_decay: 0.0 -> 0.1"):
        SweepState(book.home, run_in(tmp_path, "optim.weight_decay=0.1"))
    with pytest.raises(ConfigError, match=r"sweep.space"):
        SweepState(
            book.home, run_in(tmp_path, "sweep.space.optim.lr={loguniform: [1.0e-6, 1.0e-2]}")
        )


def test_what_people_see(book):
    book.started("t0001", {"optim.lr": 1e-3})
    book.reported("t0001", {"optim.lr": 1e-3}, result(10, 5.0))
    book.started("t0002", {"optim.lr": 2e-3})
    book.ended("t0002", {"optim.lr": 2e-3}, result(10, 9.5, "diverged"))
    numbers = {"slots": 2.0, "tokens": 3000.0, "seconds": 3.0, "trials": 1}
    state = snapshot_of(book, HostsOverview({"pack-0": numbers}))
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
    assert [str(cell) for cell in shown.columns[3].cells] == ["lr=0.001"]


def test_what_a_cluster_holds():
    four = [Node("a", "a", {"CPU": 4})]
    packed = cluster_capacity(load(CONFIG), four)
    assert (packed.packs, packed.slots, packed.own_runs) == (4, 1, 0) and packed.at_once == 4
    small = cluster_capacity(load(CONFIG, ["data.max_length=32", "train.global_batch=8"]), four)
    assert (small.packs, small.slots) == (4, 2)  # four slots, but only eight trials
    fewer = cluster_capacity(load(CONFIG, ["sweep.trials=3", "sweep.slots=4"]), four)
    assert (fewer.packs, fewer.slots) == (3, 1)
    big = [Node(name, name, {"CPU": 16, "GPU": 8}) for name in "ab"]
    gpus = load(CONFIG, ["scale.gpus=1", "sweep.trials=500"])
    assert (cluster_capacity(gpus, big).packs, cluster_capacity(gpus, big).slots) == (16, 16)
    some, why = reasons_not_packed(
        load(
            CONFIG,
            ["sweep.space={methods.0.rank: {choice: [2, 4]}, model.quant: {choice: [int8, none]}}"],
        )
    )
    assert some and why and "int8" in why[0]
    assert reasons_not_packed(load(CONFIG, ["sweep.pack=off"])) == (False, ["sweep.pack is off"])


# --- damage ---


def trial_folder(book, name, lr, **facts):
    """What a trial has left: its record, and a checkpoint where it was not stopped."""
    run = applied(book.run, {"optim.lr": lr}, name=name, storage=book.home.child("trials").uri)
    record = RunRecord(name, "running", run.resolved(), run.digest(), base={"eval_loss": 6.0})
    home = book.home.child("trials", name)
    home.write_text("run.json", replace(record, **facts).to_json())
    if facts.get("status") != "stopped":
        home.write_text("checkpoints/step-20-100001xa/COMMIT.json", "{}")


def hit(home, line):
    """Flip a bit in a line of the ledger (from 1)."""
    lines = home.read_bytes("trials.jsonl").splitlines(keepends=True)
    middle = len(lines[line - 1]) // 2
    lines[line - 1] = lines[line - 1][:middle] + b"\x01" + lines[line - 1][middle + 1 :]
    home.write_bytes("trials.jsonl", b"".join(lines))


def again(book):
    """The next start of the same sweep."""
    book.interrupted = True
    book.close()
    made = SweepState(book.home, book.run)
    made.begin()
    return made


ENDS = {
    "done": {"status": "done", "steps": 20, "eval": {"eval_loss": 3.5}, "tokens": 7},
    "diverged": {"status": "diverged", "steps": 12, "error": "loss nan"},
    "stopped": {"status": "stopped", "steps": 10},
}


@pytest.mark.parametrize("end", ENDS)
def test_a_finished_trial_whose_last_line_is_damaged_stays_finished(end, book):
    book.started("t0001", {"optim.lr": 1e-3})
    book.reported("t0001", {"optim.lr": 1e-3}, result(10, 4.0))
    status = {"done": "done", "diverged": "diverged", "stopped": "running"}[end]
    book.ended("t0001", {"optim.lr": 1e-3}, result(ENDS[end]["steps"], 3.5, status))
    assert book.ledger.trials["t0001"].status == end
    trial_folder(book, "t0001", 1e-3, **ENDS[end])
    hit(book.home, 4)
    assert read_ledger(book.home).trials["t0001"].status == "running"
    made = again(book)
    assert "1 line of" in made.news[0] and "line 4 (t0001)" in made.news[0]
    assert made.news[1] == f"t0001 was {end}: from its folder, not the ledger"
    trial = read_ledger(book.home).trials["t0001"]
    assert trial.status == end and trial.step == ENDS[end]["steps"]
    if end == "done":
        assert trial.best("eval_loss").metrics["eval_loss"] == 3.5
    made.close()


def test_an_unfinished_trial_goes_on_and_nothing_is_made_up(book):
    book.started("t0001", {"optim.lr": 1e-3})
    book.reported("t0001", {"optim.lr": 1e-3}, result(10, 4.0))
    trial_folder(book, "t0001", 1e-3)
    hit(book.home, 3)
    made = again(book)
    assert len(made.news) == 1 and "line 3" in made.news[0]
    trial = made.ledger.trials["t0001"]
    assert trial.status == "running" and trial.params == {"optim.lr": 1e-3} and not trial.reports
    made.close()


@pytest.mark.parametrize("how", ["damaged", "gone"])
def test_a_trial_that_the_ledger_forgot_keeps_its_parameters(how, book):
    """Its name must not be given to other ones: they would continue its checkpoints."""
    book.started("t0001", {"optim.lr": 1e-3})
    trial_folder(book, "t0001", 1e-3)
    trial_folder(book, "t0002", 1e-2)
    book.home.write_text("trials/t0002/run.json", "{")  # nobody knows what this one was
    if how == "gone":
        book.close()
        book.home.delete("trials.jsonl")
    else:
        hit(book.home, 2)
    made = again(book)
    assert made.ledger.trials["t0001"].params == {"optim.lr": 1e-3}
    assert set(made.ledger.trials) == {"t0001"}
    assert folder_names(book.home.child("trials/t0001")) == ["step-20-100001xa"]
    assert folder_names(book.home.child("trials/t0002")) == []
    made.close()


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"{}", b"\xff\xfe", b'{"name": 3}', None])
def test_sweep_json_is_made_anew_from_the_ledger(damage, book, tmp_path):
    book.write(data_hash="d" * 16)
    book = again(book)
    book.started("t0001", {"optim.lr": 1e-3})
    book.ended("t0001", {"optim.lr": 1e-3}, result(20, 4.0, "done"))
    book.close()
    if damage is None:
        book.home.delete("sweep.json")
    else:
        book.home.write_bytes("sweep.json", damage)
    made = SweepState(book.home, book.run)
    assert (made.record.starts, made.record.data_hash) == (2, "d" * 16)
    assert made.record.status == "interrupted" and len(made.news) == 1
    assert "sweep.json is" in made.news[0] and "made anew from the ledger" in made.news[0]
    assert book.home.exists("sweep.json.damaged") == (damage is not None)
    with pytest.raises(ConfigError, match="exists with another config"):
        SweepState(book.home, run_in(tmp_path, "optim.weight_decay=0.1"))
    made.begin()
    assert made.record.starts == 3 and made.summary().metric == 4.0
    made.close()


def test_a_new_start_of_an_old_sweep_is_numbered_behind_its_checkpoints(book):
    """A ledger without lines of starts: a lower number would be refused as an older attempt."""
    book.started("t0001", {"optim.lr": 1e-3})
    book.close()
    trial_folder(book, "t0001", 1e-3)
    book.home.write_text("trials/t0001/checkpoints/step-30-700004xb/COMMIT.json", "{}")
    row = json.loads(book.home.read_bytes("trials.jsonl").splitlines()[1])
    bare = {key: row[key] for key in row if key not in ("line", "crc")}
    book.home.write_text("trials.jsonl", json.dumps(bare) + "\n")
    book.home.delete("sweep.json")
    assert SweepState(book.home, book.run).record.starts == 7


def test_the_base_is_found_without_the_winners_record(book):
    book.started("t0001", {"optim.lr": 1e-3})
    book.ended("t0001", {"optim.lr": 1e-3}, result(20, 4.0, "done"))
    home = book.home.child("trials/t0001")
    home.write_text("run.json", "{")
    with LineAppender(home, "metrics.jsonl") as log:
        log.append({"step": 0, "split": "eval", "loss": 6.0, "eval_loss": 6.0, "seconds": 1.0})
    assert book.base() == {"eval_loss": 6.0}
