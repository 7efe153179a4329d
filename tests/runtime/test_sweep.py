"""Sweeps on a real local Ray, the real engine, the embedded model."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest
from test_one_driver import take_lease

from rayft.cluster.connect import connected
from rayft.compose.data import prepare_data
from rayft.compose.offline import evaluate_run
from rayft.config.load import load
from rayft.config.space import applied
from rayft.core.errors import DivergedError, InUseError, RayftError
from rayft.records.ledger import read_ledger
from rayft.records.run_record import RunRecord, SweepRecord, stored_record
from rayft.storage import lease
from rayft.storage.folder import Storage
from rayft.sweeps.driver import sweep
from rayft.sweeps.state import SweepState
from rayft.training.driver import train

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

BASE = {
    "model": "builtin:tiny",
    "methods": [{"kind": "lora", "rank": 4, "alpha": 8}],
    "data": {
        "train": [{"path": "builtin:docstrings", "samples": 400}],
        "eval": [{"path": "builtin:docstrings", "split": "heldout", "samples": 16}],
        "max_length": 96,
        "bad_rows": 0.2,
    },
    "optim": {"lr": 1e-3, "warmup": 0},
    "train": {"steps": 12, "global_batch": 4, "eval_every": 4, "eval_batch": 16},
    "scale": {"workers": 1, "gpus": 0, "cpus": 1},
}
SPACE = {
    "methods.0.rank": {"choice": [2, 4, 8]},
    "optim.lr": {"loguniform": [1e-4, 1e-2]},
}
BLOCK = {"trials": 6, "space": SPACE, "search": "random", "packs": 2, "slots": 2}


def config(folder: Path, block: dict, **changes) -> dict:
    return BASE | {"name": "s", "storage": str(folder), "sweep": BLOCK | block} | changes


def home(folder: Path) -> Storage:
    return Storage.open(f"{folder}/s")


def told(folder: Path) -> dict[str, dict]:
    """{trial: {step: eval_loss}} of the ledger."""
    trials = read_ledger(home(folder)).trials
    return {
        name: {report.step: report.metrics["eval_loss"] for report in trial.reports}
        for name, trial in trials.items()
    }


@pytest.fixture(scope="module", autouse=True)
def cluster(quiet):
    with connected(dashboard=True):  # without one, runs of their own are refused
        yield


@pytest.fixture(scope="module")
def whole(cluster, tmp_path_factory):
    """A sweep from start to end, each trial to its last step."""
    folder = tmp_path_factory.mktemp("whole")
    run = load(config(folder, {"scheduler": "none", "seeds": 2}))
    return folder, run, sweep(run)


def test_a_sweep_from_start_to_end(whole):
    folder, run, record = whole
    book = read_ledger(home(folder))
    assert record.status == "done" and record.stopped_by == "trials"
    searched = [trial for trial in book.trials.values() if not trial.origin]
    assert [trial.status for trial in searched] == ["done"] * 6
    assert all([r.step for r in trial.reports] == [4, 8, 12] for trial in searched)
    losses = {t.id: t.best("eval_loss").metrics["eval_loss"] for t in searched}
    assert record.best.metric == min(losses.values()) == losses[record.best.trial]
    assert record.base["eval_loss"] > record.best.metric
    again = [trial for trial in book.trials.values() if trial.origin]
    assert [trial.origin for trial in again] == [record.best.trial]
    assert again[0].params["seed"] == 1 and again[0].status == "done"
    assert {pack["slots"] for pack in book.packs.values()} == {2}
    assert (folder / "s/report.html").stat().st_size > 100_000
    assert (folder / "s/trials.csv").read_text().count("\n") == 8
    # losers keep their metrics, not their weights
    kept = [path.parent.name for path in (folder / "s/trials").glob("*/checkpoints/*")]
    assert set(kept) <= {record.best.trial, "checkpoints"}
    assert len(list((folder / "s/trials").glob("*/metrics.jsonl"))) == 7


def test_trials_that_read_other_tokens_get_their_own_data(tmp_path):
    """What the space says of masks is trained: the data of each is that of a run of its own."""
    space = {"objective.train_on_prompt": {"choice": [False, True]}}
    block = {"space": space, "trials": 2, "search": "grid", "scheduler": "none", "slots": 1}
    run = load(config(tmp_path, block, train=BASE["train"] | {"steps": 4}))
    assert sweep(run).status == "done"
    hashes, tokens = set(), set()
    for trial in read_ledger(home(tmp_path)).trials.values():
        own = applied(run, trial.params, name=trial.id)
        mapper = lambda function, items: [function(item) for item in items]  # noqa: E731
        record = stored_record(home(tmp_path).child("trials", trial.id))
        assert record.data_hash == prepare_data(own, mapper).hash
        hashes.add(record.data_hash)
        tokens.add(trial.reports[-1].metrics["tokens"])
    assert len(hashes) == len(tokens) == 2


def test_the_winner_is_what_rayft_train_makes_of_its_config(whole, tmp_path):
    """The packed trial's numbers are those of a run of its own."""
    folder, _, record = whole
    text = (folder / "s/best/config.yaml").read_text()
    assert record.best.trial in text.splitlines()[0]
    run = load(folder / "s/best/config.yaml", [f"storage={tmp_path}", "scale.workers=0"])
    alone = train(run)
    assert alone.best.metric == pytest.approx(record.best.metric, rel=1e-5)
    assert alone.base["eval_loss"] == pytest.approx(record.base["eval_loss"], rel=1e-5)
    best = RunRecord.from_json((folder / "s/best/run.json").read_text())
    assert best.best.step == record.best.step and best.name == "best"
    assert (folder / "s/best/export/adapter_model.safetensors").exists()
    assert f"{record.best.metric:.4f}" in evaluate_run(f"{folder}/s/best")


