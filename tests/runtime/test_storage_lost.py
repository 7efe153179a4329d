"""Storage that refuses for good: a run stops soon, names what is safe, and goes on once mended."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rayft import cli
from rayft.checkpoint.writer import REFUSED
from rayft.compose import execute as engine
from rayft.compose.job import AttemptOutcome
from rayft.config.run import Run
from rayft.core.errors import PermanentStorageError
from rayft.records.run_progress import RunProgress, RunSize
from rayft.storage import lease
from rayft.training.driver import train
from tests.contracts.disks import fill, mounted, small_disk
from tests.contracts.s3 import s3_server

EVERY = 3  # steps between saves


def config(storage, **changes) -> dict:
    return {
        "name": "r",
        "storage": str(storage),
        "model": {"path": "builtin:tiny"},
        "methods": [{"kind": "lora", "rank": 2}],
        "data": {
            "train": [{"path": "builtin:docstrings", "samples": 32}],
            "max_length": 48,
            "cache": str(Path(storage).with_name("cache")),
        },
        "train": {"steps": 60, "save_every": EVERY, "global_batch": 2, "micro_batch": 2},
        "scale": {"workers": 0, "gpus": 0},
    } | changes


def breaking(step: int, breaks):
    """rayft's engine; `breaks()` happens before `step` begins, and the steps done are kept."""
    done = []

    class Watched:
        def __init__(self, signals):
            self._signals = signals

        def stop_requested(self):
            if len(done) + 1 == step:
                breaks()
            return self._signals.stop_requested()

        def progress(self, event):
            if event.kind == "step":
                done.append(event.step)
            self._signals.progress(event)

    def execute(job, rank, world, device, signals):
        return engine.execute(job, rank, world, device, Watched(signals))

    return execute, done


def test_a_full_disk_stops_a_run_soon_and_it_goes_on_when_there_is_room(tmp_path):
    with small_disk(tmp_path / "disk") as disk:
        run = Run.model_validate(config(disk / "runs"))
        execute, done = breaking(8, lambda: fill(disk))
        with pytest.raises(PermanentStorageError) as caught:
            train(run, engine=execute, again="rayft train it.yaml")
        said = str(caught.value)
        # the last commit, and at most as many steps again as it takes for REFUSED saves
        assert 8 <= done[-1] <= 6 + EVERY * REFUSED + 1
        assert "last good checkpoint: of step 6" in said and "No space left" in said
        assert "the disk or the quota is full" in said and "rayft train it.yaml" in said
        assert caught.value.exit_code == 6 and len(said.splitlines()) <= 15
        (disk / "filler").unlink()
        execute, done = breaking(0, lambda: None)
        assert train(run, engine=execute).status == "done"
        assert done[0] == 7


def test_a_run_folder_that_vanishes_is_exit_6_and_is_not_made_again(tmp_path):
    run = Run.model_validate(config(tmp_path / "runs"))
    execute, done = breaking(8, lambda: shutil.rmtree(tmp_path / "runs"))
    with pytest.raises(PermanentStorageError, match="gone") as caught:
        train(run, engine=execute)
    assert done[-1] <= 6 + EVERY * REFUSED + 1 and "another driver" not in str(caught.value)
    assert not (tmp_path / "runs").exists()


def test_a_lease_in_a_folder_that_vanished_is_no_takeover(tmp_path, monkeypatch):
    """A long step writes nothing: then the lease is what finds out."""
    monkeypatch.setattr(lease, "RENEW", 0.05)
    run = Run.model_validate(config(tmp_path / "runs"))

    def execute(job, rank, world, device, signals):
        # moved, as an unmounted folder is gone: at once, whatever the lease is writing in it
        (tmp_path / "runs").rename(tmp_path / "away")
        end = time.monotonic() + 30
        while not signals.stop_requested():
            assert time.monotonic() < end, "nobody noticed"
            time.sleep(0.01)
        return AttemptOutcome("interrupted", RunProgress(), RunSize(60))

    with pytest.raises(PermanentStorageError, match="runs/r is gone") as caught:
        train(run, engine=execute)
    assert caught.value.exit_code == 6 and not (tmp_path / "runs").exists()


@pytest.fixture(scope="module")
def s3():
    with s3_server() as template:
        yield template


