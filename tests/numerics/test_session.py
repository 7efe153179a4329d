"""What a run says of itself: the best evaluation, saves, and the card of an export."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from rayft.checkpoint.folders import folder_names, folder_order
from rayft.checkpoint.reader import find_commit
from rayft.compose.assemble import assemble
from rayft.compose.data import open_corpus, prepare_data
from rayft.compose.execute import stepper_of
from rayft.compose.job import AttemptJob, ProgressEvent
from rayft.compose.loop import LoopHooks, StepSchedule
from rayft.compose.loop import train as train_loop
from rayft.compose.offline import evaluate_run
from rayft.compose.publish import choose_commit, publish
from rayft.compose.session import RunSession
from rayft.config.load import load
from rayft.config.run import Run
from rayft.core.errors import ConfigError, RayftError, StorageError
from rayft.models.chunked import LogitMap
from rayft.records.run_progress import BestEvaluation
from rayft.records.run_record import RunRecord
from rayft.storage.folder import Storage
from rayft.storage.jsonl import read_jsonl
from rayft.storage.lease import LEASE, RENEW, Lease, LeaseHolder, LeaseWatch
from rayft.training.driver import train

CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def alone():
    """ZeRO in this process makes a process group of one; it and its variables end with this file,
    as the tests that follow in the same process expect."""
    before = dict(os.environ)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        if name not in before:
            os.environ.pop(name, None)


class Heard:
    """Signals that keep what they are told."""

    def __init__(self) -> None:
        self.events: list[ProgressEvent] = []

    def stop_requested(self) -> bool:
        return False

    def progress(self, event: ProgressEvent) -> None:
        self.events.append(event)


@pytest.mark.parametrize("ended", [False, True])
def test_who_was_superseded_while_it_stood_still_writes_no_metrics(tmp_path, monkeypatch, ended):
    """A suspended driver wakes in the middle of a step; so may a worker whose driver is gone."""
    home = Storage.open(str(tmp_path)).child("small")
    monkeypatch.setattr("rayft.storage.lease.SETTLE", 0.0)
    with Lease.held(home) as lease:
        made = session(tmp_path)
        made.lease = LeaseWatch(made.storage, lease.id)
        made.evaluate(0)
        if ended:  # the other one has the run, or has had it
            home.delete(LEASE)
        else:
            home.write_text(LEASE, json.dumps(asdict(LeaseHolder.here())))
        made.evaluate(1)  # it has just looked
        made.lease.looked -= 2 * RENEW  # as if it had stood still since
        with pytest.raises(RayftError, match="was deleted" if ended else "another driver took"):
            made.evaluate(2)
    made.abandon()
    assert [row["step"] for row in read_jsonl(home, "metrics.jsonl")] == [0, 1]


def session(folder: Path, *changes: str) -> RunSession:
    """A session of a small run, before its first step."""
    source = {"path": "builtin:docstrings", "samples": 4}
    base = {
        "name": "small",
        "model": {"path": "builtin:tiny"},
        "data": {"train": [source], "eval": [source | {"split": "heldout"}], "max_length": 64},
        "train": {"steps": 4, "global_batch": 2, "micro_batch": 2},
        "storage": str(folder),
    }
    run = load(base, changes)
    ready = prepare_data(run, lambda function, items: [function(item) for item in items])
    parts = assemble(run, open_corpus(run, ready.uri, ready.hash), CPU)
    job = AttemptJob(run.resolved(), run.digest(), "1a", ready.uri, ready.hash)
    home = Storage.open(run.storage).child(run.name)
    return RunSession(job, parts, home, Heard(), 0.0)


def evaluated(one: RunSession, step: int, loss: float, monkeypatch) -> bool:
    """Whether `one` takes this held-out loss for the best so far."""
    found = {"eval_loss": loss, "eval_ppl": loss, "eval_tokens": 1.0}
    monkeypatch.setattr("rayft.compose.session.evaluate", lambda *_: found)
    return one.evaluate(step)


def test_the_best_evaluation_is_the_lowest_and_never_nan(tmp_path, monkeypatch):
    one = session(tmp_path)
    losses = (1.0, float("nan"), 3.0, 4.0, float("nan"), 2.0, 2.5)  # step 0 is the base
    taken = [evaluated(one, step, loss, monkeypatch) for step, loss in enumerate(losses)]
    assert taken == [False, False, True, False, False, True, False]
    assert one.progress.best == BestEvaluation(5, 2.0, "step-5-1a")
    one.abandon()


def test_an_export_tells_the_numbers_of_its_own_step(tmp_path, monkeypatch):
    one = session(tmp_path)
    one.restore()
    for step, loss in ((2, 2.0), (4, 3.0)):
        one.progress.step, one.progress.tokens = step, 10 * step
        one.save(step, evaluated(one, step, loss, monkeypatch))
    one.finish()
    best = one.progress.best
    record = RunRecord(
        "small", "done", one.parts.run.resolved(), "", eval={"eval_loss": 3.0}, best=best, steps=4
    )
    commit = choose_commit(one.storage, record)
    assert (commit.step, find_commit(one.storage).step) == (2, 4)
    publish(one.parts.built, record, commit, one.storage.child("export"))
    card = (tmp_path / "small" / "export" / "README.md").read_text()
    assert "2 steps, 20 trained tokens" in card
    assert "| eval_loss | - | 2 |" in card


def test_a_save_is_told_when_it_is_committed(tmp_path):
    one = session(tmp_path)
    one.restore()
    one.progress.step = 2
    one.save(2, False)
    one.finish()
    told = [event for event in one.signals.events if event.kind == "save"]
    assert [event.step for event in told] == [2]
    assert (tmp_path / "small" / "checkpoints" / "step-2-1a" / "COMMIT.json").is_file()


def test_a_save_that_failed_is_not_told(tmp_path, monkeypatch):
    monkeypatch.setenv("RAYFT_FAILPOINT", "checkpoint.commit:enospc:1+")
    one = session(tmp_path)
    one.restore()
    one.save(2, False)
    with pytest.raises(Exception, match="disk or the quota"):
        one.finish()
    assert "save" not in {event.kind for event in one.signals.events}
    one.abandon()


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path):
    tiny = Path("rayft/models/tiny")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        data = json.loads((tiny / name).read_text())
        (tmp_path / name).write_text(json.dumps(data))
    from transformers import AutoTokenizer

    larger = AutoTokenizer.from_pretrained(tmp_path)
    larger.add_tokens(["<more>"])
    larger.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="tokens, the model embeds"):
        session(tmp_path / "runs", f"model.tokenizer={tmp_path}")


def test_eval_says_when_the_held_out_data_is_another(tmp_path):
    rows = tmp_path / "heldout.jsonl"
    rows.write_text(json.dumps({"prompt": "1 + 1 =", "completion": "2"}) + "\n")
    one = session(tmp_path, f"data.eval.0={{path: {rows}}}")
    one.restore()
    one.save(2, False)
    one.finish()
    record = RunRecord("small", "done", one.parts.run.resolved(), "", data_hash=one.job.data_hash)
    one.storage.write_text("run.json", record.to_json())
    where = str(tmp_path / "small")
    assert "note:" not in evaluate_run(where)
    rows.write_text(json.dumps({"prompt": "1 + 2 =", "completion": "3"}) + "\n")
    assert "the held-out data is not what it was" in evaluate_run(where)


@pytest.mark.parametrize(
    ("asked", "status", "saves"),
    [
        (1, "interrupted", [(1, False)]),  # before the first step, or while it runs
        (2, "interrupted", [(2, True)]),  # evaluated first, as the whole run has it
        (3, "interrupted", [(2, True), (3, False)]),
        (4, "done", [(2, True), (4, True)]),  # nothing is left to be done
        (0, "done", [(2, True), (4, True)]),
    ],
)
def test_a_stop_ends_the_run_behind_the_step_in_which_it_is_seen(tmp_path, asked, status, saves):
    one = session(tmp_path, "optim.lr=1e-3", "train.eval_every=2", "train.save_every=2")
    one.restore()
    one.evaluate(0)
    saved: list[tuple[int, bool]] = []
    asking = iter(range(1, 9))
    hooks = LoopHooks(
        stop=lambda: next(asking) == asked,
        log=one.log,
        evaluate=one.evaluate,
        save=lambda step, best: saved.append((step, best)),
    )
    stepper = stepper_of(one.parts)
    assert train_loop(stepper, StepSchedule(4, 2, 2), one.progress, hooks) == status
    assert saved == saves and one.progress.step == saves[-1][0]
    assert not stepper.ahead or status == "interrupted"  # nothing is made for a step that never is
    one.abandon()


@pytest.mark.parametrize("seed", [0, 2**63 - 1])
def test_every_seed_of_the_config_can_be_used(seed, tmp_path):
    one = session(tmp_path, f"seed={seed}")
    assert one.restore() is None
    one.abandon()


@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_every_strategy_holds_the_model_to_its_logits(strategy, tmp_path, monkeypatch):
    """ZeRO-3 creates the model sharded: the check must come after, not be left out."""
    session(tmp_path / "good", f"strategy={strategy}", "data.packing=true").abandon()
    wrong = LogitMap(multiplier=2.0)
    monkeypatch.setattr("rayft.models.policy.logit_map", lambda config: wrong)
    with pytest.raises(ConfigError, match="changes its logits"):
        session(tmp_path / "bad", f"strategy={strategy}", "data.packing=true")


@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_a_second_run_in_one_process_has_a_group_of_its_own(strategy, tmp_path):
    for name in ("first", "second"):  # as scale.workers: 0 does it, twice
        if dist.is_initialized():
            dist.destroy_process_group()
        session(tmp_path / name, f"strategy={strategy}").abandon()


# --- damage ---


def small_run(folder: Path, *changes: str) -> Run:
    source = {"path": "builtin:docstrings", "samples": 4}
    base = {
        "name": "small",
        "model": {"path": "builtin:tiny"},
        "data": {"train": [source], "eval": [source | {"split": "heldout"}], "max_length": 64},
        "train": {"steps": 4, "global_batch": 2, "micro_batch": 2, "save_every": 2, "keep": 4},
        "scale": {"workers": 0, "gpus": 0},
        "storage": str(folder),
    }
    return load(base, changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of a run that is done, with commits of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("finished")
    train(small_run(folder))
    return folder


@pytest.fixture
def done(finished, tmp_path) -> tuple[Run, Path]:
    """A copy of it that this test may damage."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    return small_run(tmp_path), tmp_path / "small"


