"""A checkpoint is exact for every world size, kept as long as needed, and never mixed."""

from __future__ import annotations

import shutil
import threading

import pytest
import torch
from safetensors import safe_open

from rayft.checkpoint.reader import find_commit, folder_names, load_commit
from rayft.checkpoint.writer import CheckpointWriter
from rayft.core.errors import StorageError
from rayft.core.shards import ParamSlice, StateShard
from rayft.storage import failpoints
from rayft.storage.folder import Storage
from tests.contracts.s3 import s3_server
from tests.contracts.saving import QUICK, SHAPES, assert_holds, save, shard, writers


@pytest.fixture(scope="module")
def s3():
    with s3_server() as template:
        yield template


@pytest.fixture
def run(tmp_path) -> Storage:
    return Storage.open(str(tmp_path), QUICK)


@pytest.mark.parametrize("wrote", [1, 2, 5])
def test_any_world_reads_what_any_world_wrote(run, wrote):
    save(writers(run, wrote), 7)
    commit = find_commit(run)
    assert (commit.step, commit.world) == (7, wrote)
    for world in (1, 2, 3):
        assert_holds(commit, world)


def test_safetensors_library_opens_the_shard(run, tmp_path):
    save(writers(run, 2), 1)
    path = tmp_path / "checkpoints" / "step-1-1" / "rank-1.safetensors"
    expected = shard(1, 1, 2)
    with safe_open(path, framework="pt") as file:
        keys = {f"{k}:{n}" for n, piece in expected.slices.items() for k in piece.tensors}
        assert set(file.keys()) == keys | {"whole:rng"}
        assert torch.equal(file.get_tensor("param:w"), expected.slices["w"].tensors["param"])


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool]
)
def test_every_dtype_comes_back_bit_for_bit(run, dtype):
    live = torch.randint(0, 2, (11,)).to(dtype)
    odd = torch.ones(3, dtype=torch.uint8)
    writer = CheckpointWriter(run, 0, 1, 1)
    writer.save(1, StateShard({"p": ParamSlice((11,), 0, {"param": live})}, {"odd": odd}), {})
    writer.wait(30)
    with find_commit(run).reader() as reader:
        back = reader.read("p", "param", 2, 11)
        assert back.dtype == dtype and torch.equal(back, live[2:])
        assert reader.read("p", "param", 4, 4).shape == (0,)
        with pytest.raises(KeyError):
            reader.read("p", "exp_avg", 0, 1)
        with pytest.raises(ValueError, match=r"no elements \[0, 12\)"):
            reader.read("p", "param", 0, 12)


def test_gap_between_shards_is_an_error(run):
    writer = CheckpointWriter(run, 0, 1, 1)
    part = {"param": torch.ones(4)}
    writer.save(1, StateShard({"p": ParamSlice((11,), 2, part)}), {})
    writer.wait(30)
    with find_commit(run).reader() as reader, pytest.raises(StorageError, match="element 6 of p"):
        reader.read("p", "param", 3, 8)


def test_live_tensors_may_change_as_soon_as_save_returns(run):
    live = torch.arange(100_000.0)
    writer = CheckpointWriter(run, 0, 1, 1)
    for step in (1, 2, 3):
        writer.save(
            step, StateShard({"p": ParamSlice((100_000,), 0, {"param": live})}), {"s": step}
        )
        live += 1.0
    writer.wait(30)
    for name, added in (("step-2-1", 1.0), ("step-3-1", 2.0)):
        [(_, tensor)] = load_commit(run, name).consolidated()
        assert torch.equal(tensor, torch.arange(100_000.0) + added)


def test_numbers_json_does_not_know_survive(run):
    writer = CheckpointWriter(run, 0, 1, "0001k7", config="abc", parent="step-0-0")
    tensors = {"param": torch.ones(1)}
    extra = {"loss": float("inf"), "rng": [2**63, -1], "text": "ü\n", "none": None, "f": 0.1}
    writer.save(
        3, StateShard({"p": ParamSlice((1,), 0, tensors)}, {}, {"norm": float("inf")}), extra
    )
    writer.wait(30)
    commit = find_commit(run)
    assert commit.extra(0) == extra
    assert commit.manifests[0].scalars == {"norm": float("inf")}
    assert (commit.name, commit.record.config, commit.record.parent) == (
        "step-3-0001k7", "abc", "step-0-0",
    )  # fmt: skip


def test_second_save_waits_for_the_first_and_is_counted(run, monkeypatch):
    failpoints.hits.clear()
    monkeypatch.setenv(failpoints.VARIABLE, "checkpoint.commit:sleep:1")
    writer = CheckpointWriter(run, 0, 1, 1)
    writer.save(1, shard(1, 0, 1), {"rank": 0, "step": 1})
    with pytest.raises(StorageError, match="still being written"):
        writer.wait(0.05)
    quick = writer.stats.stall_seconds
    writer.save(2, shard(2, 0, 1), {"rank": 0, "step": 2})
    assert writer.stats.waited == 1 and writer.stats.stall_seconds > quick + 0.5
    writer.wait(30)
    assert folder_names(run) == ["step-2-1", "step-1-1"]
    assert_holds(find_commit(run), 1)


