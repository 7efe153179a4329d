"""Work on a finished (or stopped) run from its storage alone, in this process, without Ray:
`rayft eval` and `rayft export`."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rayft.checkpoint.reader import Commit
from rayft.compose.answers import ModelAnswers, answer, ask, report
from rayft.compose.arithmetic import settled
from rayft.compose.assemble import BuiltModel, build, held_out, strategy_of
from rayft.compose.data import SEPARATOR, open_corpus, prepare_data
from rayft.compose.evaluate import evaluate
from rayft.compose.export import ModelGap, check_vllm, merge_run, write_model_card
from rayft.compose.kept import check_kept, kept_tensors
from rayft.compose.publish import (
    EXPORT,
    CommitWeights,
    choose_commit,
    copy_out,
    make_export,
    record_at,
)
from rayft.config.run import Run
from rayft.config.strategies import DdpSpec
from rayft.core.batch import Batch
from rayft.core.errors import ConfigError, DataError, StorageError
from rayft.core.process import temporary
from rayft.models.quiet import hush
from rayft.records.run_record import RunRecord
from rayft.storage.folder import Storage
from rayft.storage.sealed import BadRecord

MERGED = "export-merged"  # beside `export`


@dataclass(frozen=True)
class OpenedRun:
    """A run on storage with its model in memory, still holding the base's weights."""

    storage: Storage
    record: RunRecord
    run: Run
    built: BuiltModel
    device: torch.device


class EvalEngine:
    """The part of an Engine that evaluation needs: one rank, no optimizer."""

    rank, world = 0, 1

    def __init__(self, built: BuiltModel, device: torch.device) -> None:
        self.step, self.device = built.step.to(device), device

    def measure(self, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        return self.step(batch.inputs(), None)

    @contextmanager
    def evaluating(self) -> Generator[None]:
        self.step.eval()
        with torch.no_grad():
            yield


def read_record(storage: Storage) -> RunRecord:
    """run.json of a run's folder.

    Raises:
        ConfigError: there is none. StorageError: it is damaged.
    """
    if not storage.exists("run.json"):
        raise ConfigError(
            f"no run at {storage.shown()}",
            cause="it holds no run.json",
            fix="give the run's own folder: <storage>/<name>",
        )
    try:
        return RunRecord.from_json(storage.read_bytes("run.json"))
    except BadRecord as error:
        raise StorageError(
            f"{storage.shown('run.json')} is damaged: {error}",
            fix="give the run's own command again: it makes the file anew from the checkpoints",
        ) from error


def open_run(where: str) -> OpenedRun:
    """Read the record and build the run's model with its base weights, on one device."""
    storage = Storage.open(where)
    record = read_record(storage)
    hush()
    run = Run.model_validate(record.config).model_copy(update={"strategy": DdpSpec()})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run, _ = settled(run, device)  # as training on this machine does
    return OpenedRun(storage, record, run, build(run, device, strategy_of(run, device)), device)


def _check_kept(built: BuiltModel, commit: Commit) -> None:
    with commit.reader() as reader:
        check_kept(kept_tensors(built.methods, built.model), reader, commit.name)


def load_weights(built: BuiltModel, commit: Commit) -> None:
    """Copy the trained parameters of `commit` into the model."""
    params = dict(built.step.named_parameters())
    for name, tensor in commit.consolidated():
        with torch.no_grad():
            params[name].copy_(tensor)


def evaluate_run(where: str, *, generate: int = 0, limit: int | None = None) -> str:
    """The text of `rayft eval`: base against tuned, and completions of both.

    Args:
        where: the run's folder.
        generate: completions to generate from held-out prompts and score by exact match.
        limit: evaluate only so many held-out documents.

    Raises:
        DataError: the run names no held-out data.
    """
    opened = open_run(where)
    if not opened.run.data.eval:
        raise DataError("this run has no held-out data", fix="add data.eval to its config")
    prepared = prepare_data(opened.run, lambda function, items: [function(item) for item in items])
    corpus = open_corpus(opened.run, prepared.uri, prepared.hash)
    if corpus.eval is None:
        raise DataError("this run has no prepared held-out data")
    batches = held_out(opened.run, corpus, opened.built, 0, 1, limit)
    engine = EvalEngine(opened.built, opened.device)
    questions = ask(corpus.eval, opened.built.tokenizer, generate)

    def measure() -> ModelAnswers:
        found = evaluate(engine, opened.built.objective, batches, corpus.tasks)
        return ModelAnswers(found, answer(opened.built.model, opened.built.tokenizer, questions))

    base = measure()
    commit = choose_commit(opened.storage, opened.record)
    _check_kept(opened.built, commit)
    load_weights(opened.built, commit)
    said = report(f"step {commit.step}", questions, base, measure())
    before, now = (each.split(SEPARATOR)[1:] for each in (opened.record.data_hash, prepared.hash))
    changed = "\n\nnote: the held-out data is not what it was when this run was trained"
    return said + changed * (before != now)


def export_run(
    where: str,
    *,
    merge: bool = False,
    check: str | None = None,
    to: str | None = None,
    step: int | None = None,
) -> str:
    """The text of `rayft export`: writes the hub layout of the best (or a given) checkpoint.

    Args:
        where: the run's folder.
        merge: merge adapters into the unquantised base and write a plain model.
        check: "vllm": also say whether vLLM would load the result.
        to: where to write; default `<run>/export`, merged `<run>/export-merged`.
        step: the checkpoint; default the best one.

    Raises:
        ConfigError: nothing to merge. StorageError: no such checkpoint, or storage fails.
    """
    opened = open_run(where)
    if merge and not all(method.merges for method in opened.run.methods):
        kinds = ", ".join(method.kind for method in opened.run.methods if not method.merges)
        raise ConfigError(f"nothing to merge: {kinds} leaves no update that a weight could take")
    commit = choose_commit(opened.storage, opened.record, step)
    _check_kept(opened.built, commit)
    target = Storage.open(to) if to else opened.storage.child(MERGED if merge else EXPORT)
    with temporary("export") as scratch:
        folder = Path(scratch) / "export"
        make_export(opened.built, opened.record, commit, folder)
        lines = [f"{target.uri}: checkpoint of step {commit.step}"]
        if check:
            lines += _verdict(check_vllm(folder))
        if merge:
            folder = Path(scratch) / "merged"
            lines += _merged(opened, commit, folder)
        copy_out(folder, target)
    return "\n".join(lines)


def _merged(opened: OpenedRun, commit: Commit, folder: Path) -> list[str]:
    """Merge into `folder`; what the merge changed, in words."""
    tokenizer = opened.built.tokenizer
    with commit.reader() as reader:
        state = CommitWeights(reader)
        found = merge_run(opened.run, state, folder, tokenizer, device=opened.device)
    write_model_card(folder, record_at(opened.record, commit), tokenizer, merged=found)
    return [
        f"merged into the unquantised base, stored as {found.dtype}; reopened, same logits",
        f"  logit gap, adapter beside base -> merged: {_gap(found.rounding)}",
        f"  logit gap, as trained -> merged:          {_gap(found.trained)}",
    ]


def _gap(gap: ModelGap) -> str:
    return f"max {gap.max_abs:.3g}, mean KL {gap.kl:.3g} nats"


def _verdict(reasons: list[str]) -> list[str]:
    if not reasons:
        return ["vLLM would load this adapter"]
    return ["vLLM, as it starts by default, would not load this adapter:"] + [
        f"  {reason}" for reason in reasons
    ]
