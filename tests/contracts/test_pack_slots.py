"""Many slots, and more trials than slots: turns change no number, and nothing grows with the trials
but what is theirs."""

from __future__ import annotations

import math
import resource
import threading

import pytest
import torch

from rayft.checkpoint.reader import find_commit
from rayft.trials import commit_queue
from rayft.trials.adapter_layout import LayerSize, layout_of
from rayft.trials.commit_queue import THREADS, CommitQueue, CommitThreads, OrderedWork
from rayft.trials.forward import PackedModel
from rayft.trials.memory import MemoryBudget, MemoryClaim, MemoryLoad
from rayft.trials.pack import Pack
from rayft.trials.rank_bucket import SPARE, BucketSet, TrialAdapter
from rayft.trials.slot_table import OTHER_FILES, allow_files
from rayft.trials.types import NoRoom
from tests.packs import CPU, Lab, finish, home_of, losses, record

DROP = "methods.0.dropout=0.2"
SEVEN = {
    "a": (DROP,),
    "b": ("seed=1",),
    "c": ("methods.0.rank=16", DROP, "seed=2"),
    "d": ("methods.0.dora=true", "seed=3"),
    "e": (DROP, "seed=4", "train.micro_batch=2"),
    "f": ("optim.lr=5e-3", "seed=5"),
    "g": (DROP, "seed=6"),
}


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Lab:
    return Lab(tmp_path_factory.mktemp("lab"), "train.eval_every=2", "optim.warmup=2.0", steps=4)


def test_trials_that_take_turns_have_the_losses_of_their_own_runs(lab):
    """Every trial pauses once, with others beside it before and after."""
    turns = [lab.run(n, *c, where="turns") for n, c in SEVEN.items()]
    alone = [lab.run(n, *c, where="alone") for n, c in SEVEN.items()]
    pack = lab.pack(*turns, slots=3, waiting=4)
    assert pack.parked == ("d", "e", "f", "g") and not pack.free
    pack.step()
    assert pack.parked == ("d", "e", "f", "g")
    told = pack.step()
    assert [one.trial for one in told] == ["a", "b", "c"]
    assert pack.parked == ("g", "a", "b", "c")  # three slots went to those who waited longest
    ends = [one for one in finish(pack) if one.status == "done"]
    assert sorted(one.trial for one in ends) == [*SEVEN] and {one.step for one in ends} == {4}
    for ours, theirs in zip(turns, alone, strict=True):
        lab.solo(theirs)
        for split in ("train", "eval"):
            assert losses(ours, split) == pytest.approx(losses(theirs, split), rel=1e-5), ours.name


def test_a_pause_alone_in_its_slot_changes_no_bit(lab):
    """Packed with nobody, so even the rounding is the same."""
    one, two = (lab.run("bits", DROP, where=where) for where in ("still", "paused"))
    finish(lab.pack(one))
    pack = lab.pack(two)
    for _ in range(4):
        told = pack.step()
        if not told or told[0].status == "running":
            pack.park("bits")
            assert pack.parked == ("bits",) and pack.step() == []
            assert not pack._model.buckets.all
            pack.resume("bits")
    assert losses(one) == losses(two) and losses(one, "eval") == losses(two, "eval")


def test_a_parked_trial_is_committed_leaves_and_survives_as_others(lab):
    runs = [lab.run(name, "seed=9", where="parked") for name in ("in", "out", "third")]
    pack = lab.pack(*runs, slots=1, waiting=2)
    for _ in range(2):
        pack.step()
    assert pack.parked == ("third", "in")  # "in" has done its turn
    pack._table.all["in"].commits.settle()
    assert find_commit(home_of(runs[0])).step == 2  # its best state does not wait
    pack.commit("third")
    pack.leave("third", keep=True).result()
    assert record(runs[2]).status == "interrupted" and find_commit(home_of(runs[2])).step == 0
    pack.step()  # and no more: the process is killed; "out" was in its first turn
    again = lab.pack(slots=1, waiting=2)
    assert [again.admit(lab.job(run, attempt=2)) for run in runs] == [2, 0, 0]
    finish(again)
    alone = lab.run("in", "seed=9", where="parked-alone")
    lab.solo(alone)
    for run in runs:
        assert losses(run) == pytest.approx(losses(alone), rel=1e-5)


def test_not_a_number_frees_a_slot_and_touches_no_parked_trial(lab):
    runs = [lab.run(name, f"seed={index}", where="nan") for index, name in enumerate("xyz")]
    pack = lab.pack(*runs, slots=1, waiting=2)
    before = {name: pack._table.all[name].adapter.flat() for name in pack.parked}
    with torch.no_grad():
        pack._table.all["x"].adapter.params["lora_B"].fill_(math.nan)
    told = pack.step()
    assert [(one.trial, one.status) for one in told] == [("x", "diverged")]
    assert pack.parked == ("z",)
    assert all(torch.equal(pack._table.all[n].adapter.flat(), flat) for n, flat in before.items())
    assert {one.trial for one in finish(pack) if one.status == "done"} == {"y", "z"}


def test_the_places_to_wait_in_are_counted(lab):
    pack = lab.pack(lab.run("p1"), lab.run("p2"), slots=1, waiting=1)
    with pytest.raises(NoRoom, match="all 1 slots and 1 places to wait in"):
        pack.admit(lab.job(lab.run("p3")))
    pack.park("p1")
    assert pack.parked == ("p1",)
    for _ in range(3):  # past an evaluation
        pack.step()
    assert pack.parked == ("p1",)  # it takes no turns until it is resumed
    pack.leave("p2", keep=False).result()
    assert pack.step() == [] and pack.trials == ("p1",)
    pack.resume("p1")
    assert pack.parked == ()
    pack.close()


