"""Pack: trials join and leave without touching the others, and leave what their own run would."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from rayft.checkpoint.reader import find_commit, folder_names
from rayft.compose.offline import evaluate_run, export_run
from rayft.core.errors import ConfigError, InfeasibleError
from rayft.trials.pack import Pack
from rayft.trials.report_replay import missed_reports
from rayft.trials.types import NoRoom
from tests.packs import Lab, Silent, finish, home_of, losses, record

WILD = ("optim.clip=null", "optim.warmup=0.0", "optim.schedule=constant")
DROP = ("methods.0.dropout=0.2", "seed=3")


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Lab:
    return Lab(tmp_path_factory.mktemp("lab"), "train.eval_every=4", steps=8)


def rows(pack: Pack, trial: str) -> torch.Tensor:
    return pack._table.all[trial].adapter.flat()


def poison(pack: Pack, trial: str) -> None:
    with torch.no_grad():
        pack._table.all[trial].adapter.params["lora_B"].fill_(math.nan)
    for bucket in pack._model.buckets.all.values():
        bucket.updated()


def test_a_trial_that_is_not_a_number_leaves_and_changes_no_bit_of_the_others(lab):
    """In the same bucket, and in the same rows of the base."""
    changes = {"a": (), "b": (), "c": ("seed=7",), "d": DROP}
    clean = lab.pack(*[lab.run(n, *c, where="clean") for n, c in changes.items()])
    dirty = lab.pack(*[lab.run(n, *c, where="dirty") for n, c in changes.items()])
    for pack in (clean, dirty):
        pack.step()
    poison(dirty, "b")
    clean.step()
    told = dirty.step()
    assert [(t.trial, t.status) for t in told] == [("b", "diverged")]
    assert "not a number" in told[0].error
    assert dirty.trials == ("a", "c", "d") and dirty.free == 29
    for trial in dirty.trials:
        assert torch.equal(rows(clean, trial), rows(dirty, trial)), trial
    gone = record(lab.run("b", where="dirty"))
    assert gone.status == "diverged" and "not a number" in gone.error
    for pack in (clean, dirty):
        pack.close()


def test_joining_and_leaving_change_nothing_for_those_who_stay(lab):
    stays = lab.run("stays", *DROP, where="moved")
    pack = lab.pack(stays, lab.run("first-out", where="moved"))
    pack.step()
    pack.admit(lab.job(lab.run("wide", "methods.0.rank=64", where="moved")))
    pack.step()
    pack.leave("first-out", keep=False)
    pack.admit(lab.job(lab.run("late", "methods.0.dora=true", where="moved")))
    finish(pack)
    for name, changes in (("stays", DROP), ("late", ("methods.0.dora=true",))):
        ours = lab.run(name, *changes, where="moved")
        alone = lab.run(name, *changes, where="moved-alone")
        lab.solo(alone)
        assert losses(ours) == pytest.approx(losses(alone), rel=1e-5)
    left = lab.run("first-out", where="moved")
    assert record(left).status == "interrupted" and not folder_names(home_of(left))
    assert len(losses(left)) == 2


def test_a_trial_continues_from_its_commit_as_if_nothing_had_happened(lab):
    whole = [lab.run(n, *c, where="whole") for n, c in (("x", DROP), ("y", ("seed=4",)))]
    cut = [lab.run(n, *c, where="cut") for n, c in (("x", DROP), ("y", ("seed=4",)))]
    finish(lab.pack(*whole))
    pack = lab.pack(*cut)
    for _ in range(5):
        pack.step()
    pack.close()
    assert [record(run).status for run in cut] == ["interrupted"] * 2
    again = lab.pack()
    assert [again.admit(lab.job(run, attempt=2)) for run in cut] == [5, 5]
    finish(again)
    for one, other in zip(whole, cut, strict=True):
        assert losses(one) == losses(other)
        assert losses(one, "eval") == losses(other, "eval")
        assert record(one).best.metric == record(other).best.metric


def test_a_killed_pack_is_replayed_from_its_last_commit(lab, monkeypatch):
    run = lab.run("killed", *DROP)
    pack = lab.pack(run)
    for _ in range(3):
        pack.step()
    where = pack.commit("killed")
    assert Path(where).name == "step-3-1x3" and find_commit(home_of(run)).step == 3
    pack.step()  # and no more: what it holds in memory is lost
    again = lab.pack()
    assert again.admit(lab.job(run, attempt=2)) == 3
    finish(again)
    alone = lab.run("killed", *DROP, where="killed-alone")
    lab.solo(alone)
    assert losses(run) == pytest.approx(losses(alone), rel=1e-5)


def test_what_a_trial_said_before_its_commit_can_be_read_again(lab):
    run = lab.run("said")
    pack = lab.pack(run)
    said = [told for _ in range(6) for told in pack.step()]
    pack.close()
    home = home_of(run)
    again = missed_reports(home, 0, 6)
    assert [told.step for told in again] == [told.step for told in said] == [4]
    for one, other in zip(said, again, strict=True):
        missing = {"seconds", "memory"}
        assert other.metrics == {k: v for k, v in one.metrics.items() if k not in missing}
    assert missed_reports(home, 4, 6) == missed_reports(home, 0, 3) == []
    finish(lab.pack(run))
    assert [told.step for told in missed_reports(home, 0, 8)] == [
        4
    ]  # the last one is told as its end


def test_a_trial_whose_files_cannot_be_written_fails_alone(lab):
    doomed, fine = lab.run("doomed", where="torn"), lab.run("fine", where="torn")
    alone = lab.run("fine", where="torn-alone")
    pack = lab.pack(doomed, fine)
    pack.step()
    home = Path(home_of(doomed).uri)
    home.rename(home.with_name("elsewhere"))
    home.write_text("no folder")
    ends = {told.trial: told for told in finish(pack) if told.status != "running"}
    assert (ends["doomed"].status, ends["fine"].status) == ("failed", "done")
    assert "storage error" in ends["doomed"].error
    finish(lab.pack(alone))
    assert losses(fine) == losses(alone) and record(fine).status == "done"


def test_the_folder_is_that_of_a_run(lab):
    """`rayft train` continues it; `rayft eval` and `rayft export` take it."""
    run, alone = lab.run("moves", *DROP), lab.run("moves", *DROP, where="moves-alone")
    pack = lab.pack(run)
    for _ in range(3):
        pack.step()
    pack.close()
    lab.solo(run, attempt=2)
    lab.solo(alone)
    assert losses(run) == pytest.approx(losses(alone), rel=1e-5)

    back = lab.run("back", *DROP)  # and a pack continues what a run of its own began
    lab.solo(back, signals=Silent(stop_at=4))
    pack = lab.pack()
    assert pack.admit(lab.job(back, attempt=2)) == 4
    finish(pack)
    assert losses(back) == pytest.approx(losses(alone), rel=1e-5)
    where = home_of(back).uri
    assert "checkpoint of step 8" in export_run(where)
    text, wanted = evaluate_run(where), record(back).eval["eval_loss"]
    assert f"{wanted:.4f}" in text


def test_a_trial_that_is_done_leaves_its_best_step(lab):
    run = lab.run("best", *WILD, "optim.lr=0.05", "seed=1", "train.eval_every=1")
    pack = lab.pack(run, divergence=1e9)
    told = finish(pack)
    best = min(told, key=lambda one: one.metrics["eval_loss"])
    kept = record(run)
    assert kept.status == "done" and kept.steps == 8
    assert best.step < 8, "the case must overshoot"
    assert (kept.best.step, kept.best.metric) == (best.step, best.metrics["eval_loss"])
    assert kept.best.checkpoint in folder_names(home_of(run))
    wanted = {"loss", "base_loss", "tokens", "seconds", "params_trainable", "memory", "eval_ppl"}
    assert wanted <= told[-1].metrics.keys()
    assert told[-1].metrics["base_loss"] == pack.base["eval_loss"]


def test_a_loss_far_above_the_start_is_diverged(lab):
    run = lab.run("far", *WILD, "optim.lr=2.0", "train.eval_every=2")
    told = finish(lab.pack(run, lab.run("near"), divergence=1.01))[0]
    assert (told.trial, told.status, told.step) == ("far", "diverged", 2)
    assert "1.01 times the base model's" in told.error
    assert record(run).status == "diverged" and not folder_names(home_of(run))
    assert record(lab.run("near")).status == "done"


def test_a_clone_continues_from_its_donor(lab):
    donor, clone = lab.run("donor"), lab.run("clone", "optim.lr=1e-3", "seed=9")
    pack = lab.pack(donor)
    for _ in range(4):
        pack.step()
    where = pack.commit("donor")
    assert pack.admit(lab.job(clone), source=where) == 4
    assert torch.equal(rows(pack, "donor"), rows(pack, "clone"))
    assert find_commit(home_of(clone)).step == 4
    told = [one for one in finish(pack) if one.trial == "clone"]
    assert [one.step for one in told] == [8] and told[0].status == "done"
    assert len(losses(clone)) == 4 and losses(clone)[0] != losses(donor)[4]


def test_no_slot_no_memory_and_strangers_are_refused(lab, tmp_path):
    pack = lab.pack(lab.run("in"), slots=1)
    with pytest.raises(NoRoom, match="all 1 slots"):
        pack.admit(lab.job(lab.run("more")))
    with pytest.raises(ConfigError, match=r"methods\.0\.targets"):
        pack.admit(lab.job(lab.run("other", "methods.0.targets=[q_proj]")))
    with pytest.raises(ConfigError, match="not one lora"):
        lab.pack(lab.run("all", "methods=[{kind: full}]"))
    stats = pack.stats()
    pack.close()
    need = pack._budget.base
    with pytest.raises(InfeasibleError, match="GiB"):
        lab.pack(lab.run("big"), memory=need + 1000)
    tight = lab.pack(lab.run("one"), memory=need + (16 << 20))
    with pytest.raises(NoRoom, match="GiB"):
        for number in range(20):
            tight.admit(lab.job(lab.run(f"n{number}", "methods.0.rank=32")))
    assert 0 < len(tight.trials) < 20
    tight.close()
    assert stats["alone_step_seconds"] > 0 and stats["start_seconds"] > 0
    assert {"slots", "steps", "busy", "seconds", "tokens", "memory"} <= stats.keys()


def test_measuring_the_first_trial_leaves_no_trace(lab):
    run, alone = lab.run("dropped", *DROP), lab.run("dropped", *DROP, where="dropped-alone")
    pack = lab.pack(run)
    pack.step()
    pack.close()
    lab.solo(alone)
    assert losses(run)[0] == pytest.approx(losses(alone)[0], rel=1e-6)
