"""Who may join a pack, and what a trial of it is made of."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from rayft.compose.arithmetic import settled
from rayft.compose.assemble import Built, Parts, steps_of, train_stream
from rayft.compose.data import Corpus
from rayft.compose.gradient_check import Movement
from rayft.compose.job import Job
from rayft.compose.session import Session
from rayft.config.run import Run
from rayft.core.batch import Batch
from rayft.core.errors import ConfigError, InfeasibleError
from rayft.core.storage import Storage
from rayft.trials.forward import PackedModel
from rayft.trials.initial import Start
from rayft.trials.records import record_of
from rayft.trials.room import Claim, Room
from rayft.trials.saving import Lane
from rayft.trials.shelf import Row
from rayft.trials.slots import Optimizer, Quiet, Slot, SlotEngine, SlotGenerators
from rayft.trials.stepping import weigh
from rayft.trials.types import NoRoom, Unshared

log = logging.getLogger(__name__)


def as_computed(run: Run, device: torch.device) -> Run:
    """`run` with the base as this machine computes it; see compose.arithmetic."""
    run, said = settled(run, device)
    if said:
        log.warning("%s", said)
    return run


def refuse(run: Run) -> None:
    """Raises Unshared for what no pack can hold."""
    reasons = {
        "8-bit optimizers": run.optim.kind != "adamw",
        # its outlier columns depend on all rows of a batch
        "an int8 base": run.model.quant == "int8",
        "penalties": bool(run.penalties),
    }
    for what, there in reasons.items():
        if there:
            raise Unshared(f"{what} cannot share a pack", fix="set sweep.pack=off")


def check(run: Run, job: Job, first: Run, data_hash: str) -> None:
    """Raises ConfigError unless `run` shares the base, the targets and the data of `first`'s
    pack."""
    refuse(run)
    same = {
        "model": run.model == first.model,
        "seed": run.model.init == "pretrained" or run.seed == first.seed,
        "methods.0.targets": run.methods[0].targets == first.methods[0].targets,
        "objective": run.objective == first.objective,
        "train.precision": run.train.precision == first.train.precision,
        "train.gradient_checkpointing": run.train.gradient_checkpointing
        == first.train.gradient_checkpointing,
        "data.packing": run.data.packing <= first.data.packing,  # else the model was not probed
        "the data": job.data_hash == data_hash,
    }
    different = [name for name, equal in same.items() if not equal]
    if different:
        raise ConfigError(f"{run.name} differs from its pack in {', '.join(different)}")


def rows_of(run: Run) -> int:
    """Rows of a micro-batch, as data/stream.py splits a step."""
    pieces = -(-run.train.global_batch // run.train.micro_batch)
    return -(-run.train.global_batch // pieces)


def claim_of(run: Run, row: Row, corpus: Corpus) -> Claim:
    """What a trial needs at most."""
    length = run.data.max_length if run.data.packing else int(corpus.train.lengths.max())
    method = run.methods[0]
    kind = (method.dropout > 0, method.dora)
    return Claim(row.layout.size, row.rows, length, method.rank, kind)


def find_room(room: Room, name: str, claim: Claim, others: list[Claim]) -> None:
    """Raises NoRoom where `claim` does not fit beside the others, InfeasibleError where it would
    not fit alone."""
    limit = f"{room.limit / 2**30:.2f}"
    alone, need = room.need([claim]), room.need([*others, claim])
    if alone > room.limit:
        raise InfeasibleError(
            f"{name} needs {alone / 2**30:.2f} GiB, its pack has {limit}",
            fix="lower train.micro_batch, data.max_length or methods.0.rank",
        )
    if need > room.limit:
        raise NoRoom(f"{name} would take its pack to {need / 2**30:.2f} GiB of {limit}")


def weighed(room: Room, model: PackedModel, slot: Slot, claim: Claim, others: list[Claim]) -> None:
    """Measure a trial that may keep more per token than those before it, before it is in, and look
    again whether there is room. Raises as `find_room` does."""
    if room.knows(claim):
        return
    try:
        weigh(model, slot, claim, room)
    except torch.OutOfMemoryError as error:
        if model.device.type == "cuda":
            torch.cuda.empty_cache()  # what the attempt took must not starve the others
        if others:
            raise NoRoom(f"{slot.trial} ran out of memory beside {len(others)} others") from error
        raise InfeasibleError(
            f"{slot.trial} runs out of memory, alone in its pack",
            fix="lower train.micro_batch, data.max_length or methods.0.rank",
        ) from error
    find_room(room, slot.trial, claim, others)


def make_slot(
    job: Job,
    run: Run,
    start: Start,
    row: Row,
    corpus: Corpus,
    shared: Built,
    eval_batches: tuple[Batch, ...],
    optimizer: Optimizer,
    facts: Mapping[str, Any],
) -> Slot:
    """A trial around `row`, which is on a shelf; not begun. `shared`: what all trials of the pack
    have in common."""
    groups = tuple(replace(one, params=(row.params[one.name],)) for one in start.groups)
    made = optimizer(list(groups), run.optim)
    device = row.params["lora_A"].device
    stream = train_stream(run, corpus, shared.tokenizer.pad_token_id)
    parts = Parts(
        run=run,
        built=replace(shared, methods=start.methods, groups=groups),
        engine=SlotEngine(row, start, made, device),
        stream=stream,
        eval_batches=eval_batches,
        tasks=corpus.tasks,
        steps=steps_of(run, stream),
        params_total=start.params_total,
        params_trainable=start.params_trainable,
    )
    storage = Storage.open(run.storage).child(run.name)
    generators = SlotGenerators(device)
    session = Session(job, parts, storage, Quiet(), time.monotonic(), generators=generators)
    record = record_of(storage, run, job, facts)
    lane, movement = Lane(session.writer), Movement(parts.engine.group_of(), device)
    return Slot(run.name, run, row, session, made, generators, lane, record, movement)


def begin(slot: Slot, source: str | None, base: Mapping[str, float]) -> None:
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


def _clone(slot: Slot, source: str) -> None:
    """The state of another trial's checkpoint, committed under this trial's name."""
    commit = slot.session.clone(source, slot.schedule)
    slot.charged = float(commit.extra(0).get("charged", 0.0))
    best = slot.session.progress.best
    slot.lane.write(slot.hold(best is not None))
    slot.lane.settle()