def test_many_trials_may_have_their_files_open():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
        allow_files(100)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (100 + OTHER_FILES, before[1])
        allow_files(10)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 100 + OTHER_FILES  # never fewer
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_parked_trials_need_no_gradients_and_no_activations():
    claim = MemoryClaim(100, 2, 10, 8, (False, False))
    load = MemoryLoad([claim] * 10)
    budget = MemoryBudget(CPU, base=0, limit=0, per_token=3.0, slots=4)
    assert budget.need(load) == 4 * 1600 + 6 * 1200 + 3 * 4 * 20
    assert budget.need_host(load) == 0  # it is the same memory
    gpu = MemoryBudget(torch.device("cuda"), base=0, limit=0, per_token=3.0, slots=4)
    assert gpu.need(load) == 4 * 1600 + 3 * 4 * 20 and gpu.need_host(load) == 6 * 1200
    load.add(MemoryClaim(300, 2, 10, 8, (False, False)))  # four as large, as far as is known
    assert gpu.need(load) == 16 * 4 * 300 + 3 * 4 * 20
    cut = MemoryBudget(CPU, base=0, limit=0, per_token=3.0, pass_tokens=50)
    assert cut.need(MemoryLoad([claim] * 10)) == 10 * 1600 + 3 * 50
    load.remove(MemoryClaim(300, 2, 10, 8, (False, False)))
    assert budget.need(load) == budget.need(MemoryLoad([claim] * 10))


def test_joining_costs_the_same_however_many_are_in():
    """Rows copied because a bucket grows or shrinks. When each one that came or went stacked all
    anew it was n (n - 1) / 2."""
    layers = (LayerSize("layer", 3, 5),)
    buckets, layout = BucketSet(layers, CPU, torch.float32), layout_of(layers, 8, True)
    norms = [torch.rand(5) for _ in range(300)]
    members = [TrialAdapter(8, float(n), 0.0, layout, 1, norms=(norms[n],)) for n in range(300)]
    rows = torch.rand(300, layout.size)
    for adapter, row in zip(members, rows, strict=True):
        buckets.add(adapter, row)
    (bucket,) = buckets.all.values()
    assert bucket.copied <= SPARE * 300
    assert len(bucket._params) <= 300 + 300 / SPARE + 1
    for number in range(0, 300, 2):
        buckets.drop(members[number])
    kept = {adapter: number for number, adapter in enumerate(members) if number % 2}
    assert len(bucket._params) <= 150 + 2 * (150 / SPARE + 1)
    assert {adapter for adapter, _ in buckets.places().items()} == kept.keys()
    for adapter, (_, place) in buckets.places().items():
        number = kept[adapter]
        assert torch.equal(adapter.flat(), rows[number])
        assert torch.equal(bucket.params[place], rows[number])
        assert bucket.scaling[place].item() == number
        assert torch.equal(bucket.norms[0][place], norms[number])
        bucket.grads[place] = number  # and its parameters see them
        assert all(torch.all(param.grad == number) for param in adapter.params.values())
    assert torch.equal(members[0].flat(), rows[0]) and members[0].params["lora_A"].grad is None


def test_a_step_of_many_trials_takes_several_passes(lab, monkeypatch):
    """Each has few tokens, and the losses are those of one pass."""
    whole = [lab.run(f"w{number}", DROP, where="whole") for number in range(4)]
    parts = [lab.run(f"w{number}", DROP, where="parts") for number in range(4)]
    finish(lab.pack(*whole))
    pack, sizes = lab.pack(*parts), []
    pack._model.pass_tokens = 2 * 4 * pack._longest
    train = PackedModel.train

    def watched(model, trials, totals):
        sizes.append(len(trials))
        return train(model, trials, totals)

    monkeypatch.setattr(PackedModel, "train", watched)
    finish(pack)
    assert set(sizes) == {2} and len(sizes) == 2 * 4
    for one, other in zip(whole, parts, strict=True):
        assert losses(one) == pytest.approx(losses(other), rel=1e-5)


def test_commits_of_all_trials_share_threads_and_keep_their_order():
    threads, done = CommitThreads(), []
    queues = [OrderedWork(threads) for _ in range(100)]
    futures = [
        queue.submit(lambda pair=(number, turn): done.append(pair))
        for turn in range(5)
        for number, queue in enumerate(queues)
    ]

    def fails() -> None:
        raise ValueError("of this one alone")

    bad = queues[0].submit(fails)
    after = queues[0].submit(lambda: None)
    for future in (*futures, after):
        future.result()
    with pytest.raises(ValueError, match="of this one alone"):
        bad.result()
    for number in range(100):
        assert [turn for one, turn in done if one == number] == [0, 1, 2, 3, 4]


def test_a_commit_nobody_asked_for_waits_while_storage_is_behind(lab, monkeypatch):
    """Else the states of all trials would wait in memory."""
    monkeypatch.setattr(commit_queue, "EVERY", 0.0)
    pack, go = lab.pack(lab.run("behind")), threading.Event()
    commits = pack._table.all["behind"].commits
    assert isinstance(commits, CommitQueue) and commits.due
    others = [OrderedWork(commits._threads).submit(lambda: bool(go.wait())) for _ in range(THREADS)]
    assert not commits.due
    go.set()
    for future in others:
        future.result()
    pack.close()


def test_a_trial_leaves_no_buffer_behind_its_commit(lab):
    run = lab.run("buffer")
    pack: Pack = lab.pack(run)
    pack.step()
    pack.commit("buffer")
    assert pack._table.all["buffer"].session.writer._staging.size < 1000
    pack.close()
