"""Saving in the background: training waits for one copy into host memory, a thread does the rest.

Per rank: copy (the stall) -> shard, hashed while it is written -> manifest. Rank 0 then waits for
every manifest on storage, checks that the shards are complete, and writes COMMIT.json. The thread
uses no collectives: it can neither hang nor reorder those of training. The files: `manifest.py`.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass

import torch

from rayft import __version__
from rayft.checkpoint.folders import folder_names
from rayft.checkpoint.manifest import (
    COMMIT,
    FOLDER,
    CommitRecord,
    Manifest,
    failed_name,
    folder_name,
    folder_order,
    manifest_name,
    shard_name,
)
from rayft.checkpoint.reader import gather_hashes, retain_commits
from rayft.checkpoint.shard_file import Index, StagingBuffer, index_of, write_shard
from rayft.core.background import in_background
from rayft.core.errors import PermanentStorageError, RayftError, StorageError
from rayft.core.shards import StateShard
from rayft.storage import failpoints
from rayft.storage.folder import Storage

log = logging.getLogger(__name__)

REFUSED = 2  # saves in a row that fail for good before the run stops; the first one is a warning
PATIENCE = 60.0  # seconds: what a rank may lose to storage that has to be asked again


@dataclass
class SaveStats:
    """Seconds and counts over all saves of this rank."""

    saves: int = 0
    failed: int = 0
    waited: int = 0  # saves that had to wait for the one before
    stall_seconds: float = 0.0  # training stood still: that wait, and the copy
    write_seconds: float = 0.0  # in the background
    hash_seconds: float = 0.0  # what hashing added to the writing
    bytes: int = 0


@dataclass(frozen=True)
class _SaveJob:
    step: int
    best: bool
    index: Index
    scalars: dict[str, float]
    extra: str  # JSON, so that later changes do not reach it


class CheckpointWriter:
    """Saves one rank's shards of one attempt.

    Args:
        run: storage of the run.
        rank, world: of this process.
        attempt: the same on all ranks and new for every start of the workers: digits that grow,
            then any letters or digits ("3", "0003k7f2").
        keep: newest commits to keep (at least 2), besides the best one.
        config: hash of the run's config, for COMMIT.json.
        parent: name of the commit this attempt started from.
        deadline: seconds that rank 0 waits for the other ranks' manifests; default: PATIENCE and
            ten times what its own part took, which is as large and goes to the same storage.
    """

    def __init__(
        self,
        run: Storage,
        rank: int,
        world: int,
        attempt: int | str,
        keep: int = 2,
        *,
        config: str = "",
        parent: str | None = None,
        deadline: float | None = None,
    ) -> None:
        self._run, self._rank, self._world, self._keep = run, rank, world, keep
        self._attempt, self._config, self._deadline = str(attempt), config, deadline
        if folder_order(folder_name(0, self._attempt)) is None:
            raise ValueError(f"attempt {attempt!r} must be digits, then letters or digits")
        self._staging = StagingBuffer()
        self._saving: Future[None] | None = None
        self._error: RayftError | None = None
        self._unreported: RayftError | None = None
        self._took = 0.0  # seconds for this rank's part of the last save
        self._written = -1  # step whose shard and manifest are on storage
        self._committed = -1
        self._refused = 0  # saves in a row that storage refused for good
        self.parent = parent
        self.stats = SaveStats()

    def reserve(self, shard: StateShard) -> None:
        """Allocate the host buffer now, so that the first save stalls no longer than the others."""
        self._staging.fill(shard)

    def save(
        self, step: int, shard: StateShard, extra: Mapping[str, object], *, best: bool = False
    ) -> None:
        """Copy the shard and start writing it; every rank must call it for the same steps.

        Waits for an unfinished save first. A failure in the background is reported by `poll` and
        `wait`. The same step again is a no-op, unless it failed.

        Args:
            extra: JSON of this rank: RNG states, cursor, ...
            best: the best so far; kept until a later save is.
        """
        start = time.perf_counter()
        if self._saving is not None and not self._saving.done():
            self.stats.waited += 1
        self._join(None)
        if step != self._committed:
            self._error = None
            self._staging.fill(shard)
            job = _SaveJob(step, best, index_of(shard), dict(shard.scalars), json.dumps({**extra}))
            self.stats.saves += 1
            self._saving = in_background(lambda: self._main(job), f"checkpoint-step-{step}")
        self.stats.stall_seconds += time.perf_counter() - start

    @property
    def committed(self) -> int:
        """Step of this attempt's last commit (rank 0; elsewhere: of its last manifest), or -1."""
        return self._committed

    def poll(self) -> RayftError | None:
        """The error of a failed background save, once; never waits."""
        error, self._unreported = self._unreported, None
        return error

    def check(self) -> None:
        """Stop a run that trains for nothing; never waits.

        Raises:
            PermanentStorageError: the last REFUSED saves failed, and the next one would as well.
        """
        if self._refused >= REFUSED and self._error is not None:
            error = self._error
            raise PermanentStorageError(
                f"{self._refused} checkpoints in a row could not be written: {error.what}",
                where=error.where,
                cause=error.cause,
                fix=error.fix,
            ) from error

    def wait(self, timeout: float | None = None) -> None:
        """Return when the last save is done: committed (rank 0), or its manifest written.

        Raises:
            StorageError: it failed, or is not done after `timeout` seconds.
        """
        if not self._join(timeout):
            raise StorageError(
                f"the checkpoint is still being written after {timeout:.0f} s",
                where=self._run.shown(FOLDER),
            )
        if self._error is not None:
            raise self._error

    def _join(self, timeout: float | None) -> bool:
        if self._saving is None:
            return True
        if wait([self._saving], timeout).not_done:
            return False
        saving, self._saving = self._saving, None
        saving.result()  # its errors are kept by `_fail`; anything else must not pass unseen
        return True

    def _main(self, job: _SaveJob) -> None:
        start = time.perf_counter()
        try:
            self._write(job)
            if self._rank == 0:
                self._commit(job)
            self._committed, self._refused = job.step, 0
        except Exception as error:  # lost in a thread otherwise; `poll` and `wait` hand it over
            self._fail(job, error)
        else:
            if self._rank == 0:
                self._retain(job)
        self.stats.write_seconds += time.perf_counter() - start

    def _write(self, job: _SaveJob) -> None:
        """Shard, then manifest."""
        if self._written == job.step:
            return
        folder, start = self._folder(job), time.perf_counter()
        folder.delete(failed_name(self._rank))  # of an earlier try
        done = write_shard(folder, shard_name(self._rank), self._staging)
        manifest = Manifest(
            step=job.step,
            rank=self._rank,
            world=self._world,
            attempt=self._attempt,
            path=shard_name(self._rank),
            size=done.size,
            sha256=done.sha256,
            index=job.index,
            scalars=job.scalars,
            extra=json.loads(job.extra),
            versions={"rayft": __version__, "torch": torch.__version__},
        ).to_bytes()
        _hit(folder, "checkpoint.manifest")
        folder.write_bytes(manifest_name(self._rank), manifest)
        self._written, self._took = job.step, time.perf_counter() - start
        self.stats.hash_seconds += done.hash_seconds
        self.stats.bytes += done.size

    def _commit(self, job: _SaveJob) -> None:
        """Rank 0: wait for all manifests, check, declare the folder valid."""
        folder = self._folder(job)
        _hit(folder, "checkpoint.gather")
        patience = PATIENCE + 10 * self._took if self._deadline is None else self._deadline
        hashes = gather_hashes(folder, job.step, self._attempt, self._world, patience)
        newer = [name for name in folder_names(self._run) if self._is_newer(name)]
        if newer:  # nothing of this attempt will be committed any more
            raise PermanentStorageError(
                f"{newer[0]} belongs to a newer attempt of this run; attempt {self._attempt} stops",
                cause="the run was started again while this one was cut off",
            )
        record = CommitRecord(
            step=job.step,
            attempt=self._attempt,
            world=self._world,
            config=self._config,
            parent=self.parent,
            best=job.best,
            created=time.time(),
            manifests=hashes,
        )
        _hit(folder, "checkpoint.commit")
        folder.write_bytes(COMMIT, record.to_bytes())
        self.parent = folder_name(job.step, self._attempt)

    def _is_newer(self, name: str) -> bool:
        mine, theirs = folder_order(folder_name(0, self._attempt)), folder_order(name)
        return mine is not None and theirs is not None and theirs[1] > mine[1]

    def _retain(self, job: _SaveJob) -> None:
        try:
            failpoints.hit("checkpoint.committed")
            retain_commits(self._run, self._attempt, job.step, self._keep)
        except Exception as error:  # the commit stands; the next save deletes again
            log.warning("old checkpoints were not deleted: %s", error)

    def _fail(self, job: _SaveJob, error: Exception) -> None:
        if not isinstance(error, RayftError):
            gone = isinstance(error, FileNotFoundError)  # what was just written, or its folder
            failure: RayftError = (PermanentStorageError if gone else StorageError)(
                f"checkpoint of step {job.step} failed: {type(error).__name__}: {error}"
            )
            failure.__cause__ = error
        else:
            failure = error
        failure.where = failure.where or f"rank {self._rank}, step {job.step}"
        self.stats.failed += 1
        self._refused = self._refused + 1 if isinstance(failure, PermanentStorageError) else 0
        self._error = self._unreported = failure
        log.warning("checkpoint of step %d failed: %s", job.step, failure.what)
        self._clean(job)

    def _clean(self, job: _SaveJob) -> None:
        """Remove this rank's part of a failed save, and tell rank 0 not to wait for it."""
        folder, self._written = self._folder(job), -1
        try:
            if self._rank == 0:
                folder.delete(COMMIT)  # it may be there although writing it failed; goes first
            folder.delete(manifest_name(self._rank))
            folder.delete(shard_name(self._rank))
            if self._rank != 0:
                folder.write_text(failed_name(self._rank), "{}")
        except (OSError, RayftError) as error:
            log.warning("could not clean up %s: %s", folder.shown(), error)

    def _folder(self, job: _SaveJob) -> Storage:
        return self._run.child(FOLDER, folder_name(job.step, self._attempt))


def _hit(folder: Storage, point: str) -> None:
    folder.attempt("write to", "", lambda: failpoints.hit(point))