def test_a_done_sweep_is_returned_and_can_be_made_longer(whole):
    folder, run, record = whole
    began = time.monotonic()
    assert sweep(run) == SweepRecord.from_json((folder / "s/sweep.json").read_text())
    assert time.monotonic() - began < 20  # a sweep that runs again takes longer
    before = told(folder)
    longer = sweep(load(config(folder, {"scheduler": "none", "seeds": 2, "trials": 7})))
    after = told(folder)
    assert longer.starts == 2 and len([name for name in after if "-" not in name]) == 7
    assert {name: after[name] for name in before} == before


def test_asha_stops_early_and_slots_are_taken_again(tmp_path, monkeypatch):
    """While commits are under way: each takes a second longer, and no stop waits for one."""
    monkeypatch.setenv("RAYFT_FAILPOINT", "checkpoint.gather:sleep:1+")
    often = BASE["train"] | {"save_every": 4}
    block = {"trials": 8, "scheduler": {"kind": "asha", "factor": 2}}
    driver = started(tmp_path, block, train=often)
    try:
        said = driver.communicate(timeout=200)[0]  # it used to take 600 s and more
    finally:
        driver.kill()
    assert driver.returncode == 0, said
    record = SweepRecord.from_json((tmp_path / "s/sweep.json").read_text())
    trials = read_ledger(home(tmp_path)).trials.values()
    stopped = [trial for trial in trials if trial.status == "stopped"]
    assert stopped and all(trial.step < 12 for trial in stopped)
    assert len(trials) == 8 and record.best.metric > 0
    # a stopped trial trains on for a step or two at most while its verdict travels
    for trial in stopped:
        lines = (tmp_path / f"s/trials/{trial.id}/metrics.jsonl").read_text().splitlines()
        assert json.loads(lines[-1])["step"] <= trial.step + 4


def test_all_diverged_is_a_report_and_exit_5(tmp_path):
    space = {"optim.lr": {"loguniform": [1e5, 1e6]}}
    run = load(config(tmp_path, {"trials": 3, "space": space, "search": "optuna"}))
    with pytest.raises(DivergedError, match="all 3 trials diverged") as caught:
        sweep(run)
    assert caught.value.exit_code == 5
    assert {t.status for t in read_ledger(home(tmp_path)).trials.values()} == {"diverged"}
    assert (tmp_path / "s/report.html").exists()
    assert SweepRecord.from_json((tmp_path / "s/sweep.json").read_text()).status == "diverged"


