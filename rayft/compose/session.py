"""What surrounds the loop on one rank: restore, log, evaluate, save. Rank 0 writes the metrics."""

from __future__ import annotations

import contextlib
import math
import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Generic, Protocol, TypeVar

import torch
import torch.distributed as dist

from rayft.checkpoint.folders import all_damaged, damaged_names, give_up
from rayft.checkpoint.manifest import folder_name
from rayft.checkpoint.reader import Commit, donated_commit, find_commit, load_commit
from rayft.checkpoint.writer import REFUSED, CheckpointWriter
from rayft.compose.assemble import EngineT, RunParts
from rayft.compose.evaluate import evaluate
from rayft.compose.job import AttemptJob, DriverSignals, EventKind, ProgressEvent
from rayft.compose.kept import check_kept, stored_kept
from rayft.compose.loop import StepResult, StepSchedule
from rayft.core.address import above
from rayft.core.errors import PermanentStorageError, StorageError
from rayft.core.protocols import Engine
from rayft.core.shards import StateShard
from rayft.records.run_progress import BestEvaluation, RunProgress
from rayft.records.series import METRICS, missing_lines
from rayft.storage.folder import Storage
from rayft.storage.jsonl import LineAppender
from rayft.storage.lease import LeaseWatch

T = TypeVar("T")
_LAST_SAVE_SECONDS = 15.0


def decided_by_rank0(decide: Callable[[], T], rank: int, world: int) -> T:
    """What rank 0 decides, on every rank (plain picklable data)."""
    box: list[Any] = [decide() if rank == 0 else None]
    if world > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


