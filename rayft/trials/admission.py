"""Who may join a pack, and what a trial of it is made of."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from rayft.compose.arithmetic import settled
from rayft.compose.assemble import BuiltModel, RunParts, steps_of, train_stream
from rayft.compose.data import Corpus
from rayft.compose.gradient_check import GroupMovement
from rayft.compose.job import AttemptJob
from rayft.compose.session import RunSession
from rayft.config.methods import LoraSpec
from rayft.config.run import Run
from rayft.core.batch import Batch
from rayft.core.errors import ConfigError, InfeasibleError
from rayft.models.tokenizer import pad_id
from rayft.storage.folder import Storage
from rayft.trials.commit_queue import CommitQueue, CommitThreads
from rayft.trials.forward import PackedModel
from rayft.trials.initial import FreshAdapter
from rayft.trials.memory import MemoryBudget, MemoryClaim, MemoryLoad
from rayft.trials.plan import pack_differences, why_not_shared
from rayft.trials.rank_bucket import TrialAdapter
from rayft.trials.slot import Optimizer, QuietSignals, SlotEngine, SlotGenerators, TrialSlot
from rayft.trials.step import measure_activations
from rayft.trials.trial_folder import trial_record
from rayft.trials.types import NoRoom, UnsharedBase

log = logging.getLogger(__name__)


def with_precision(run: Run, device: torch.device) -> Run:
    """`run` with the base as this machine computes it; see compose.arithmetic."""
    run, said = settled(run, device)
    if said:
        log.warning("%s", said)
    return run


def refuse_unpackable(run: Run) -> None:
    """Raises UnsharedBase for what no pack can hold."""
    if why := why_not_shared(run):
        raise UnsharedBase(f"{run.name} cannot share a pack: {why}", fix="set sweep.pack=off")


def check_same_pack(run: Run, job: AttemptJob, first: Run, data_hash: str) -> None:
    """Raises ConfigError unless `run` may share `first`'s pack, whose data is `data_hash`."""
    refuse_unpackable(run)
    different = pack_differences(run, first)
    if first.data.packing and "data.packing" in different:
        different.remove("data.packing")  # a model that was probed for packed rows takes others too
    if job.data_hash != data_hash:
        different.append("the data")
    if different:
        raise ConfigError(f"{run.name} differs from its pack in {', '.join(different)}")


def micro_batch_rows(run: Run) -> int:
    """Rows of a micro-batch, as data/stream.py splits a step."""
    pieces = -(-run.train.global_batch // run.train.micro_batch)
    return -(-run.train.global_batch // pieces)


def memory_claim(run: Run, adapter: TrialAdapter, longest: int) -> MemoryClaim:
    """What a trial needs at most. `longest`: tokens of the longest document."""
    length = run.data.max_length if run.data.packing else longest
    method = run.methods[0]
    if not isinstance(method, LoraSpec):
        raise UnsharedBase(f"{run.name} is no LoRA run")
    kind = (method.dropout > 0, method.dora)
    return MemoryClaim(adapter.layout.size, adapter.rows, length, method.rank, kind)


def check_memory(budget: MemoryBudget, name: str, claim: MemoryClaim, load: MemoryLoad) -> None:
    """Raises NoRoom where `claim` does not fit beside the others, InfeasibleError where it would
    not fit alone."""
    limit = f"{budget.limit / 2**30:.2f}"
    alone = budget.need(MemoryLoad([claim]))
    load.add(claim)
    need, parked = budget.need(load), budget.need_host(load)
    load.remove(claim)
    if alone > budget.limit:
        raise InfeasibleError(
            f"{name} needs {alone / 2**30:.2f} GiB, its pack has {limit}",
            fix="lower train.micro_batch, data.max_length or methods.0.rank",
        )
    if need > budget.limit:
        raise NoRoom(f"{name} would take its pack to {need / 2**30:.2f} GiB of {limit}")
    if parked > budget.host_limit:
        raise NoRoom(
            f"with {name}, parked trials would take {parked / 2**30:.2f} GiB of host memory, which "
            f"has {budget.host_limit / 2**30:.2f}"
        )


def measure_memory(
    budget: MemoryBudget, model: PackedModel, slot: TrialSlot, load: MemoryLoad
) -> None:
    """Measure a trial that may keep more per token than those before it, before it is in, and look
    again whether there is room. Raises as `check_memory` does."""
    if budget.knows(slot.claim):
        return
    try:
        measure_activations(model, slot, budget)
    except torch.OutOfMemoryError as error:
        if model.device.type == "cuda":
            torch.cuda.empty_cache()  # what the attempt took must not starve the others
        if load.trials:
            raise NoRoom(f"{slot.trial} ran out of memory beside {load.trials} others") from error
        raise InfeasibleError(
            f"{slot.trial} runs out of memory, alone in its pack",
            fix="lower train.micro_batch, data.max_length or methods.0.rank",
        ) from error
    check_memory(budget, slot.trial, slot.claim, load)


@dataclass(frozen=True)
class SharedParts:
    """What all trials of a pack have in common."""

    corpus: Corpus
    built: BuiltModel
    eval_batches: tuple[Batch, ...]
    optimizer: Optimizer
    facts: Mapping[str, object]
    threads: CommitThreads  # of their commits


def make_slot(
    job: AttemptJob,
    run: Run,
    start: FreshAdapter,
    adapter: TrialAdapter,
    claim: MemoryClaim,
    shared: SharedParts,
) -> TrialSlot:
    """A trial around `adapter`, which is in a bucket; not begun."""
    groups = tuple(replace(one, params=(adapter.params[one.name],)) for one in start.groups)
    made = shared.optimizer(list(groups), run.optim)
    device = adapter.params["lora_A"].device
    stream = train_stream(run, shared.corpus, pad_id(shared.built.tokenizer))
    parts = RunParts(
        run=run,
        built=replace(shared.built, methods=start.methods, groups=groups),
        engine=SlotEngine(adapter, start, made, device),
        stream=stream,
        eval_batches=shared.eval_batches,
        tasks=shared.corpus.tasks,
        steps=steps_of(run, stream),
        params_total=start.params_total,
        params_trainable=start.params_trainable,
    )
    storage = Storage.open(run.storage).child(run.name)
    generators = SlotGenerators(device)
    session = RunSession(job, parts, storage, QuietSignals(), time.monotonic(), drawing=generators)
    record = trial_record(storage, run, job, shared.facts)
    return TrialSlot(
        trial=run.name,
        run=run,
        adapter=adapter,
        claim=claim,
        session=session,
        optimizer=made,
        generators=generators,
        commits=CommitQueue(session.writer, shared.threads),
        record=record,
        movement=GroupMovement(parts.engine.group_of(), device),
    )


def restore_or_start(slot: TrialSlot, source: str | None, base: Mapping[str, float]) -> None:
    """Go on from the newest commit of its own folder, else from `source`, else from the start,
    where its evaluation is the base model's."""
    own = slot.session.restore()
    if own is not None:
        slot.charged = float(own.extra(0).get("charged", 0.0))
    elif source is not None:
        _clone(slot, source)
    elif base:
        slot.session.judge(0, dict(base))
    slot.write_record("running")


def _clone(slot: TrialSlot, source: str) -> None:
    """The state of another trial's checkpoint, committed under this trial's name."""
    commit = slot.session.clone(source, slot.schedule)
    slot.charged = float(commit.extra(0).get("charged", 0.0))
    best = slot.session.progress.best
    slot.commits.write(slot.snapshot(best is not None))
    slot.commits.settle()
