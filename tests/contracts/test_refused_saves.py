"""Saves that storage refuses for good are counted, and end a run that would train for nothing."""

from __future__ import annotations

import errno

import pytest

from rayft.checkpoint.reader import find_commit
from rayft.checkpoint.writer import REFUSED
from rayft.core.errors import PermanentStorageError, StorageError
from rayft.storage import failpoints
from rayft.storage.folder import Storage
from tests.contracts.disks import mounted, small_disk
from tests.contracts.saving import QUICK, save, shard, writers


def try_to_save(writer, step: int) -> None:
    writer.save(step, shard(step, 0, 1), {})
    with pytest.raises(StorageError):
        writer.wait(60)


def test_a_read_only_disk_is_known_after_two_saves_and_forgotten_once_mended(tmp_path):
    with small_disk(tmp_path / "disk") as disk:
        run = Storage.open(str(disk / "run"), QUICK)
        (writer,) = writers(run, 1)
        save([writer], 1)
        mounted("-o", "remount,ro", str(disk))
        for n in range(REFUSED):
            writer.check()
            try_to_save(writer, 2 + n)
        with pytest.raises(PermanentStorageError, match=r"2 checkpoints in a row.*Read-only") as e:
            writer.check()
        assert "mounted read-only" in e.value.cause
        assert find_commit(run, set_bad_aside=False).step == 1
        mounted("-o", "remount,rw", str(disk))
        save([writer], 4)
        writer.check()
        assert find_commit(run).step == 4


def test_errors_that_pass_do_not_count(tmp_path, monkeypatch):
    (writer,) = writers(Storage.open(str(tmp_path), QUICK), 1)
    monkeypatch.setenv(failpoints.VARIABLE, "storage.write.sync:oserror:1+")
    for step in range(1, 2 + REFUSED):
        try_to_save(writer, step)
        writer.check()


def test_a_good_save_between_two_refused_ones_counts_from_the_start(tmp_path, monkeypatch):
    (writer,) = writers(Storage.open(str(tmp_path), QUICK), 1)
    for step in range(1, 6):
        if step % 2:
            monkeypatch.setenv(failpoints.VARIABLE, "storage.write.sync:enospc:1+")
            try_to_save(writer, step)
        else:
            monkeypatch.delenv(failpoints.VARIABLE)
            save([writer], step)
        writer.check()


def test_an_existing_folder_is_not_made_again(tmp_path):
    run = Storage.open(str(tmp_path / "run"), QUICK)
    run.write_text("f", "1")
    kept = run.existing()
    kept.child("a").write_text("f", "1")
    run.delete()
    for write in (lambda: kept.write_text("f", "2"), lambda: kept.child("a").open_output("f")):
        with pytest.raises(PermanentStorageError, match="gone"):
            write()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_what_is_permanent_says_so(number):
    def fail():
        raise OSError(number, "as the system says it")

    with pytest.raises(PermanentStorageError):
        QUICK.run("write", "there", fail)


def test_denied_by_s3_is_permanent_and_names_the_variables():
    def fail():
        raise OSError("AWS Error ACCESS_DENIED during PutObject operation: HTTP status 403")

    with pytest.raises(PermanentStorageError) as caught:
        QUICK.run("write", "s3://bucket/run", fail)
    assert "AWS_ACCESS_KEY_ID" in caught.value.fix