def peak_memory(device: torch.device) -> int:
    """Bytes: largest GPU allocation so far, or on CPU the largest resident size of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def fresh_seed(seed: int, rank: int, step: int) -> int:
    """Of the generators of a rank that has no saved state at `step`."""
    return ((seed * 1_000_003 + step) * 4_099 + rank) % 2**63


class RandomGenerators(Protocol):
    """What draws random numbers while a run trains (dropout); data order needs none."""

    def state(self) -> dict[str, torch.Tensor]:
        """Small tensors for a checkpoint, by names that begin with `rng.`."""
        ...

    def restore(self, state: dict[str, torch.Tensor], seed: int) -> None:
        """Continue from `state`; without one in it begin from `seed`."""
        ...


@dataclass(frozen=True)
class GlobalGenerators:
    """Torch's own of this process: a run that has the process for itself."""

    device: torch.device

    def state(self) -> dict[str, torch.Tensor]:
        state = {"rng.cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            state["rng.cuda"] = torch.cuda.get_rng_state(self.device)
        return state

    def restore(self, state: dict[str, torch.Tensor], seed: int) -> None:
        if "rng.cpu" not in state:
            torch.manual_seed(seed)
            return
        torch.set_rng_state(state["rng.cpu"])
        if self.device.type == "cuda" and "rng.cuda" in state:
            torch.cuda.set_rng_state(state["rng.cuda"], self.device)


@dataclass
class RunSession(Generic[EngineT]):
    """The side effects of one attempt on one rank."""

    job: AttemptJob
    parts: RunParts[EngineT]
    storage: Storage  # of the run
    signals: DriverSignals
    began: float  # time.monotonic() when this attempt started
    progress: RunProgress = field(default_factory=RunProgress)
    earlier: float = 0.0  # seconds of the attempts before this one
    told: int = -1  # step of the last save that the driver knows of
    drawing: RandomGenerators | None = None  # default: this process's own

    def __post_init__(self) -> None:
        engine = self.parts.engine
        self.rank, self.world, self.device = engine.rank, engine.world, engine.device
        self.writer = CheckpointWriter(
            self.storage,
            self.rank,
            self.world,
            self.job.attempt,
            keep=self.parts.run.train.keep,
            config=self.job.digest,
        )
        self.generators: RandomGenerators = self.drawing or GlobalGenerators(self.device)
        self.lease = LeaseWatch(self.storage, self.job.lease)
        self.metrics = LineAppender(self.storage, METRICS) if self.rank == 0 else None

    # ---- restore

    def restore(self) -> Commit | None:
        """Continue from the newest commit that verifies; None when there is none.

        Raises:
            DamagedError: there are commits, and every one is damaged.
        """
        name, bad = decided_by_rank0(self._newest, self.rank, self.world)
        if bad:
            raise all_damaged(self.storage, bad)
        if name is None:
            self.generators.restore({}, fresh_seed(self.parts.run.seed, self.rank, 0))
            return None
        commit = load_commit(self.storage, name, verify=False)  # rank 0 has just verified it
        self.take(commit)
        self.writer.parent = commit.name
        if self.metrics is not None:
            for text in missing_lines(self.storage, commit.extra(0).get("lines", 0)):
                self._warn(commit.step, text)
        return commit

    def take(self, commit: Commit) -> None:
        """The state of `commit`: parameters, optimizer, generators, progress."""
        with commit.reader() as reader:
            check_kept(self.parts.kept, reader, commit.name)
            self.parts.engine.load(reader)
            saved = reader.whole(self.rank) if self.rank < commit.world else {}
            self.generators.restore(saved, fresh_seed(self.parts.run.seed, self.rank, commit.step))
        self.progress = RunProgress.from_json(commit.extra(0)["progress"])
        self.earlier = self.progress.seconds

    def clone(self, source: str, schedule: StepSchedule) -> Commit:
        """The state of another run's checkpoint, under this run's settings; not yet saved. The
        donor's best is not this run's: this state is its best where `schedule` evaluates it.

        Args:
            source: the checkpoint's folder; where it has been cleared away, the newest commit.
        """
        folder, name = above(source)
        donor = Storage.open(above(folder)[0])
        chosen = decided_by_rank0(lambda: donated_commit(donor, name), self.rank, self.world)
        commit = load_commit(donor, chosen, verify=False)  # rank 0 has just verified it
        self.take(commit)
        self.progress.best = None
        if schedule.evaluates(commit.step) and self.progress.eval:
            own, loss = folder_name(commit.step, self.job.attempt), self.progress.eval["eval_loss"]
            self.progress.best = BestEvaluation(commit.step, loss, own)
        return commit

    def _newest(self) -> tuple[str | None, list[str]]:
        """(name of the newest good commit, all of them where they are damaged)."""
        commit = find_commit(self.storage)
        if commit is not None:
            return commit.name, []
        bad = damaged_names(self.storage)
        if bad and not self.job.insist:
            give_up(self.storage)
            self._warn(0, f"all checkpoints are damaged ({', '.join(bad)}): begun again at step 0")
            bad = []
        return None, bad

    def _warn(self, step: int, text: str) -> None:
        self.signals.progress(ProgressEvent("warn", step, text=text))

    # ---- the loop's hooks

    def log(self, step: int, result: StepResult, seconds: float) -> None:
        """One line of metrics.jsonl and one progress event."""
        run = self.parts.run
        self._tell_saves(step)
        self.writer.check()
        if self.rank != 0 or (step % run.train.log_every and step != self.parts.steps):
            return
        line = {
            "step": step,
            "split": "train",
            "loss": result.loss,
            "lr": result.lrs,
            "grad_norm": result.grad_norm,
            "tokens": self.progress.tokens,
            "tokens_per_s": result.tokens_seen / seconds,
            "seconds": self.seconds(),
            "memory": peak_memory(self.device),
        }
        self._record("step", line)

    def evaluate(self: RunSession[Engine], step: int) -> bool:
        """Evaluate, log, and say whether it is the best so far. Step 0 is the base model."""
        parts = self.parts
        if not parts.eval_batches:
            return False
        found = evaluate(parts.engine, parts.built.objective, parts.eval_batches, parts.tasks)
        return self.judge(step, found)

    def judge(self, step: int, found: dict[str, float]) -> bool:
        """Log an evaluation; whether it is the best so far."""
        if step == 0:
            self.progress.base = found
        self.progress.eval = found
        if self.rank == 0:
            line = {"step": step, "split": "eval", "loss": found["eval_loss"], **found}
            self._record("eval", {**line, "seconds": self.seconds()})
        before = math.inf if self.progress.best is None else self.progress.best.metric
        if step == 0 or not found["eval_loss"] < before:  # NaN is never the best
            return False
        name = folder_name(step, self.job.attempt)
        self.progress.best = BestEvaluation(step, found["eval_loss"], name)
        return True

    def save(self, step: int, best: bool) -> None:
        """Snapshot the state and let the writer commit it in the background."""
        shard, extra = self.state(step)
        self.writer.save(step, shard, extra, best=best)
        self._tell_saves(step)

    def state(self, step: int) -> tuple[StateShard, dict[str, object]]:
        """What a checkpoint holds: live references, and JSON. The metrics so far are durable."""
        self.progress.seconds = self.seconds()
        shard = self.parts.engine.shard()
        extra: dict[str, object] = {
            "progress": asdict(self.progress),
            "data_hash": self.job.data_hash,
            "cursor": step,  # steps of the stream consumed: its order is a function of the step
            "accumulation": 0,  # saves happen at step borders only
        }
        if self.metrics is not None:
            self.metrics.flush()
            extra["lines"] = self.metrics.lines
        own = self.generators.state() | stored_kept(self.parts.kept, self.rank)
        return replace(shard, whole={**shard.whole, **own}), extra

    # ---- the end

    def finish(self) -> None:
        """Wait for the last commit; its failure is the run's."""
        self.writer.wait()
        self._tell_saves(self.progress.step)
        if self.metrics is not None:
            self.metrics.close()

    def abandon(self) -> None:
        """After an error: give a save under way a moment, keep what there is, raise nothing.

        A dead rank's manifest may never come, so the wait is short; the error itself matters more.
        """
        with contextlib.suppress(StorageError):
            self.writer.wait(timeout=_LAST_SAVE_SECONDS)
        with contextlib.suppress(StorageError):
            if self.metrics is not None:
                self.metrics.close()

    def seconds(self) -> float:
        """Wall clock of the run so far, without what was lost between attempts."""
        return self.earlier + time.monotonic() - self.began

    def _tell_saves(self, step: int) -> None:
        """Rank 0: what has become of the saves in the background; a save is told once committed."""
        if self.rank != 0:
            return
        problem = self.writer.poll()
        if problem is not None:
            text = f"a checkpoint was not written: {problem.what}"
            if isinstance(problem, PermanentStorageError):
                text += f"; after {REFUSED} in a row the run stops"
            self._warn(step, text)
        committed = self.writer.committed
        if committed != self.told:
            self.told = committed
            self.signals.progress(ProgressEvent("save", committed))

    def _record(self, kind: EventKind, line: Mapping[str, object]) -> None:
        """Rank 0: to storage and to the driver."""
        if self.metrics is not None:
            self.lease.check()
            self.metrics.append(line)
        numbers = {name: float(v) for name, v in line.items() if isinstance(v, int | float)}
        step, lrs = int(numbers.pop("step")), line.get("lr")
        lr = lrs if isinstance(lrs, dict) else {}
        self.signals.progress(ProgressEvent(kind, step, self.parts.steps, numbers=numbers, lr=lr))
