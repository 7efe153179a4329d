"""What training/ and an attempt at a run tell each other: plain data, and three calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

from rayft.records.run_progress import RunProgress, RunSize

Item = TypeVar("Item")
Made = TypeVar("Made")


@dataclass(frozen=True)
class PreparedData:
    """The tokenised data of a run."""

    uri: str  # of the cache
    hash: str  # of what was tokenised; names the tables in the cache
    stats: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """By split: rows, tokens, cut, dropped, bad (TokenTable.summary)."""
    bad_rows: bytes = b""  # bad_rows.jsonl


@dataclass(frozen=True)
class AttemptJob:
    """Everything an attempt needs; plain, picklable data."""

    config: dict[str, Any]  # Run.resolved()
    digest: str  # Run.digest(), compared on all ranks before the first step
    attempt: str  # part of checkpoint names, so that two attempts can never merge
    data_dir: str  # PreparedData.uri
    data_hash: str  # PreparedData.hash
    source: str = ""  # checkpoint folder of another run to begin from, if this one has none yet
    export: bool = True  # write the hub layout at the end
    lease: str = ""  # the driver's claim; metrics are written while no other one has the run
    insist: bool = True  # stop where all commits are damaged; else begin again at step 0


@dataclass(frozen=True)
class AttemptOutcome:
    """What an attempt came to; the same on every rank."""

    status: str  # "done" | "interrupted"
    progress: RunProgress
    size: RunSize
    peak_memory: int = 0  # bytes, largest over ranks
    seconds: float = 0.0  # of this attempt, start-up included


EventKind = Literal["start", "step", "eval", "save", "warn", "note", "export"]


@dataclass(frozen=True)
class ProgressEvent:
    """What happens in a run, as its driver hears of it; plain, picklable data."""

    kind: EventKind
    step: int = 0  # finished optimizer steps
    steps: int = 0  # of the whole run; 0: not said
    text: str = ""  # of a warning or a note
    numbers: dict[str, float] = field(default_factory=dict)
    """Of a step (loss, grad_norm, tokens, tokens_per_s, memory, seconds) or an evaluation
    (eval_loss, eval_ppl, eval_loss/TASK)."""
    lr: dict[str, float] = field(default_factory=dict)  # of a step, by parameter group
    groups: tuple[str, ...] = ()  # at the start: names of the parameter groups
    params_total: int = 0  # at the start
    params_trainable: int = 0  # at the start


class DriverSignals(Protocol):
    """The worker's line to the driver."""

    def stop_requested(self) -> bool:
        """True once the driver asked for a stop; cheap enough for every step."""
        ...

    def progress(self, event: ProgressEvent) -> None:
        """Send one event, fire and forget; rank 0 only."""
        ...


class TaskMapper(Protocol):
    """Applies a module-level function to many small work items, somewhere; results in order."""

    def __call__(self, function: Callable[[Item], Made], items: Sequence[Item]) -> list[Made]: ...
