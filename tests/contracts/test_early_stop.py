"""A trial that is stopped early while its commit is under way: nobody else waits for it, and a
commit whose files are taken from under it fails at once."""

from __future__ import annotations

import shutil
import time

import pytest

from rayft.checkpoint import writer as checkpoint
from rayft.checkpoint.reader import find_commit, folder_names
from rayft.core.errors import StorageError
from rayft.storage import failpoints
from rayft.storage.folder import Storage
from tests.contracts.saving import QUICK, shard, writers
from tests.packs import Lab, home_of, record


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Lab:
    return Lab(tmp_path_factory.mktemp("lab"), "train.eval_every=4", steps=8)


@pytest.fixture
def gathering(monkeypatch):
    """The next commit of this process stands for a second between its manifest and its gathering;
    returns once it does."""
    failpoints.hits.clear()
    monkeypatch.setenv(failpoints.VARIABLE, "checkpoint.gather:sleep:1")

    def reached() -> None:
        end = time.monotonic() + 20
        while not failpoints.hits["checkpoint.gather"]:
            assert time.monotonic() < end, "no commit began"
            time.sleep(0.001)

    return reached


def test_a_commit_whose_files_are_deleted_fails_at_once(tmp_path, gathering):
    """It used to wait ten minutes for a manifest that it had written itself."""
    run = Storage.open(str(tmp_path), QUICK)
    (writer,) = writers(run, 1)
    writer.save(1, shard(1, 0, 1), {})
    gathering()
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(StorageError, match="step 1 was deleted while it was written"):
        writer.wait(20)
    writer.save(2, shard(2, 0, 1), {})
    writer.wait(20)
    assert find_commit(run).step == 2


def test_other_ranks_get_what_this_one_took_and_a_little_more(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "PATIENCE", 0.3)
    first, _ = writers(Storage.open(str(tmp_path), QUICK), 2)
    began = time.monotonic()
    first.save(1, shard(1, 0, 2), {})
    with pytest.raises(StorageError, match=r"no manifest of ranks \[1\]"):
        first.wait(30)
    assert 0.3 <= time.monotonic() - began < 20


@pytest.mark.parametrize("keep", [True, False])
def test_nobody_waits_for_the_files_of_a_trial_that_leaves(lab, gathering, keep):
    """Its commit is under way; the others train on, and whoever asked learns when it has left."""
    where = f"leaves-{keep}"
    pack = lab.pack(lab.run("stopped", where=where), lab.run("stays", where=where))
    pack.step()
    slot = pack._table.all["stopped"]
    slot.commits.write(slot.snapshot(best=False))
    gathering()
    gone = pack.leave("stopped", keep=keep)
    pack.step()
    assert not gone.done() and pack.trials == ("stays",)
    gone.result(20)
    home = home_of(lab.run("stopped", where=where))
    assert record(lab.run("stopped", where=where)).status == "interrupted"
    assert [name for name in folder_names(home)] == (["step-1-1x0"] if keep else [])
    pack.close()


def test_commits_that_wait_are_not_written_for_a_trial_without_a_future(lab, gathering):
    pack = lab.pack(lab.run("waits"))
    slot = pack._table.all["waits"]
    for _ in range(3):
        pack.step()
        slot.commits.write(slot.snapshot(best=False))
    gathering()
    pack.leave("waits", keep=False).result(20)
    assert failpoints.hits["checkpoint.gather"] == 1


def test_files_that_vanish_under_a_pack_stop_nobody(lab, gathering):
    """As a driver did that cleared a loser before it had left."""
    pack = lab.pack(lab.run("loser"), lab.run("winner"))
    pack.step()
    slot = pack._table.all["loser"]
    slot.commits.write(slot.snapshot(best=False))
    gathering()
    home_of(lab.run("loser")).delete("checkpoints")
    began = time.monotonic()
    gone = pack.leave("loser", keep=True)
    pack.step()
    gone.result(20)  # its state was written again
    pack.close()
    assert time.monotonic() - began < 20
    assert find_commit(home_of(lab.run("loser"))).step == 1
    assert find_commit(home_of(lab.run("winner"))).step == 2
