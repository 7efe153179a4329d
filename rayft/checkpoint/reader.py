"""Finding, checking, gathering and deleting checkpoints on storage (the files: `manifest.py`)."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from rayft.checkpoint.folders import (
    BAD,
    COMMIT,
    FOLDER,
    committed_names,
    folder_name,
    folder_names,
    folder_order,
    set_aside,
)
from rayft.checkpoint.manifest import (
    BadCommit,
    CommitRecord,
    FileHash,
    Manifest,
    failed_name,
    hash_of,
    manifest_name,
    parse_manifest,
)
from rayft.checkpoint.shard_file import CommitShards, hash_file
from rayft.core.errors import StorageError
from rayft.core.shards import PARAM
from rayft.storage import failpoints
from rayft.storage.folder import Storage

log = logging.getLogger(__name__)

_HASHERS = 4  # threads


@dataclass(frozen=True)
class Commit:
    """A checkpoint that was verified when it was found."""

    storage: Storage  # of the checkpoint's folder
    name: str
    record: CommitRecord
    manifests: tuple[Manifest, ...]

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.record.step

    @property
    def world(self) -> int:
        """Ranks that wrote it."""
        return self.record.world

    @property
    def size(self) -> int:
        """Bytes of all shards."""
        return sum(manifest.size for manifest in self.manifests)

    def extra(self, rank: int) -> dict[str, Any]:
        """What rank `rank` (< world) saved beside its tensors."""
        return self.manifests[rank].extra

    def reader(self) -> CommitShards:
        """Slices of all shards; close it, or use it in `with`."""

        def fetch(rank: int, folder: Path) -> Path:
            manifest = self.manifests[rank]
            local = self.storage.local_path(manifest.path)
            if local is not None:
                return local
            copy = self.storage.download(manifest.path, folder / manifest.path)
            here = Storage.open(str(folder))
            if hash_file(here, manifest.path) != (manifest.size, manifest.sha256):
                raise StorageError(f"{self.storage.shown(manifest.path)} changed while it was read")
            return copy

        indexes = [manifest.index for manifest in self.manifests]
        return CommitShards(fetch, indexes, self.manifests[0].scalars)

    def consolidated(self) -> Iterator[tuple[str, Tensor]]:
        """(name, full parameter in its shape and saved dtype), one at a time."""
        with self.reader() as reader:
            for name, shape in reader.shapes().items():
                yield name, reader.read(name, PARAM, 0, math.prod(shape)).view(shape)


def load_commit(run: Storage, name: str, *, verify: bool = True) -> Commit:
    """The checkpoint `name`; without `verify` the shards are not hashed (somebody just did).

    Raises:
        BadCommit: not committed, or damaged; the text names the file.
        StorageError: storage does not answer.
    """
    folder = run.child(FOLDER, name)
    record = CommitRecord.from_bytes(_read(folder, COMMIT))
    if folder_name(record.step, record.attempt) != name:
        raise BadCommit(f"{COMMIT} belongs to {folder_name(record.step, record.attempt)}")
    manifests: list[Manifest] = []
    for rank, expected in enumerate(record.manifests):
        data = _read(folder, manifest_name(rank))
        if hash_of(data) != expected:
            raise BadCommit(f"{manifest_name(rank)} is damaged")
        manifests.append(parse_manifest(data, name, rank))
    if verify:
        with ThreadPoolExecutor(_HASHERS) as pool:
            list(pool.map(partial(_check_shard, folder), manifests))
    return Commit(folder, name, record, tuple(manifests))


def find_commit(run: Storage, *, set_bad_aside: bool = True) -> Commit | None:
    """The newest checkpoint that is committed and verified; None when there is none.

    A bad one is set aside with a warning that names the file, and the one before it is tried.
    """
    for name in committed_names(run):
        try:
            return load_commit(run, name)
        except BadCommit as error:
            log.warning("checkpoint %s is not used: %s", name, error)
            if set_bad_aside:
                set_aside(run, name, str(error))
    return None


def gather_hashes(
    folder: Storage, step: int, attempt: str, world: int, deadline: float
) -> list[FileHash]:
    """Hashes of all ranks' manifests, when they and their whole shards are on storage.

    Args:
        folder: of the checkpoint.
        deadline: seconds to wait.

    Raises:
        StorageError: a rank failed, is late, or its shard is incomplete; at once where what this
            rank has just written is gone.
    """
    end, pause = time.monotonic() + deadline, 0.02
    while True:
        sizes = {entry.name: entry.size for entry in folder.list()}
        failed = [rank for rank in range(world) if failed_name(rank) in sizes]
        missing = [rank for rank in range(world) if manifest_name(rank) not in sizes]
        if manifest_name(0) not in sizes:  # whoever gathers is rank 0, and has written its own
            raise StorageError(
                f"checkpoint of step {step} was deleted while it was written",
                where=folder.shown(),
            )
        if failed:
            raise StorageError(f"rank {failed[0]} could not write its part of step {step}")
        if not missing:
            name = folder_name(step, attempt)
            return [_vouch(folder, name, rank, world, sizes) for rank in range(world)]
        if time.monotonic() > end:
            raise StorageError(
                f"checkpoint of step {step}: no manifest of ranks {missing} after {deadline:.0f} s",
                where=folder.shown(),
            )
        time.sleep(pause)
        pause = min(1.0, pause * 1.5)


def _vouch(folder: Storage, name: str, rank: int, world: int, sizes: Mapping[str, int]) -> FileHash:
    data = folder.read_bytes(manifest_name(rank))
    manifest = parse_manifest(data, name, rank)
    if manifest.world != world or sizes.get(manifest.path) != manifest.size:
        raise StorageError(
            f"{folder.shown(manifest.path)} is incomplete: {sizes.get(manifest.path)} bytes of "
            f"{manifest.size}, world {manifest.world}"
        )
    return hash_of(data)


def retain_commits(run: Storage, attempt: str, step: int, keep: int) -> None:
    """Delete what is no longer needed after `step` of `attempt` was committed.

    Kept: that one, the newest max(keep, 2) commits, and the newest that was the best so far.
    Uncommitted folders go only when nobody can still write them: those of older attempts, and
    earlier steps of this one (every rank writes its steps in order, and has written `step`).
    """
    this = folder_name(step, attempt)
    good, best = [], None
    for name in folder_names(run):
        if run.exists(f"{FOLDER}/{name}/{BAD}"):
            continue
        if not run.exists(f"{FOLDER}/{name}/{COMMIT}"):
            if _is_over(name, this):
                remove_commit(run, name)
            continue
        try:
            record = CommitRecord.from_bytes(_read(run.child(FOLDER, name), COMMIT))
        except BadCommit:
            continue  # `find_commit` will set it aside and say so
        good.append(name)
        if best is None and record.best:
            best = name
    for name in good:
        if name not in {this, best, *good[: max(keep, 2)]}:
            remove_commit(run, name)


def _is_over(name: str, this: str) -> bool:
    """Whether nobody writes `name` any more, now that `this` is committed."""
    place, mine = folder_order(name), folder_order(this)
    if place is None or mine is None:
        return False
    return place[1] < mine[1] or (place[1:] == mine[1:] and place[0] < mine[0])


def remove_commit(run: Storage, name: str) -> None:
    """Delete a checkpoint: first what declares it valid, then the rest."""
    failpoints.hit("checkpoint.uncommit")
    run.delete(f"{FOLDER}/{name}/{COMMIT}")
    failpoints.hit("checkpoint.delete")
    run.delete(f"{FOLDER}/{name}")


def _check_shard(folder: Storage, manifest: Manifest) -> None:
    try:
        size, digest = hash_file(folder, manifest.path)
    except FileNotFoundError as error:
        raise BadCommit(f"{manifest.path} is missing") from error
    if (size, digest) != (manifest.size, manifest.sha256):
        raise BadCommit(f"{manifest.path} is damaged ({size} bytes, {manifest.size} written)")


def _read(folder: Storage, name: str) -> bytes:
    try:
        return folder.read_bytes(name)
    except FileNotFoundError as error:
        raise BadCommit(f"{name} is missing") from error


def donated_commit(donor: Storage, name: str) -> str:
    """`name` where it verifies, else the newest commit of the run `donor`.

    Raises:
        BadCommit: it has none.
    """
    try:
        return load_commit(donor, name).name
    except BadCommit:
        found = find_commit(donor, set_bad_aside=False)
        if found is None:
            raise
        return found.name