def test_a_population_really_exploits(tmp_path):
    """The worst continue from the state of the best, with other settings."""
    space = {"optim.lr": {"choice": [1e-7, 2e-7, 3e-3, 1e-2]}, "methods.0.rank": {"choice": [4, 8]}}
    block = {"trials": 4, "space": space, "scheduler": {"kind": "pbt", "quantile": 0.5}}
    run = load(config(tmp_path, block, train=BASE["train"] | {"steps": 24}))
    sweep(run)
    trials = read_ledger(home(tmp_path)).trials
    copies = [(trial, step, donor) for trial in trials.values() for step, donor in trial.donors]
    assert copies
    stuck = []
    for trial, step, donor in copies:
        assert donor != trial.id and step > 4
        # its first report after the copy is near the donor's, not near its own last one
        donors = {r.step: r.metrics["eval_loss"] for r in trials[donor].reports}
        first = next(r for r in trial.reports if r.step >= step).metrics["eval_loss"]
        near = donors[max(s for s in donors if s <= step)]
        own = [r.metrics["eval_loss"] for r in trial.reports if r.step < step][-1:]
        # Four more steps under another rate, which may be a high one, and near it the donor may
        # stand at an earlier step: which trial copies which depends on who is faster. But those at
        # low rates stand at 6.1, and move by less than 0.01 alone.
        if own and own[0] > 6:
            assert first < own[0] - 0.2
            stuck.append(trial.id)
        assert first < max([near, *own]) + 1.0
    assert stuck  # the low rates are the worst, so they copied


def test_what_kills_a_pack_does_not_kill_the_sweep(tmp_path):
    run = load(config(tmp_path, {"trials": 4, "scheduler": "none"}))
    killed = []

    def kill():
        """One pack process, as soon as a trial has reported."""
        while not any(len(steps) for steps in told(tmp_path).values()):
            time.sleep(0.2)
        for process in psutil.Process().children(recursive=True):
            if "PackActor" in " ".join(process.cmdline()):
                killed.append(process.pid)
                process.send_signal(signal.SIGKILL)
                return

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    record = sweep(run)
    thread.join(1)
    assert killed and record.status == "done"
    trials = read_ledger(home(tmp_path)).trials.values()
    assert [trial.status for trial in trials] == ["done"] * 4