def commits(home: Path) -> list[str]:
    return [name for name in folder_names(Storage.open(str(home)))]


RECORDS = {
    "truncated": lambda data: data[: len(data) // 2],
    "not utf-8": lambda data: b"\xff\xfe" + data,
    "empty": lambda data: b"",
    "wrong types": lambda data: b'{"name": 3, "status": []}',
    "one bit": lambda data: data.replace(b'"attempts": 1', b'"attempts": 0'),
    "gone": None,
}


@pytest.mark.parametrize("what", RECORDS)
def test_run_json_is_made_anew_from_the_commits(what, done, capsys):
    run, home = done
    file, damage = home / "run.json", RECORDS[what]
    before = RunRecord.from_json(file.read_bytes())
    if damage is None:
        file.unlink()
    else:
        file.write_bytes(damage(file.read_bytes()))
    record = train(run)
    said = capsys.readouterr().err
    assert f"run.json is {'gone' if damage is None else 'damaged'}" in said
    assert "made anew from the checkpoint of step 4" in said and "not a checkpoint" not in said
    same = ("status", "steps", "steps_total", "eval", "base", "best", "data_hash", "tokens")
    assert all(vars(record)[name] == vars(before)[name] for name in same)
    assert record.attempts == 2 and RunRecord.from_json(file.read_bytes()) == record
    assert (home / "run.json.damaged").exists() == (what not in ("gone", "empty"))


def test_attempts_are_numbered_behind_the_checkpoints(done):
    """A lower number is refused by every save, as an older attempt of the run."""
    run, home = done
    shutil.rmtree(home / "checkpoints" / commits(home)[0])  # steps 3 and 4 are done again
    (home / "checkpoints" / "step-3-7xabc").mkdir()  # cut off while it saved
    (home / "run.json").unlink()
    record = train(run)
    assert (record.status, record.attempts) == ("done", 8)
    assert [folder_order(name)[:2] for name in commits(home)] == [(4, 8), (2, 1)]


def test_commits_of_another_config_are_refused_without_run_json(done):
    run, home = done
    (home / "run.json").unlink()
    with pytest.raises(ConfigError, match="are of another config"):
        train(small_run(home.parent, "optim.lr=0.5"))
    assert len(commits(home)) == 2


def damage_all(home: Path) -> None:
    for shard in home.glob("checkpoints/*/rank-0.safetensors"):
        data = bytearray(shard.read_bytes())
        data[-1] ^= 1
        shard.write_bytes(data)
    record = RunRecord.from_json((home / "run.json").read_bytes())
    (home / "run.json").write_text(replace(record, status="failed").to_json())


def test_a_run_whose_commits_are_all_damaged_stops_and_gives_the_choice(done, capsys):
    run, home = done
    damage_all(home)
    for _ in range(2):  # the same again, once they lie in .bad
        with pytest.raises(StorageError, match="every checkpoint of this run is damaged") as caught:
            train(run)
        assert caught.value.exit_code == 6 and "--restart" in caught.value.fix
    assert commits(home) == []
    metrics = (home / "metrics.jsonl").read_bytes()
    record = train(run, restart=True)
    assert (record.status, record.steps, record.attempts) == ("done", 4, 4)
    assert "beginning at step 0; 2 checkpoints are set aside" in capsys.readouterr().err
    (kept,) = home.glob("before-*/metrics.jsonl")
    assert kept.read_bytes() == metrics and (kept.parent / "run.json").is_file()
    assert len(list((home / "checkpoints/.bad").glob("step-*"))) == 2
    (home / "run.json").unlink()  # given up once, they are no reason to stop any more
    assert train(run).status == "done"


def test_restart_begins_a_good_run_again_too(done):
    run, home = done
    before = RunRecord.from_json((home / "run.json").read_bytes())
    assert train(run).attempts == 1  # done is done
    record = train(run, restart=True)
    assert record.attempts == 2 and record.eval == before.eval
    assert len(list((home / "checkpoints/.bad").glob("step-*"))) == 2


def test_a_trial_whose_commits_are_all_damaged_begins_again_by_itself(done, capsys):
    run, home = done
    damage_all(home)
    record = train(run, insist=False)
    assert record.status == "done" and "begun again at step 0" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["cut", "zeroed", "gone", "one bit"])
