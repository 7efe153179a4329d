"""Pack: N LoRA trials on one frozen base, each of them the run it would have been alone.

One thread drives it. A step is one optimizer step of every trial that is in: the micro-batches of
all of them go through the base together, clipping and AdamW are each trial's own. Trials join and
leave between two steps. A trial's folder holds what its own run would leave there.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from concurrent.futures import Future, wait

import torch

from rayft import objectives
from rayft.checkpoint.manifest import FOLDER, folder_name
from rayft.compose.assemble import BuiltModel, held_out
from rayft.compose.data import open_corpus
from rayft.compose.gradient_check import refuse_missing_backward
from rayft.compose.job import AttemptJob
from rayft.compose.session import peak_memory
from rayft.config.run import Run
from rayft.core.errors import (
    ConfigError,
    DeadGradientError,
    DivergedError,
    RayftError,
    StorageError,
)
from rayft.models.load import check_vocabulary, load_model
from rayft.models.quiet import hush
from rayft.models.tokenizer import load_tokenizer
from rayft.records.run_record import Status
from rayft.strategies.optim import build_optimizer
from rayft.trials import admission
from rayft.trials.commit_queue import CommitThreads
from rayft.trials.forward import PackedModel
from rayft.trials.initial import fresh_adapter, shared_copy
from rayft.trials.memory import MemoryBudget, host_memory, memory_limit, model_bytes
from rayft.trials.meter import PackMeter
from rayft.trials.scoring import HeldOut
from rayft.trials.slot import Optimizer, TrialSlot
from rayft.trials.slot_table import SlotTable
from rayft.trials.step import isolated, solo_seconds, step_trials
from rayft.trials.types import HostStatus, NoRoom, TrialReport


class Pack:
    """See the head of this file.

    Args:
        run: of any trial: the base model, the targets, the objective and the data are read from it.
        data_dir, data_hash: compose.job.PreparedData.uri and .hash.
        slots: trials that train at a time.
        waiting: trials beyond them, which take turns with them at evaluations (slot_table.py).
        memory: bytes the pack may use; default all of the device that nobody else holds.
        facts: "versions" and "hardware" for run.json.
        divergence: a held-out loss above this times the base model's is a diverged trial.
        optimizer: makes a trial's optimizer from its groups.

    Raises:
        ConfigError: this base, these targets or this data cannot be shared.
    """

    def __init__(
        self,
        run: Run,
        data_dir: str,
        data_hash: str,
        device: torch.device,
        *,
        slots: int,
        waiting: int = 0,
        memory: int | None = None,
        facts: Mapping[str, object] | None = None,
        divergence: float = 1.5,
        optimizer: Optimizer = build_optimizer,
    ) -> None:
        began = time.perf_counter()
        hush()
        refuse_missing_backward()
        admission.refuse_unpackable(run)
        self.run, self.device, self.slots, self.waiting = run, device, slots, waiting
        self._data_hash, self._divergence = data_hash, divergence
        corpus = open_corpus(run, data_dir, data_hash)
        self._longest = int(corpus.train.lengths.max())
        built = self._load()
        batches = held_out(run, corpus, built, 0, 1)
        self._held_out = HeldOut(batches, corpus.tasks)
        self._shared = admission.SharedParts(
            corpus, built, batches, optimizer, dict(facts or {}), CommitThreads()
        )
        self._table = SlotTable(self._model.buckets, slots, waiting)
        self._meter, evaluated = PackMeter(), time.perf_counter()
        self.base = self._held_out.base(self._model)
        self._meter.alone_eval_seconds = time.perf_counter() - evaluated
        self._budget = MemoryBudget(
            device,
            self._bytes,
            memory or memory_limit(device),
            slots=slots,
            pass_tokens=self._model.pass_tokens,
            host_limit=host_memory(),
        )
        self._meter.start_seconds = time.perf_counter() - began

    def _load(self) -> BuiltModel:
        run = admission.with_precision(self.run, self.device)
        tokenizer = load_tokenizer(run.model)
        recomputes = run.train.gradient_checkpointing
        model = load_model(
            run.model, device=self.device, seed=run.seed, gradient_checkpointing=recomputes
        )
        check_vocabulary(model, tokenizer)
        self._bytes = model_bytes(model)
        self._template = shared_copy(model)
        start = fresh_adapter(self._template, run)
        objective = objectives.build(run.objective)
        self._model = PackedModel(
            model,
            start.layers,
            objective,
            self.device,
            packing=run.data.packing,
            autocast=run.arithmetic == "bf16",
            recomputes=recomputes,
        )
        step = self._model.step
        return BuiltModel(self._template, tokenizer, (), (), objective, step.policy, step)

    # ---- who is in

    @property
    def trials(self) -> tuple[str, ...]:
        """Ids of the trials that are in."""
        return tuple(self._table.all)

    @property
    def parked(self) -> tuple[str, ...]:
        """Of these, who has no slot now; who has waited longest comes first."""
        return tuple(self._table.parked)

    @property
    def free(self) -> int:
        """How many more trials may come."""
        return self._table.free

    def admit(self, job: AttemptJob, source: str | None = None) -> int:
        """Take a trial in; the step it continues from.

        It goes on from the newest commit of its own folder, else from `source` (the address of
        another trial's checkpoint; its state under this trial's settings, committed at once under
        its own name), else from the start.

        Raises:
            NoRoom: no slot or no memory now.
            ConfigError: it does not belong into this pack.
            InfeasibleError: it would not fit even alone.
        """
        run = Run.model_validate(job.config)
        admission.check_same_pack(run, job, self.run, self._data_hash)
        if run.name in self._table.all:
            raise ConfigError(f"{run.name} is in this pack already")
        if not self.free:
            places = f" and {self.waiting} places to wait in" if self.waiting else ""
            raise NoRoom(f"all {self.slots} slots{places} of the pack are taken")
        start = fresh_adapter(self._template, run)
        adapter = start.adapter(admission.micro_batch_rows(run))
        claim = admission.memory_claim(run, adapter, self._longest)
        admission.check_memory(self._budget, run.name, claim, self._table.load)
        self._model.buckets.add(adapter, start.flat(adapter.layout))
        try:
            slot = admission.make_slot(job, run, start, adapter, claim, self._shared)
            try:
                admission.measure_memory(self._budget, self._model, slot, self._table.load)
                admission.restore_or_start(slot, source, self.base)
            except BaseException:  # its files and threads go with it
                slot.abandon().result()
                raise
        except BaseException:  # nor does it keep a row of the bucket
            self._model.buckets.drop(adapter)
            raise
        if not self._meter.alone_step_seconds:
            self._meter.alone_step_seconds = solo_seconds(self._model, slot)
        self._table.enter(slot)
        return slot.step

    def park(self, trial: str) -> None:
        """Take a trial out of its slot, with its state kept, until `resume`: it can be committed
        and can leave as others, but has no turn. One that waits gets the slot."""
        self._table.park(trial)

    def resume(self, trial: str) -> None:
        """It waits for a slot again, and has it at once where one is free."""
        self._table.resume(trial)

    def leave(self, trial: str, status: Status = "interrupted", *, keep: bool) -> Future[None]:
        """Free the slot at once. `keep`: its best state is committed and stays, else its
        checkpoints go; metrics.jsonl and run.json, which says `status`, stay.

        Returns:
            Done when nothing in its folder is written or deleted any more; the others train on
            meanwhile. A StorageError where the files could not be written.
        """
        return self._drop(self._table.all[trial], status, keep, None)

    def move(self, trial: str) -> Future[None]:
        """`leave`, with its present state committed: it goes on in another pack."""
        slot = self._table.all[trial]
        slot.commits.write(slot.snapshot(best=False))
        return self._drop(slot, "interrupted", True, None)

    def commit(self, trial: str) -> str:
        """Its present state, durable on return; the address of the checkpoint folder.

        Raises:
            StorageError: it could not be written.
        """
        slot = self._table.all[trial]
        slot.commits.write(slot.snapshot(best=False))
        slot.commits.settle()
        name = folder_name(slot.step, slot.session.job.attempt)
        return slot.session.storage.child(FOLDER, name).uri

    def close(self) -> None:
        """Commit everyone who is still in, then let go."""
        # those without a slot first: nobody is to get one now
        gone = [self.move(trial) for trial in (*self.parked, *self._table.resident)]
        wait(gone)
        for one in gone:
            one.result()

    def _drop(
        self, slot: TrialSlot, status: Status, keep: bool, error: RayftError | None
    ) -> Future[None]:
        state = slot.last() if keep else None
        self._table.remove(slot)
        if isinstance(error, StorageError):
            return slot.abandon()  # what is in its folder stays; nothing can be written there
        # a failed trial's commits stay, and no state that trained wrongly joins them
        return slot.end(status, state, keep=keep or status == "failed", error=str(error or ""))

    def stats(self) -> dict[str, float]:
        """What PackMeter has, slots, and memory (bytes)."""
        memory = float(peak_memory(self.device))
        return {**self._meter.numbers(), "slots": self.slots, "memory": memory}

    # ---- steps

    def step(self) -> list[TrialReport]:
        """One optimizer step of every trial that has a slot, then the evaluations that are due, and
        turns (slot_table.py). A trial that ends has left its slot and its files are durable when it
        is told."""
        # One that was cut off between its last commit and its end came back with nothing to do.
        over = [slot for slot in self._table.all.values() if slot.step >= slot.schedule.total]
        if over or not self._table.resident:
            return [self._ended(slot, {}, slot.metrics(0.0)) for slot in over]
        slots, began = list(self._table.resident.values()), time.perf_counter()
        try:
            stepped = step_trials(self._model, slots)
        except DeadGradientError as error:  # of the base that all of them train on
            return [self._ended(slot, {slot: error}, slot.metrics(0.0)) for slot in slots]
        seconds = time.perf_counter() - began
        broken: dict[TrialSlot, RayftError] = {}
        for slot in slots:
            with isolated(slot, broken):
                slot.finish_step(stepped[slot], seconds)
        due = [s for s in slots if s not in broken and s.schedule.evaluates(s.step)]
        limits = (self.base.get("eval_loss", math.nan), self._divergence)
        better = self._held_out.judge(self._model, due, limits, broken)
        self._meter.charge(stepped, time.perf_counter() - began)
        for slot in sorted(slots, key=lambda one: one.commits.since):
            if slot not in broken:
                with isolated(slot, broken):
                    slot.save(slot in better)
        share = peak_memory(self.device) / len(slots)
        over = [slot for slot in slots if slot in broken or slot.step == slot.schedule.total]
        reports = [self._ended(slot, broken, slot.metrics(share)) for slot in over]
        going = [slot for slot in due if slot not in over]
        self._table.take_turns(going)
        return [*reports, *(TrialReport(s.trial, s.step, s.metrics(share)) for s in going)]

    def _ended(
        self, slot: TrialSlot, broken: dict[TrialSlot, RayftError], metrics: dict[str, float]
    ) -> TrialReport:
        """Take it out. Where its files cannot be written it has failed; the others stay."""
        status: HostStatus = "done"
        if slot in broken:
            status = "diverged" if isinstance(broken[slot], DivergedError) else "failed"
        with isolated(slot, broken):
            error = broken.get(slot)
            gone = self._drop(slot, status, status == "done", error)
            if not isinstance(error, StorageError):
                gone.result()
        if status == "done" and slot in broken:
            status = "failed"
        return TrialReport(slot.trial, slot.step, metrics, status, str(broken.get(slot, "")))
