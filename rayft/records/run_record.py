"""RunRecord: what a run leaves behind for people and for report/; written to `<run>/run.json`.

Records carry a checksum of their values. A damaged one is never believed: commits (of a run) and
the ledger (of a sweep) hold what is needed to make it anew.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from typing import Any, Literal, TypeVar

from pydantic import TypeAdapter, ValidationError

from rayft.records.run_progress import BestEvaluation, RunProgress, RunSize
from rayft.storage.folder import Storage
from rayft.storage.sealed import BadRecord, seal, unseal

log = logging.getLogger(__name__)
T = TypeVar("T")
Status = Literal["running", "done", "stopped", "interrupted", "diverged", "failed"]
"""Of a run, of a trial and of a sweep. stopped: by a scheduler, for good; interrupted: it goes on
with the same command."""
ENDED: tuple[Status, ...] = ("done", "stopped", "diverged", "failed")
"""Of a trial to which nothing more will happen."""


@dataclass(frozen=True)
class RunRecord:
    """One run, as a row of facts. Seconds are wall clock over all attempts."""

    name: str
    status: Status
    config: dict[str, Any]  # Run.resolved()
    config_hash: str
    data_hash: str = ""
    seed: int = 0
    steps: int = 0
    steps_total: int = 0
    tokens: int = 0
    params_total: int = 0
    params_trainable: int = 0
    eval: dict[str, float] = field(default_factory=dict)
    """Last evaluation, e.g. {"eval_loss": 2.1, "eval_ppl": 8.2}."""
    base: dict[str, float] = field(default_factory=dict)  # the same before the first step
    best: BestEvaluation | None = None
    seconds: float = 0.0
    peak_memory: int = 0  # bytes, largest over ranks
    attempts: int = 0
    error: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    hardware: Mapping[str, object] = field(default_factory=dict)
    data: Mapping[str, object] = field(default_factory=dict)
    """By split: rows, tokens, cut, dropped, bad, in total and per source."""

    def advanced(self, progress: RunProgress, size: RunSize | None = None) -> RunRecord:
        """With how far the run has come, and how large it is where that is known; status, error
        and seconds are the caller's."""
        known = {} if size is None else vars(size)
        return replace(
            self,
            steps=progress.step,
            tokens=progress.tokens,
            eval=progress.eval,
            base=progress.base,
            best=progress.best,
            **known,
        )

    def to_json(self) -> str:
        """Stable, readable JSON."""
        return _to_json(self)

    @staticmethod
    def from_json(text: str | bytes) -> RunRecord:
        """The inverse of `to_json`; fields that a newer rayft wrote are ignored.

        Raises:
            BadRecord: it is damaged, or something else.
        """
        return _from_json(text, RunRecord)


def stored_record(run: Storage) -> RunRecord | None:
    """run.json of the run in this folder; None where it is gone, or damaged, which is logged."""
    try:
        return RunRecord.from_json(run.read_bytes("run.json"))
    except FileNotFoundError:
        return None
    except BadRecord as error:
        log.warning("%s is damaged: %s", run.shown("run.json"), error)
        return None


@dataclass(frozen=True)
class SweepWinner:
    """The best report of a sweep."""

    trial: str
    step: int
    metric: float
    params: dict[str, object]


@dataclass(frozen=True)
class SweepRecord:
    """One sweep: what the ledger does not say; written to `<sweep>/sweep.json`."""

    name: str
    status: Status
    config: dict[str, Any]  # Run.resolved(), sweep block included
    config_hash: str
    metric: str
    mode: str
    data_hash: str = ""
    base: dict[str, float] = field(default_factory=dict)  # evaluation of the base model
    best: SweepWinner | None = None
    refit: dict[str, object] | None = None  # {"metric", "step", "seconds"} of the winner's last run
    seconds: float = 0.0  # wall clock over all starts of the sweep
    cost: dict[str, float] = field(default_factory=dict)
    # "trial_seconds" engine seconds spent, "saved_by_stopping" and "saved_by_packing" seconds,
    # "start_seconds" a run of its own spends before its first step; how: report/savings
    prior: dict[str, Any] = field(default_factory=dict)  # earlier sweep -> taken, skipped, digest
    start: dict[str, float] = field(default_factory=dict)
    # seconds after which the first driver had "ray", "hosts" (their processes are asked for),
    # "data", "first trial" (Tune has its process), "first step" (of any trial), "first report"
    starts: int = 0  # of the driver
    params_total: int = 0
    stopped_by: str = ""  # what ended the search: trials | max_seconds | target | grid
    error: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    hardware: Mapping[str, object] = field(default_factory=dict)
    data: Mapping[str, object] = field(default_factory=dict)

    def to_json(self) -> str:
        """Stable, readable JSON."""
        return _to_json(self)

    @staticmethod
    def from_json(text: str | bytes) -> SweepRecord:
        """The inverse of `to_json`; see RunRecord.from_json."""
        return _from_json(text, SweepRecord)


def _to_json(record: RunRecord | SweepRecord) -> str:
    return seal(asdict(record))


def _from_json(text: str | bytes, kind: type[T]) -> T:
    raw = unseal(text.encode() if isinstance(text, str) else text)
    try:
        return _adapter(kind).validate_python(raw)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise BadRecord(f"{where}: {first['msg']}") from error


@cache  # building one takes milliseconds
def _adapter(kind: type[T]) -> TypeAdapter[T]:
    return TypeAdapter(kind)
