"""Killed, out of space, damaged: the previous or the new checkpoint is always there, whole."""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rayft.checkpoint.manifest import BadCommit, CommitRecord, parse_manifest
from rayft.checkpoint.reader import find_commit, folder_names, load_commit
from rayft.core.errors import StorageError
from rayft.storage import failpoints
from rayft.storage.folder import Storage
from tests.contracts.saving import QUICK, assert_holds, prepared, save, shard, story, writers


@pytest.fixture
def run(tmp_path) -> Storage:
    return Storage.open(str(tmp_path), QUICK)


# -- killed, at every write


def counted(tmp_path: Path) -> dict[str, int]:
    """How often the story passes each failpoint."""
    folder = str(tmp_path / "count")
    prepared(folder)
    before = os.environ.get(failpoints.VARIABLE)
    try:
        story(folder, "*:count")
        return dict(failpoints.hits)
    finally:
        os.environ.pop(failpoints.VARIABLE)
        if before is not None:
            os.environ[failpoints.VARIABLE] = before


def test_every_declared_failpoint_is_hit(tmp_path):
    assert set(counted(tmp_path)) == set(failpoints.POINTS)


def test_kill_at_every_write_leaves_a_whole_checkpoint(tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.contracts.saving"])
    places = [(name, n) for name, count in counted(tmp_path).items() for n in range(1, count + 1)]
    assert len(places) > 60
    before, found = tmp_path / "before", set()
    prepared(str(before))
    for name, nth in places:
        folder = tmp_path / f"{name}-{nth}"
        shutil.copytree(before, folder)
        run = Storage.open(str(folder), QUICK)
        child = context.Process(target=story, args=(str(folder), f"{name}:kill:{nth}"))
        child.start()
        child.join(60)
        assert child.exitcode == -signal.SIGKILL, (name, nth)
        commit = find_commit(run)
        assert not (folder / "checkpoints" / ".bad").exists(), (name, nth)  # never a torn commit
        assert_holds(commit)
        found.add(commit.step)
        if nth == 1:  # the next attempt goes on, and cleans up
            save(writers(run, 2, attempt=3), 9)
            assert_holds(find_commit(run))
            assert (
                len([n for n in folder_names(run) if run.exists(f"checkpoints/{n}/COMMIT.json")])
                == 2
            )
            assert all(run.exists(f"checkpoints/{n}/COMMIT.json") for n in folder_names(run))
        shutil.rmtree(folder)
    assert found == {1, 2, 3, 4}


# -- storage that fails


@pytest.mark.parametrize("action", ["enospc:1", "enospc:1+", "oserror:1+", "oserror:1"])
@pytest.mark.parametrize("point", [p for p in failpoints.POINTS if "uncommit" not in p])
def test_failing_write_costs_only_that_checkpoint(run, monkeypatch, point, action):
    ranks = writers(run, 2, deadline=1.0)
    save(ranks, 1)
    failpoints.hits.clear()
    monkeypatch.setenv(failpoints.VARIABLE, f"{point}:{action}")
    errors = []
    for rank, writer in reversed(list(enumerate(ranks))):
        writer.save(2, shard(2, rank, 2), {"rank": rank, "step": 2})  # never raises
        with contextlib.suppress(StorageError):
            writer.wait(60)
        errors += [error for error in [writer.poll()] if error is not None]
    monkeypatch.delenv(failpoints.VARIABLE)
    hit = failpoints.hits[point] > 0
    harmless = point in ("checkpoint.committed", "checkpoint.delete") or action == "oserror:1"
    assert hit == (point != "checkpoint.delete")
    assert bool(errors) == (hit and not harmless)
    assert all(isinstance(error, StorageError) and error.exit_code == 6 for error in errors)
    assert all(writer.poll() is None for writer in ranks)
    commit = find_commit(run)
    assert commit.step == (1 if errors else 2)
    assert_holds(commit)
    save(ranks, 3)  # training went on
    assert_holds(find_commit(run))
    assert find_commit(run).step == 3


def test_a_shard_that_shrank_after_its_manifest_is_not_committed(run):
    """A write that storage lost: rank 0 looks at what lies there, not only at the promise."""
    first, second = writers(run, 2)
    second.save(1, shard(1, 1, 2), {})
    second.wait(60)
    path = "checkpoints/step-1-1/rank-1.safetensors"
    run.write_bytes(path, run.read_bytes(path)[:-1])
    first.save(1, shard(1, 0, 2), {})
    with pytest.raises(StorageError, match="is incomplete"):
        first.wait(60)
    assert find_commit(run) is None


def test_final_failure_is_raised(run, monkeypatch):
    ranks = writers(run, 2, deadline=0.2)
    save(ranks, 1)
    ranks[0].save(2, shard(2, 0, 2), {})  # rank 1 never comes
    with pytest.raises(StorageError, match=r"no manifest of ranks \[1\]"):
        ranks[0].wait(30)
    with pytest.raises(StorageError):
        ranks[0].wait(30)
    assert ranks[0].stats.failed == 1
    save(ranks, 2)  # the same step again, now complete
    assert_holds(find_commit(run))


# -- damaged bytes


FILES = [f"{kind}-{r}{end}" for r in (0, 1) for kind, end in (("rank", ".safetensors"),
         ("manifest", ".json"))] + ["COMMIT.json"]  # fmt: skip


@pytest.fixture(scope="module")
def two_commits(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    ranks = writers(Storage.open(str(folder)), 2)
    save(ranks, 1)
    save(ranks, 2)
    return folder


@pytest.mark.parametrize("file", FILES)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), cut=st.booleans())
def test_damage_anywhere_is_found_and_the_previous_is_used(two_commits, file, where, bit, cut):
    folder = two_commits.with_name(f"damaged-{random.getrandbits(64):x}")
    shutil.copytree(two_commits, folder)
    path = folder / "checkpoints" / "step-2-1" / file
    data = bytearray(path.read_bytes())
    place = int(where * len(data))
    if cut:
        del data[place:]
    else:
        data[place] ^= 1 << bit
    path.write_bytes(data)
    run = Storage.open(str(folder))
    with pytest.raises(BadCommit, match=file):
        load_commit(run, "step-2-1")
    commit = find_commit(run)
    assert commit.step == 1
    assert_holds(commit)
    assert (folder / "checkpoints" / ".bad" / "step-2-1" / file).exists()
    assert folder_names(run) == ["step-1-1"]
    shutil.rmtree(folder)


