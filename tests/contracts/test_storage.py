"""Storage keeps one contract on a local folder and on S3 (moto's server speaks the protocol)."""

from __future__ import annotations

import errno
import json
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from rayft.core.errors import StorageError
from rayft.records.series import latest_rows, read_series
from rayft.storage import failpoints
from rayft.storage.folder import Storage, probe
from rayft.storage.jsonl import LineAppender, read_jsonl
from rayft.storage.retry import RetryPolicy, is_transient
from tests.contracts.s3 import s3_server

QUICK = RetryPolicy(attempts=3, first=0.001, longest=0.002)


@pytest.fixture(scope="module")
def s3():
    with s3_server() as template:
        yield template


@pytest.fixture(params=["local", "s3"])
def storage(request, tmp_path) -> Storage:
    if request.param == "local":
        return Storage.open(str(tmp_path / "run"), QUICK)
    template = request.getfixturevalue("s3")
    return Storage.open(template.format(request.node.name.replace("[", "-").strip("]")), QUICK)


def listed(storage: Storage, path: str = "", recursive: bool = False) -> dict[str, int]:
    return {e.name: e.size for e in storage.list(path, recursive) if not e.folder}


def test_what_is_written_is_read_listed_and_deleted(storage, tmp_path):
    storage.write_text("a/b/one.txt", "eins")
    storage.write_bytes("a/two.bin", b"\0" * 10)
    storage.write_text("a/b/one.txt", "einszwei")  # replaces
    assert storage.read_text("a/b/one.txt") == "einszwei"
    assert listed(storage, "a") == {"two.bin": 10}
    assert [e.name for e in storage.list("a") if e.folder] == ["b"]
    assert listed(storage, "a", recursive=True) == {"b/one.txt": 8, "two.bin": 10}
    assert storage.exists("a") and storage.exists("a/two.bin") and not storage.exists("c")
    assert storage.download("a/two.bin", tmp_path / "x" / "copy").read_bytes() == b"\0" * 10
    storage.delete("a/two.bin")
    storage.delete("a/two.bin")  # nothing to do
    assert not storage.exists("a/two.bin")
    storage.delete("a")
    assert listed(storage, recursive=True) == {}
    assert storage.list("missing") == []


def test_a_folder_may_be_deleted_by_two_at_once(tmp_path):
    """As an early stop and the retention of checkpoints do."""
    storage = Storage.open(str(tmp_path))
    for number in range(300):
        (tmp_path / "folder" / str(number % 3)).mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / str(number % 3) / str(number)).touch()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: storage.delete("folder"), range(4)))
    assert not storage.exists("folder")


def test_missing_file_is_file_not_found(storage):
    with pytest.raises(FileNotFoundError):
        storage.read_bytes("none")
    with pytest.raises(FileNotFoundError):
        storage.open_input("none")


def test_streams(storage):
    data = bytes(range(256)) * 50_000  # 12.8 MB: more than one upload part
    with storage.open_output("big/file") as file:
        for start in range(0, len(data), 1 << 20):
            file.write(data[start : start + (1 << 20)])
    with storage.open_input("big/file") as file:
        file.seek(1000)
        assert file.read(500) == data[1000:1500]
    assert storage.read_bytes("big/file") == data


def test_child_and_pickle_name_the_same_place(storage):
    child = storage.child("x", "y")
    child.write_text("f", "1")
    assert storage.read_text("x/y/f") == "1"
    assert Storage.open(child.uri).read_text("f") == "1"
    assert pickle.loads(pickle.dumps(child)).read_text("f") == "1"
    assert (child.local_path("f") is not None) == child.is_local
    probe(child)
    assert listed(child) == {"f": 1}


def test_appended_lines_come_back_in_order_over_restarts(storage):
    for attempt in range(3):
        with LineAppender(storage, "m/metrics.jsonl", every=0.0, part_bytes=60) as log:
            for step in range(10):
                log.append({"attempt": attempt, "step": step})
    rows = read_jsonl(storage, "m/metrics.jsonl")
    assert rows == [{"attempt": a, "step": s} for a in range(3) for s in range(10)]
    assert read_jsonl(storage, "m/none.jsonl") == []


def test_flush_makes_lines_readable_before_close(storage):
    log = LineAppender(storage, "metrics.jsonl", every=3600)
    log.append({"step": 1})
    log.flush()
    assert read_jsonl(storage, "metrics.jsonl") == [{"step": 1}]
    log.append({"step": 2})
    log.close()
    assert len(read_jsonl(storage, "metrics.jsonl")) == 2


def test_local_line_is_readable_at_once(tmp_path):
    run = Storage.open(str(tmp_path))
    log = LineAppender(run, "metrics.jsonl", every=3600)
    log.append({"step": 1})
    assert read_jsonl(run, "metrics.jsonl") == [{"step": 1}]  # neither flushed nor closed
    log.close()


