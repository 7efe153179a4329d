"""What a user takes away: one commit in hub layout, with tokenizer and model card."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from rayft.checkpoint.manifest import BadCommit, folder_order
from rayft.checkpoint.reader import Commit, find_commit, folder_names, load_commit
from rayft.checkpoint.shard_file import CommitShards
from rayft.compose.assemble import BuiltModel
from rayft.compose.export import write_model_card
from rayft.compose.step import PREFIX
from rayft.core.errors import StorageError
from rayft.core.process import temporary
from rayft.core.shards import PARAM
from rayft.records.run_progress import RunProgress
from rayft.records.run_record import RunRecord
from rayft.storage.folder import Storage

EXPORT = "export"
log = logging.getLogger(__name__)


class CommitWeights(Mapping[str, Tensor]):
    """Full trained parameters of a commit by the model's own names, each read from the shards when
    it is asked for: all of them in fp32 at once fit no host for a large model."""

    def __init__(self, reader: CommitShards) -> None:
        self._reader = reader
        self._saved = {name.removeprefix(PREFIX): name for name in reader.shapes()}

    def __getitem__(self, name: str) -> Tensor:
        saved = self._saved[name]
        shape = self._reader.shapes()[saved]
        return self._reader.read(saved, PARAM, 0, math.prod(shape)).view(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._saved)

    def __len__(self) -> int:
        return len(self._saved)


def choose_commit(storage: Storage, record: RunRecord, step: int | None = None) -> Commit:
    """The commit to take away: that of `step`, else the best evaluated one, else the newest.

    Raises:
        StorageError: there is none that verifies.
    """
    wanted = [record.best.checkpoint] if record.best is not None else []
    if step is not None:
        wanted = [
            name for name in folder_names(storage) if (folder_order(name) or (None,))[0] == step
        ]
    for name in wanted:
        try:
            return load_commit(storage, name)
        except BadCommit as error:
            log.warning("checkpoint %s is not used: %s", name, error)
    found = None if step is not None else find_commit(storage, set_bad_aside=False)
    if found is None:
        kept = ", ".join(folder_names(storage)) or "none"
        what = "no committed checkpoint" if step is None else f"no checkpoint of step {step}"
        raise StorageError(what, where=storage.shown(), fix=f"kept are: {kept}")
    return found


def make_export(built: BuiltModel, record: RunRecord, commit: Commit, folder: Path) -> None:
    """Hub layout of `commit` in the local `folder`; methods read back what they write."""
    with commit.reader() as reader:
        state = CommitWeights(reader)
        for method in built.methods:
            method.export(built.model, state, folder)
    write_model_card(folder, record_at(record, commit), built.tokenizer)


def record_at(record: RunRecord, commit: Commit) -> RunRecord:
    """`record` as it stood when `commit` was saved: its numbers, not those of a later step."""
    return record.advanced(RunProgress.from_json(commit.extra(0)["progress"]))


def copy_out(folder: Path, target: Storage) -> None:
    """Replace what lies at `target` with the files of `folder`."""
    target.delete()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            target.upload(path, str(path.relative_to(folder)))


def publish(built: BuiltModel, record: RunRecord, commit: Commit, target: Storage) -> None:
    """Export `commit` to `target`. Made and checked in a local folder first, so that an old export
    goes only when the new one is ready."""
    with temporary("export") as scratch:
        make_export(built, record, commit, Path(scratch))
        copy_out(Path(scratch), target)
