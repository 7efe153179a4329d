"""Pack: N LoRA trials on one frozen base, each of them the run it would have been alone.

One thread drives it. A step is one optimizer step of every trial that is in: the micro-batches of
all of them go through the base together, clipping and AdamW are each trial's own. Trials join and
leave between two steps. A trial's folder holds what its own run would leave there.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
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
from rayft.trials.forward import PackedModel
from rayft.trials.initial import FreshAdapter, fresh_adapter, shared_copy
from rayft.trials.memory import MemoryBudget, memory_limit, model_bytes
from rayft.trials.meter import PackMeter
from rayft.trials.rank_bucket import TrialAdapter
from rayft.trials.scoring import HeldOut
from rayft.trials.slot import Optimizer, TrialSlot
from rayft.trials.step import isolated, solo_seconds, step_trials
from rayft.trials.types import HostStatus, NoRoom, TrialReport


class Pack:
    """See the head of this file.

    Args:
        run: of any trial: the base model, the targets, the objective and the data are read from it.
        data_dir, data_hash: compose.job.PreparedData.uri and .hash.
        slots: trials at a time.
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
        memory: int | None = None,
        facts: Mapping[str, object] | None = None,
        divergence: float = 1.5,
        optimizer: Optimizer = build_optimizer,
    ) -> None:
        began = time.perf_counter()
        hush()
        refuse_missing_backward()
        admission.refuse_unpackable(run)
        self.run, self.device, self.slots = run, device, slots
        self._data_hash, self._facts, self._divergence = data_hash, dict(facts or {}), divergence
        self._optimizer = optimizer
        self._corpus = open_corpus(run, data_dir, data_hash)
        self._load()
        batches = held_out(run, self._corpus, self._built, 0, 1)
        self._held_out = HeldOut(batches, self._corpus.tasks)
        self._slots: dict[str, TrialSlot] = {}
        self._meter, evaluated = PackMeter(), time.perf_counter()
        self.base = self._held_out.base(self._model)
        self._meter.alone_eval_seconds = time.perf_counter() - evaluated
        self._budget = MemoryBudget(device, self._bytes, memory or memory_limit(device))
        self._meter.start_seconds = time.perf_counter() - began

    def _load(self) -> None:
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
        self._built = BuiltModel(self._template, tokenizer, (), (), objective, step.policy, step)

    # ---- who is in

    @property
    def trials(self) -> tuple[str, ...]:
        """Ids of the trials that are in."""
        return tuple(self._slots)

    @property
    def free(self) -> int:
        """Free slots."""
        return self.slots - len(self._slots)

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
        if run.name in self._slots:
            raise ConfigError(f"{run.name} is in this pack already")
        if not self.free:
            raise NoRoom(f"all {self.slots} slots of the pack are taken")
        start = fresh_adapter(self._template, run)
        adapter = start.adapter(admission.micro_batch_rows(run))
        others = [
            admission.memory_claim(slot.run, slot.adapter, self._corpus)
            for slot in self._slots.values()
        ]
        claim = admission.memory_claim(run, adapter, self._corpus)
        admission.check_memory(self._budget, run.name, claim, others)
        self._model.buckets.add(adapter, start.flat(adapter.layout))
        try:
            slot = self._made(job, run, start, adapter)
            try:
                admission.measure_memory(self._budget, self._model, slot, claim, others)
                admission.restore_or_start(slot, source, self.base)
            except BaseException:
                slot.abandon().result()
                raise
        except BaseException:
            self._model.buckets.drop(adapter)
            raise
        self._slots[slot.trial] = slot
        if not self._meter.alone_step_seconds:
            self._meter.alone_step_seconds = solo_seconds(self._model, slot)
        return slot.step

    def _made(
        self, job: AttemptJob, run: Run, start: FreshAdapter, adapter: TrialAdapter
    ) -> TrialSlot:
        shared = (self._corpus, self._built, self._held_out.batches, self._optimizer, self._facts)
        return admission.make_slot(job, run, start, adapter, *shared)

    def leave(self, trial: str, status: Status = "interrupted", *, keep: bool) -> Future[None]:
        """Free the slot at once. `keep`: its best state is committed and stays, else its
        checkpoints go; metrics.jsonl and run.json, which says `status`, stay.

        Returns:
            Done when nothing in its folder is written or deleted any more; the others train on
            meanwhile. A StorageError where the files could not be written.
        """
        return self._drop(self._slots[trial], status, keep, None)

    def move(self, trial: str) -> Future[None]:
        """`leave`, with its present state committed: it goes on in another pack."""
        slot = self._slots[trial]
        slot.commits.write(slot.snapshot(best=False))
        return self._drop(slot, "interrupted", True, None)

    def commit(self, trial: str) -> str:
        """Its present state, durable on return; the address of the checkpoint folder.

        Raises:
            StorageError: it could not be written.
        """
        slot = self._slots[trial]
        slot.commits.write(slot.snapshot(best=False))
        slot.commits.settle()
        name = folder_name(slot.step, slot.session.job.attempt)
        return slot.session.storage.child(FOLDER, name).uri

    def close(self) -> None:
        """Commit everyone who is still in, then let go."""
        gone = [self.move(trial) for trial in self.trials]
        wait(gone)
        for one in gone:
            one.result()

    def _drop(
        self, slot: TrialSlot, status: Status, keep: bool, error: RayftError | None
    ) -> Future[None]:
        state = slot.last() if keep else None
        del self._slots[slot.trial]
        self._model.buckets.drop(slot.adapter)
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
        """One optimizer step of every trial, then the evaluations that are due. A trial that ends
        has left its slot and its files are durable when it is told."""
        # One that was cut off between its last commit and its end came back with nothing to do.
        over = [slot for slot in self._slots.values() if slot.step >= slot.schedule.total]
        if over or not self._slots:
            return [self._ended(slot, {}, slot.metrics(0.0)) for slot in over]
        slots, began = list(self._slots.values()), time.perf_counter()
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
        better = self._evaluate(due, broken)
        self._meter.charge(stepped, time.perf_counter() - began)
        for slot in slots:
            if slot not in broken:
                with isolated(slot, broken):
                    slot.save(slot in better)
        share = peak_memory(self.device) / len(slots)
        over = [slot for slot in slots if slot in broken or slot.step == slot.schedule.total]
        reports = [self._ended(slot, broken, slot.metrics(share)) for slot in over]
        going = [slot for slot in due if slot not in over]
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

    def _evaluate(
        self, due: Sequence[TrialSlot], broken: dict[TrialSlot, RayftError]
    ) -> set[TrialSlot]:
        """Evaluate and log; those whose state is their best so far. A loss far above the base's
        goes to `broken`."""
        if not due or not self._held_out.batches:
            return set()
        better, start = set(), self.base["eval_loss"]
        scores = self._held_out.score(self._model, [slot.adapter for slot in due])
        for slot, found in zip(due, scores, strict=True):
            with isolated(slot, broken):
                if slot.session.judge(slot.step, found):
                    better.add(slot)
                if not found["eval_loss"] <= self._divergence * start:
                    raise DivergedError(
                        f"held-out loss {found['eval_loss']:.4g}, the base model has {start:.4g}",
                        where=f"step {slot.step}",
                        cause=f"above {self._divergence:g} times the base model's",
                        fix="lower optim.lr or optim.clip",
                    )
        return better
