"""One trial of a pack: what `compose` gives a run that has the process to itself, around a row of a
bucket."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from rayft.compose.gradient_check import GroupMovement, no_gradient
from rayft.compose.job import ProgressEvent
from rayft.compose.loop import StepResult, StepSchedule, check_finite
from rayft.compose.session import RunSession
from rayft.compose.step import PREFIX
from rayft.config.run import OptimSpec, Run
from rayft.core.protocols import ParamGroup
from rayft.core.shards import PARAM, ParamSlice, ShardReader, StateShard
from rayft.records.run_record import RunRecord, Status
from rayft.strategies.optim import MOMENTS, adam_state, read_lrs, set_lrs
from rayft.strategies.slices import STEP, check_shapes
from rayft.trials.commit_queue import CommitQueue, StateSnapshot
from rayft.trials.initial import FreshAdapter
from rayft.trials.memory import MemoryClaim
from rayft.trials.rank_bucket import TrialAdapter
from rayft.trials.trial_folder import RECORD, delete_checkpoints

log = logging.getLogger(__name__)

Optimizer = Callable[[list[ParamGroup], OptimSpec], torch.optim.Optimizer]


@dataclass(frozen=True)
class TrialStep:
    """One optimizer step of one trial."""

    loss: float  # nats per counted unit, before the update
    norm: float  # of the gradient, before clipping
    tokens: int  # trained targets
    seen: int  # all real tokens


class QuietSignals:
    """compose.job.DriverSignals of a trial: nobody asks it to stop, warnings are logged."""

    def stop_requested(self) -> bool:
        """Never: a trial leaves its pack instead."""
        return False

    def progress(self, event: ProgressEvent) -> None:
        """Only warnings matter here; the pack tells the rest."""
        if event.kind == "warn":
            log.warning("step %s: %s", event.step, event.text)


class SlotGenerators:
    """Dropout of one trial, seeded as a run of its own seeds the process."""

    def __init__(self, device: torch.device) -> None:
        self.cpu = torch.Generator()
        self.used = self.cpu if device.type == "cpu" else torch.Generator(device)

    def state(self) -> dict[str, Tensor]:
        state = {"rng.cpu": self.cpu.get_state()}
        return state if self.used is self.cpu else state | {"rng.cuda": self.used.get_state()}

    def restore(self, state: dict[str, Tensor], seed: int) -> None:
        for generator, name in ((self.cpu, "rng.cpu"), (self.used, "rng.cuda")):
            if name in state:
                generator.set_state(state[name])
            elif "rng.cpu" not in state or generator is not self.cpu:
                generator.manual_seed(seed)


class SlotEngine:
    """What RunSession needs of core.protocols.Engine: state in and out, rates. The steps are the
    pack's."""

    rank, world = 0, 1

    def __init__(
        self,
        adapter: TrialAdapter,
        start: FreshAdapter,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
    ) -> None:
        self.adapter, self.optimizer, self.device = adapter, optimizer, device
        self._names, self._layers = start.names, start.layers

    def lrs(self) -> dict[str, float]:
        """Learning rates by group name."""
        return read_lrs(self.optimizer)

    def shard(self) -> StateShard:
        """Names, shapes and kinds of a run of its own; copies in host memory."""
        by_kind = {
            kind: self._parts({g: t.detach().to("cpu", copy=True) for g, t in groups.items()})
            for kind, groups in self._flat().items()
        }
        slices = {
            name: ParamSlice(
                tuple(param.shape), 0, {kind: by_kind[kind][name].reshape(-1) for kind in by_kind}
            )
            for name, param in by_kind[PARAM].items()
        }
        first = next(iter(self.adapter.params.values()))
        return StateShard(slices, scalars={STEP: float(adam_state(self.optimizer, first)["step"])})

    @torch.no_grad()
    def load(self, reader: ShardReader) -> None:
        """Parameters and moments from any shards.

        Raises:
            StorageError: they are of another rank or other targets.
        """
        flat = self._flat()
        shapes = {name: tuple(t.shape) for name, t in self._parts(flat[PARAM]).items()}
        check_shapes(reader, shapes)
        for kind, groups in flat.items():
            for name, tensor in self._parts(groups).items():
                tensor.copy_(reader.read(name, kind, 0, tensor.numel()).view(tensor.shape))
        for param in self.adapter.params.values():
            adam_state(self.optimizer, param)["step"].fill_(reader.scalars[STEP])

    def group_of(self, layers: Sequence[int] | None = None) -> dict[str, str]:
        """{name in the step module: group} of all layers, or of some."""
        chosen = range(len(self._names)) if layers is None else layers
        return {PREFIX + n: group for i in chosen for group, n in self._names[i].items()}

    def params(self) -> dict[str, Tensor]:
        """{name in the step module: parameter without padding, a view}."""
        return self._parts({group: param.detach() for group, param in self.adapter.params.items()})

    def _flat(self) -> dict[str, dict[str, Tensor]]:
        """{kind: {group: flat padded tensor}}."""
        params = self.adapter.params
        found = {PARAM: {group: param.detach() for group, param in params.items()}}
        for kind in MOMENTS:
            found[kind] = {g: adam_state(self.optimizer, p)[kind] for g, p in params.items()}
        return found

    def _parts(self, groups: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """{name in the step module: unpadded view}."""
        return {
            PREFIX + names[group]: tensor
            for names, one in zip(self._names, self.adapter.parts(groups), strict=True)
            for group, tensor in one.items()
        }


@dataclass(eq=False)
class TrialSlot:
    """One trial that is in."""

    trial: str
    run: Run
    adapter: TrialAdapter
    claim: MemoryClaim
    session: RunSession[SlotEngine]
    optimizer: torch.optim.Optimizer
    generators: SlotGenerators
    commits: CommitQueue
    record: RunRecord
    movement: GroupMovement | None  # until it has been looked at
    charged: float = 0.0  # engine seconds
    starting: bool = True  # no step yet since it came in
    unreached: list[int] = field(default_factory=list)  # layers without a gradient in its first one
    loss: float = math.nan  # of the last step

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.session.progress.step

    @property
    def schedule(self) -> StepSchedule:
        """When it evaluates and saves."""
        train = self.run.train
        return StepSchedule(self.session.parts.steps, train.eval_every, train.save_every)

    def update(self, grads: Tensor, loss: float, norm: float) -> None:
        """Clip `grads` (size,), this trial's row, and do one optimizer step; nothing where loss or
        norm is not finite. strategies.optim.clip_gradients is the same for a run of its own; it
        measures the norm itself, and here that would stop the device once per trial."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return
        clip = self.run.optim.clip
        if clip is not None and clip / (norm + 1e-6) < 1.0:
            grads.mul_(clip / (norm + 1e-6))
        set_lrs(self.optimizer, self.session.parts.lrs(self.step + 1))
        self.optimizer.step()

    def snapshot(self, best: bool) -> StateSnapshot:
        """Its present state in host memory."""
        shard, extra = self.session.state(self.step)
        return StateSnapshot(self.step, shard, extra | {"charged": self.charged}, best)

    def write_record(self, status: Status, error: str = "") -> None:
        """run.json."""
        session = self.session
        record = self.record.advanced(session.progress, session.parts.size)
        seconds = round(session.seconds(), 3)
        self.record = replace(record, status=status, error=error, seconds=seconds)
        session.storage.write_text(RECORD, self.record.to_json())

    def finish_step(self, stepped: TrialStep, seconds: float) -> None:
        """One more step is done: check, count and log it.

        Raises:
            DivergedError, DeadGradientError, StorageError: of this trial alone.
        """
        self.loss, step = stepped.loss, self.step + 1
        check_finite(step, stepped.loss, stepped.norm)
        self._check_gradients(step, stepped.tokens)
        session = self.session
        session.progress.step = step
        session.progress.tokens += stepped.tokens
        facts = (session.parts.engine.lrs(), stepped.tokens, stepped.seen)
        session.log(step, StepResult(self.loss, stepped.norm, *facts), seconds)

    def _check_gradients(self, step: int, tokens: int) -> None:
        engine, self.starting = self.session.parts.engine, False
        if self.unreached:
            dead, total = engine.group_of(self.unreached), len(engine.group_of())
            raise no_gradient(dead, total, f"{self.trial}, step {step}")
        if self.movement is not None:
            self.movement.look(step, engine.lrs(), tokens, engine.params)
            self.movement = self.movement if self.movement.looking else None

    def save(self, best: bool) -> None:
        """Hold the best state; commit when a commit is due (at the end: `end`)."""
        every = self.run.train.save_every
        asked = every is not None and self.step % every == 0
        if self.step < self.schedule.total and (asked or self.commits.due):
            self.commits.write(self.snapshot(best))
        elif best:
            self.commits.keep(self.snapshot(best=True))

    def metrics(self, memory: float) -> dict[str, float]:
        progress = self.session.progress
        base = {"base_loss": progress.base["eval_loss"]} if progress.base else {}
        return {
            **progress.eval,
            **base,
            "loss": self.loss,
            "tokens": float(progress.tokens),
            "seconds": self.charged,
            "params_trainable": float(self.session.parts.params_trainable),
            "memory": memory,
        }

    def last(self) -> StateSnapshot | None:
        """What is still to be held when it leaves: its present state, if none was ever the
        best."""
        return self.snapshot(False) if self.session.progress.best is None else None

    def end(
        self, status: Status, state: StateSnapshot | None, *, keep: bool, error: str = ""
    ) -> Future[None]:
        """Leave its files as a run that ended so. `keep`: with commits of the best state that waits
        and of `state`, else without checkpoints.

        Returns:
            Done when they are durable; a StorageError where they could not be written.
        """
        if keep:
            self.commits.write(state)
        else:
            self.commits.forget()
        return self.commits.close(lambda: self._leave_files(status, keep, error))

    def _leave_files(self, status: Status, keep: bool, error: str) -> None:
        """In the thread of its commits, behind them."""
        try:
            if keep:
                self.commits.settle()
            else:
                delete_checkpoints(self.session.storage)
            self.write_record(status, error)
        finally:
            self.session.abandon()

    def abandon(self) -> Future[None]:
        """Write no more; done when the write under way is."""
        self.commits.forget()
        return self.commits.close(self.session.abandon)