def test_a_run_that_goes_on_says_what_its_metrics_have_lost(what, done, capsys):
    run, home = done
    file, record = home / "metrics.jsonl", RunRecord.from_json((home / "run.json").read_bytes())
    (home / "run.json").write_text(replace(record, status="failed").to_json())
    data = bytearray(file.read_bytes())
    middle = data.index(b"\n", len(data) // 2) + 1
    if what == "gone":
        file.unlink()
    elif what == "one bit":
        data[middle + 9] ^= 4
        file.write_bytes(data)
    else:
        file.write_bytes(data[:middle] if what == "cut" else bytes(len(data)))
    assert train(run).status == "done"
    said = [line for line in capsys.readouterr().err.splitlines() if "metrics.jsonl" in line]
    assert len(said) == 1
    wanted = "is damaged and not used: line" if what == "one bit" else "its curve has a gap"
    assert wanted in said[0]


def test_a_whole_run_says_nothing_of_damage(done, capsys):
    run, home = done
    record = RunRecord.from_json((home / "run.json").read_bytes())
    (home / "run.json").write_text(replace(record, status="failed").to_json())
    with (home / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step":5,"spl')  # killed while it wrote
    assert train(run).status == "done"
    said = capsys.readouterr().err
    assert "warning" not in said and "damaged" not in said


def test_eval_and_export_name_a_damaged_record(done):
    _, home = done
    (home / "run.json").write_bytes(b"{")
    with pytest.raises(StorageError, match="run.json is damaged"):
        evaluate_run(str(home))