@pytest.fixture
def closed_port():
    """A port that refuses, and one that takes connections and never answers."""
    with socket.socket() as taken, socket.socket() as silent:
        taken.bind(("127.0.0.1", 0))  # bound, but nobody listens
        silent.bind(("127.0.0.1", 0))
        silent.listen(64)
        yield taken.getsockname()[1], silent.getsockname()[1]


def refused(tmp_path, capsys, storage, **changes) -> str:
    """What `rayft train` says when it refuses, which must be soon and before Ray."""
    file = tmp_path / "config.json"
    more = {"scale": {"workers": 1, "gpus": 0}}
    file.write_text(json.dumps(config(tmp_path / "x", **more) | {"storage": storage} | changes))
    began = time.monotonic()
    code = cli.main(["train", str(file)])
    said = capsys.readouterr().err
    assert code == 6, said
    assert "Ray" not in said and time.monotonic() - began < 30
    assert len(said.splitlines()) <= 15 and "next:" in said
    return said


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("s3://", "it names no bucket"),
        ("s3:///runs", "it names no bucket"),
        ("gs://?region=x", "it names no bucket"),
        ("s3://my_bucket!/runs", "'my_bucket!' is not the name of a bucket"),
        ("s3://bucket/runs?anonimous=true", "did you mean anonymous?"),
        ("s3://bucket/runs?anonymous=perhaps", "anonymous is true or false"),
        ("s3://bucket/runs?endpoint_override=host:99999", "is host or host:port"),
        ("s3://bucket/runs?scheme=ftp&region=us-east-1", "ftp"),
        ("s3://KEYONLY@bucket/runs?region=us-east-1", "come together"),
    ],
)
def test_a_senseless_address_is_exit_6_before_ray(tmp_path, capsys, address, reason):
    assert reason in refused(tmp_path, capsys, address)


@pytest.mark.parametrize("address", ["s3:///runs", "s3://bucket/runs?anonimous=true", "gs://"])
def test_check_refuses_a_senseless_address_without_a_store(tmp_path, capsys, address):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config(tmp_path / "x") | {"storage": address}))
    assert cli.main(["check", str(file)]) == 6
    assert f"cannot open {address.partition('?')[0]}: " in capsys.readouterr().err


def test_a_store_that_does_not_answer_is_exit_6_within_seconds(tmp_path, capsys, closed_port, s3):
    for port in closed_port:
        options = f"scheme=http&endpoint_override=127.0.0.1:{port}&region=us-east-1"
        said = refused(tmp_path, capsys, f"s3://bucket/runs?{options}")
        assert "storage s3://bucket/runs/r is not usable" in said
        assert "nobody answers there" in said
    said = refused(tmp_path, capsys, s3.replace("//bucket/", "//nobody/").format("runs"))
    assert "bucket does not exist" in said


def test_a_disk_that_cannot_be_written_is_exit_6_before_ray(tmp_path, capsys):
    with small_disk(tmp_path / "disk") as disk:
        filler = fill(disk)
        assert "No space left" in refused(tmp_path, capsys, str(disk / "runs"))
        filler.unlink()
        (tmp_path / "runs").mkdir()
        mounted("-o", "remount,ro", str(disk))
        assert "read-only" in refused(tmp_path, capsys, str(disk / "runs"))
        cache = {"data": config(tmp_path)["data"] | {"cache": str(disk / "cache")}}
        assert "disk/cache" in refused(tmp_path, capsys, str(tmp_path / "runs"), **cache)


def test_no_permission_is_exit_6_before_ray(tmp_path):
    """As another user, for whom permissions count: root may write anywhere."""
    code = (
        "import os, sys; from rayft.training.driver import train; from rayft.config.run import Run;"
        "run = Run.model_validate_json(sys.argv[1]);"
        "os.getuid() or os.seteuid(65534);"
        "from rayft.core.errors import RayftError\n"
        "try: train(run)\n"
        "except RayftError as error: print(error); sys.exit(error.exit_code)"
    )
    (tmp_path / "runs").mkdir(mode=0o555)
    tmp_path.chmod(0o755)
    for parent in tmp_path.parents[:2]:  # pytest's own are private
        parent.chmod(0o755)
    more = {"scale": {"workers": 1, "gpus": 0}}
    run = Run.model_validate(config(tmp_path / "runs", **more))
    done = subprocess.run(
        [sys.executable, "-c", code, run.model_dump_json()],
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 6, done.stderr
    assert "Permission denied" in done.stdout and "no permission" in done.stdout
    assert "Ray" not in done.stderr