def test_object_store_round_trip_damage_and_retention(s3, monkeypatch):
    run = Storage.open(s3.format("run"), QUICK)
    ranks = writers(run, 2)
    for step in (1, 2, 3):
        save(ranks, step)
    assert folder_names(run) == ["step-3-1", "step-2-1"]
    assert_holds(find_commit(run))
    path = "checkpoints/step-3-1/rank-1.safetensors"
    data = bytearray(run.read_bytes(path))
    data[-1] ^= 1
    run.write_bytes(path, bytes(data))
    assert find_commit(run).step == 2
    assert run.exists("checkpoints/step-3-1/BAD.json")
    assert_holds(find_commit(run))
    monkeypatch.setenv(failpoints.VARIABLE, "checkpoint.shard.data:enospc:1+")
    for rank, writer in reversed(list(enumerate(ranks))):
        writer.save(4, shard(4, rank, 2), {})
        with pytest.raises(StorageError):
            writer.wait(30)
    monkeypatch.delenv(failpoints.VARIABLE)
    assert not [e for e in run.list("checkpoints/step-4-1") if e.name.endswith(".safetensors")]
    assert find_commit(run).step == 2
    save(ranks, 5)
    assert_holds(find_commit(run))


# -- retention and attempts


def test_retention_keeps_the_newest_and_the_best(run):
    ranks = writers(run, 2, keep=1)
    for step in range(1, 7):
        save(ranks, step, best=step in (2, 3))
    assert folder_names(run) == ["step-6-1", "step-5-1", "step-3-1"]
    assert_holds(load_commit(run, "step-3-1"))
    assert load_commit(run, "step-6-1").record.parent == "step-5-1"


def test_leftovers_go_when_nobody_can_write_them(run):
    for name in ("step-2-1", "step-9-1", "step-2-2", "step-9-2", "step-1-3"):
        run.write_text(f"checkpoints/{name}/rank-0.safetensors", "half")
    ranks = writers(run, 2, attempt=2, deadline=1.0)
    ranks[1].save(3, shard(3, 1, 2), {})
    ranks[1].wait(30)
    ranks[0].save(3, shard(3, 0, 2), {})
    with pytest.raises(StorageError, match="newer attempt"):
        ranks[0].wait(30)  # attempt 3 is running: this one is fenced off
    run.delete("checkpoints/step-1-3")
    save(ranks, 4)
    assert folder_names(run) == [
        "step-9-2",
        "step-4-2",
    ]  # this attempt's future step is not its to judge


def test_two_attempts_never_mix(run):
    old, new = writers(run, 2, attempt=1, deadline=0.2), writers(run, 2, attempt=2, deadline=0.2)
    old[1].save(5, shard(5, 1, 2), {"rank": 1, "step": 5})
    new[0].save(5, shard(5, 0, 2), {"rank": 0, "step": 5})
    with pytest.raises(StorageError, match="no manifest"):
        new[0].wait(30)
    old[1].wait(30)
    assert find_commit(run) is None
    new[1].save(5, shard(5, 1, 2), {"rank": 1, "step": 5})
    new[1].wait(30)
    new[0].save(5, shard(5, 0, 2), {"rank": 0, "step": 5})
    new[0].wait(30)
    assert find_commit(run).name == "step-5-2"
    assert_holds(find_commit(run))


def test_folder_copied_under_another_name_is_bad(run, tmp_path):
    save(writers(run, 2), 1)
    shutil.copytree(tmp_path / "checkpoints/step-1-1", tmp_path / "checkpoints/step-8-1")
    assert find_commit(run).step == 1


def test_readers_that_may_not_write_leave_bad_ones_alone(run):
    ranks = writers(run, 2)
    save(ranks, 1)
    save(ranks, 2)
    run.write_text("checkpoints/step-2-1/COMMIT.json", "{}")
    assert find_commit(run, set_bad_aside=False).step == 1
    assert folder_names(run) == ["step-2-1", "step-1-1"]


def test_ranks_write_at_the_same_time(run):
    ranks = writers(run, 4)
    jobs = [threading.Thread(target=ranks[r].save, args=(1, shard(1, r, 4), {"rank": r, "step": 1}))
            for r in range(4)]  # fmt: skip
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    for writer in ranks:
        writer.wait(30)
    assert_holds(find_commit(run))
    assert set(SHAPES) == set(find_commit(run).reader().shapes())


def test_an_object_that_changes_between_check_and_download_is_not_read(s3):
    run = Storage.open(s3.format("changed"), QUICK)
    save(writers(run, 1), 1)
    commit = load_commit(run, "step-1-1")
    path = "checkpoints/step-1-1/rank-0.safetensors"
    data = run.read_bytes(path)
    run.write_bytes(path, data[:-1] + bytes([data[-1] ^ 1]))
    with commit.reader() as reader, pytest.raises(StorageError, match="changed while it was read"):
        reader.whole(0)