def started(folder: Path, block: dict, **changes) -> subprocess.Popen:
    """`rayft sweep` in a process of its own."""
    path = folder / "config.json"
    path.write_text(json.dumps(config(folder, block, **changes)))
    return subprocess.Popen(
        [sys.executable, "-m", "rayft", "sweep", str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ,
    )


def test_kill_9_of_the_driver_then_the_same_command(whole, tmp_path):
    """Finished trials stay finished, the others continue, and the numbers are those of a sweep
    that was never cut off. Meanwhile a second driver is refused."""
    folder, _, _ = whole
    slow = {"scheduler": "none", "packs": 1, "slots": 1}  # how wide the packs are is free
    first = started(tmp_path, slow)
    try:
        while not any(len(steps) == 3 for steps in told(tmp_path).values()):
            assert first.poll() is None, first.communicate()[0]
            time.sleep(0.2)
        second = started(tmp_path, slow)
        said = second.communicate(timeout=60)[0]
        assert second.returncode != 0 and str(first.pid) in said
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    over = {name: trial for name, trial in read_ledger(home(tmp_path)).trials.items() if trial.over}
    assert over and len(over) < 6
    third = started(tmp_path, {"scheduler": "none"})
    said = third.communicate(timeout=200)[0]
    assert third.returncode == 0, said
    after = read_ledger(home(tmp_path)).trials
    assert all(after[name] == trial for name, trial in over.items())
    uncut = {name: steps for name, steps in told(folder).items() if name in after}
    for name, steps in told(tmp_path).items():
        assert steps == pytest.approx(uncut[name], rel=1e-5)


def test_who_waits_at_a_rung_goes_on_as_if_it_had_never_waited(whole, tmp_path):
    """Through a kill -9 of the driver as well: a promoted trial's numbers are those of a run from
    start to end, and who is not promoted ends as any other loser does."""
    folder, _, _ = whole
    asha = {"kind": "asha", "factor": 2, "promote": True}
    block = {"scheduler": asha, "packs": 1, "slots": 1}  # one at a time: nobody outruns a pause
    first = started(tmp_path, block)
    try:
        while sum(4 in steps for steps in told(tmp_path).values()) < 3:
            assert first.poll() is None, first.communicate()[0]
            time.sleep(0.1)
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    assert not any(
        trial.status == "stopped" for trial in read_ledger(home(tmp_path)).trials.values()
    )
    record = sweep(load(config(tmp_path, block)))
    assert record.status == "done" and record.stopped_by == "trials"
    book, uncut = read_ledger(home(tmp_path)), told(folder)
    statuses = [trial.status for trial in book.trials.values()]
    assert len(statuses) == 6 and set(statuses) == {"done", "stopped"}
    for name, steps in told(tmp_path).items():
        part = {step: uncut[name][step] for step in steps}
        assert steps == pytest.approx(part, rel=1e-5)
        assert list(steps) in ([4], [4, 8], [4, 8, 12])
    waited = {
        row["trial"]
        for row in book.lines
        if row["status"] == "running" and "eval_loss" not in row and row["step"] in (4, 8)
    }
    assert any(max(told(tmp_path)[name]) > 4 for name in waited)
    kept = {path.parent.parent.name for path in (tmp_path / "s/trials").glob("*/checkpoints/*")}
    assert kept == {record.best.trial}


@pytest.mark.parametrize("taken", [True, False])
def test_a_driver_without_its_lease_writes_nothing_more(tmp_path, monkeypatch, taken):
    """Neither it nor its hosts; and a sweep that was called done by such a driver goes on."""
    monkeypatch.setattr(lease, "RENEW", 0.2)
    block = {"trials": 4, "scheduler": {"kind": "asha", "factor": 2}, "seeds": 2}
    run = load(config(tmp_path, block, train=BASE["train"] | {"steps": 30}))
    file, seen = tmp_path / "s" / lease.LEASE, {}

    def lose():
        """Once a trial has reported."""
        while not any(told(tmp_path).values()):
            time.sleep(0.05)
        take_lease(file, json.dumps(asdict(lease.LeaseHolder.here())) if taken else None)

    thread = threading.Thread(target=lose, daemon=True)
    thread.start()
    said = "another driver took over" if taken else "driver.lease was deleted"
    with pytest.raises(RayftError, match=said) as caught:
        sweep(run)
    thread.join(1)
    assert caught.value.exit_code == 1 and type(caught.value) is (
        InUseError if taken else RayftError
    )
    end = time.monotonic() + 20
    while any("PackActor" in " ".join(p.cmdline()) for p in living()):
        assert time.monotonic() < end, "a host still lives"
        time.sleep(0.1)
    seen = {path: path.read_bytes() for path in (tmp_path / "s").rglob("*") if path.is_file()}
    assert file.exists() == taken
    record = SweepRecord.from_json((tmp_path / "s/sweep.json").read_text())
    assert record.status == "running" and not (tmp_path / "s/best").exists()
    assert not (tmp_path / "s/report.html").exists()
    before = read_ledger(home(tmp_path)).trials
    for path in (tmp_path / "s/trials").glob("*/run.json"):
        over = before[path.parent.name].over
        assert over or RunRecord.from_json(path.read_text()).status == "running"
    time.sleep(1.0)  # whatever still wanted to write had its time
    assert seen == {path: path.read_bytes() for path in seen}
    file.unlink(missing_ok=True)
    if taken:  # as an earlier rayft left it
        text = replace(record, status="done", stopped_by="trials").to_json()
        (tmp_path / "s/sweep.json").write_text(text)
    again = sweep(run)
    after = read_ledger(home(tmp_path)).trials
    assert again.status == "done" and again.starts == 2 and len(after) == 5
    assert all(trial.over for trial in after.values())
    for name, trial in before.items():  # no report is told twice, none is judged twice
        steps = [report.step for report in after[name].reports]
        assert steps == sorted(set(steps)) and steps[: len(trial.reports)] == [
            report.step for report in trial.reports
        ]


def living() -> list[psutil.Process]:
    """Below this process."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            process.cmdline()
            found.append(process)
    return found


def test_a_signal_ends_with_75_and_nothing_is_lost(tmp_path):
    first = started(tmp_path, {"scheduler": "none", "trials": 4})
    while not any(told(tmp_path).values()):
        assert first.poll() is None, first.communicate()[0]
        time.sleep(0.2)
    first.send_signal(signal.SIGTERM)
    said = first.communicate(timeout=60)[0]
    assert first.returncode == 75 and "rayft sweep" in said, said
    record = SweepRecord.from_json((tmp_path / "s/sweep.json").read_text())
    assert record.status == "interrupted"
    running = [t for t in read_ledger(home(tmp_path)).trials.values() if not t.over]
    assert running
    for trial in running:  # each has a commit to continue from
        assert list((tmp_path / f"s/trials/{trial.id}/checkpoints").glob("*/COMMIT.json"))
    # A driver that dies between a trial's commit and its own line never heard that report: the
    # trial says it again.
    heard = told(tmp_path)
    ledger = tmp_path / "s/trials.jsonl"
    lines = ledger.read_text().splitlines(keepends=True)
    ledger.write_text("".join(line for line in lines if '"eval_loss"' not in line))
    again = started(tmp_path, {"scheduler": "none", "trials": 4})
    said = again.communicate(timeout=200)[0]
    assert again.returncode == 0, said
    now = told(tmp_path)
    assert [list(steps) for steps in now.values()] == [[4, 8, 12]] * 4
    for trial in running:
        assert heard[trial.id].items() <= now[trial.id].items()


def test_a_limit_of_time_ends_a_sweep_and_the_winner_is_trained_in_full(tmp_path, monkeypatch):
    """The search stops at once; what was found is refitted as a Ray Train run for train.steps."""
    # The clock jumps once a trial is over: on a machine of any speed that is in the middle.
    passed = property(lambda book: 99.0 * any(t.over for t in book.ledger.trials.values()))
    monkeypatch.setattr(SweepState, "seconds", passed)
    block = {"trials": 1000, "max_seconds": 40, "steps": 6, "refit": True, "scheduler": "none"}
    short = BASE["train"] | {"steps": 8, "eval_every": 2}
    record = sweep(load(config(tmp_path, block, train=short)))
    assert record.stopped_by == "max_seconds"
    trials = read_ledger(home(tmp_path)).trials.values()
    assert 1 <= len(trials) < 100 and all(trial.over for trial in trials)
    assert max(trial.step for trial in trials) <= 6
    best = RunRecord.from_json((tmp_path / "s/best/run.json").read_text())
    assert (best.status, best.steps, best.name) == ("done", 8, "best")
    assert record.refit["step"] == 8 and record.refit["metric"] == best.eval["eval_loss"]
    assert (tmp_path / "s/best/export/adapter_config.json").exists()


def test_a_limit_that_leaves_no_time_for_any_trial(tmp_path):
    run = load(config(tmp_path, {"max_seconds": 0.01}))
    with pytest.raises(RayftError, match="max_seconds ended the sweep before any trial") as caught:
        sweep(run)
    assert caught.value.exit_code == 1 and "same command" in caught.value.fix


def test_a_config_without_the_block_is_refused(tmp_path):
    with pytest.raises(RayftError, match="no sweep block"):
        sweep(load(config(tmp_path, {}) | {"sweep": None}))


@pytest.mark.timeout(600)
def test_pack_off_gives_the_same_results(tmp_path):
    """Every trial as a Ray Train run of its own, under the same Tuner."""
    space = {"methods.0.rank": {"grid": [2, 4]}}
    block = {"space": space, "search": "grid", "scheduler": "none", "trials": None}
    short = BASE["train"] | {"steps": 8}
    alone = {"pack": "off", "slots": None, "packs": None}
    for name, pack in (("on", {}), ("off", alone)):
        (tmp_path / name).mkdir()
        sweep(load(config(tmp_path / name, block | pack, train=short)))
    on, off = told(tmp_path / "on"), told(tmp_path / "off")
    assert on.keys() == off.keys() and len(on) == 2
    for name, steps in on.items():
        assert steps == pytest.approx(off[name], rel=1e-5)