@pytest.mark.parametrize("file", FILES[:4])
def test_missing_file_is_found(run, file):
    ranks = writers(run, 2)
    save(ranks, 1)
    save(ranks, 2)
    run.delete(f"checkpoints/step-2-1/{file}")
    assert_holds(find_commit(run))
    assert find_commit(run).step == 1


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200) | json_values.map(lambda value: json.dumps(value).encode()))
def test_parsers_refuse_anything_else(data):
    with pytest.raises(BadCommit):
        CommitRecord.from_bytes(data)
    with pytest.raises(BadCommit):
        parse_manifest(data, "step-1-1", 0)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_sealed_record_of_wrong_types_is_refused(data):
    """Even when the seal is right (somebody recomputed it), wrong types are bad, never a crash."""
    good = CommitRecord(step=1, attempt="1", world=1, config="", parent=None, best=False,
                        created=0.0, manifests=[{"size": 1, "sha256": "0"}])  # fmt: skip
    assert CommitRecord.from_bytes(good.to_bytes()) == good
    body = json.loads(good.to_bytes())
    del body["sha256"]
    key = data.draw(st.sampled_from(sorted(set(body) - {"parent"})))
    value = data.draw(json_values.filter(lambda v: type(v) not in (type(body[key]), int, float)))
    forged = json.dumps({**body, key: value}).encode()[:-1]
    seal = b',"sha256":"%s"}\n' % hashlib.sha256(forged).hexdigest().encode()
    with pytest.raises(BadCommit):
        CommitRecord.from_bytes(forged + seal)


def test_deeply_nested_json_is_bad_not_a_crash():
    with pytest.raises(BadCommit):
        parse_manifest(b'{"extra":' + b"[" * 100_000, "step-1-1", 0)


def test_pickles_beside_the_shards_are_never_opened(run, tmp_path):
    touched = tmp_path / "touched"

    class Evil:
        def __reduce__(self):
            return Path.touch, (touched,)

    save(writers(run, 2), 1)
    evil = pickle.dumps(Evil())
    for name in ("optimizer.pt", "rank-2.safetensors", "manifest-2.json", "extra.pkl"):
        run.write_bytes(f"checkpoints/step-1-1/{name}", evil)
    assert_holds(find_commit(run))
    run.write_bytes("checkpoints/step-1-1/rank-0.safetensors", evil)
    assert find_commit(run) is None
    assert not touched.exists()
    pickle.loads(evil)
    assert touched.exists()  # the bait works