def test_torn_last_line_is_ignored_and_never_joined(tmp_path):
    run = Storage.open(str(tmp_path))
    whole = [json.dumps({"step": s}) for s in range(3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(whole) + '\n{"step": 3, "lo')
    assert [row["step"] for row in read_jsonl(run, "metrics.jsonl")] == [0, 1, 2]
    with LineAppender(run, "metrics.jsonl") as log:
        log.append({"step": 3})
    assert [row["step"] for row in read_jsonl(run, "metrics.jsonl")] == [0, 1, 2, 3]


def test_steps_logged_again_replace_the_earlier_rows(tmp_path):
    run = Storage.open(str(tmp_path))
    with LineAppender(run, "metrics.jsonl") as log:
        for step, loss in [(1, 9.0), (2, 8.0), (3, 7.0), (2, 1.0), (3, 2.0)]:
            log.append({"step": step, "split": "train", "loss": loss})
        log.append({"step": 2, "split": "eval", "loss": 5.0, "task": "chat"})
        log.append({"note": "belongs to no step"})
    rows = [(row["step"], row["split"], row["loss"]) for row in read_series(run)]
    assert rows == [(1, "train", 9.0), (2, "train", 1.0), (2, "eval", 5.0), (3, "train", 2.0)]
    assert latest_rows([]) == []


@pytest.mark.parametrize("point", [p for p in failpoints.POINTS if p.startswith("storage.write.")])
def test_full_disk_leaves_the_old_file(tmp_path, monkeypatch, point):
    run = Storage.open(str(tmp_path), QUICK)
    run.write_text("f", "old")
    monkeypatch.setenv(failpoints.VARIABLE, f"{point}:enospc:1")
    failpoints.hits.clear()
    with pytest.raises(StorageError) as caught:
        run.write_text("f", "new")
    assert str(tmp_path / "f") in str(caught.value) and "No space left" in str(caught.value)
    assert caught.value.exit_code == 6
    monkeypatch.delenv(failpoints.VARIABLE)
    assert run.read_text("f") == ("new" if point == "storage.write.done" else "old")
    assert [path.name for path in tmp_path.iterdir()] == ["f"]  # no temporary file left


def test_transient_error_is_tried_again_and_bounded(tmp_path, monkeypatch):
    run = Storage.open(str(tmp_path), QUICK)
    monkeypatch.setenv(failpoints.VARIABLE, "storage.write.sync:oserror:1")
    failpoints.hits.clear()
    run.write_text("f", "once")
    assert run.read_text("f") == "once" and failpoints.hits["storage.write.sync"] == 2
    monkeypatch.setenv(failpoints.VARIABLE, "storage.write.sync:oserror:1+")
    failpoints.hits.clear()
    with pytest.raises(StorageError, match="Input/output error"):
        run.write_text("f", "never")
    assert failpoints.hits["storage.write.sync"] == QUICK.attempts
    assert run.read_text("f") == "once"


def test_what_is_transient():
    assert is_transient(OSError(errno.EIO, "io")) and is_transient(OSError(errno.ESTALE, "nfs"))
    assert not is_transient(OSError(errno.EROFS, "read-only"))
    assert is_transient(OSError("AWS Error SLOW_DOWN during PutObject: please reduce"))
    assert not is_transient(OSError("AWS Error ACCESS_DENIED during PutObject"))
    assert not is_transient(OSError("AWS Error UNKNOWN (HTTP status 400): ExpiredToken"))


def test_probe_names_the_place_and_the_reason(tmp_path, s3):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StorageError) as caught:
        probe(Storage.open(str(tmp_path / "file" / "run"), QUICK))
    assert str(tmp_path / "file" / "run") in str(
        caught.value
    ) and f"{tmp_path}/file is a file" in str(caught.value)
    missing = s3.replace("s3://bucket/", "s3://user:secret@nobody/").format("run")
    with pytest.raises(StorageError) as caught:
        probe(Storage.open(missing, QUICK))
    assert "s3://nobody/run" in str(caught.value) and "bucket does not exist" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_the_endpoint_of_the_environment_counts_as_for_other_tools(s3, monkeypatch):
    endpoint = s3.partition("endpoint_override=")[2].partition("&")[0]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{endpoint}")
    Storage.open("s3://bucket/environment").write_text("a", "b")
    assert Storage.open(s3.format("environment")).read_text("a") == "b"
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # the address stands over it
    assert Storage.open(s3.format("environment")).read_text("a") == "b"


def test_senseless_uri_is_refused():
    for uri in ("s4://x/y", "s3://", "s3:///runs"):
        with pytest.raises(StorageError, match=f"cannot open {uri}: "):
            Storage.open(uri)


def test_file_uri_and_plain_path_are_the_same_folder(tmp_path, monkeypatch):
    Storage.open(f"file://{tmp_path}/a%20b").write_text("f", "1")
    monkeypatch.chdir(tmp_path)
    assert Storage.open("a b").read_text("f") == "1"


def test_storage_imports_neither_torch_nor_pyarrow():
    code = "import sys, rayft.records.series; print({'torch', 'pyarrow', 'ray'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
