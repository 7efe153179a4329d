"""Where a run stands and how large it is. A commit keeps a RunProgress, an attempt brings one home,
and a RunRecord takes it over (`RunRecord.advanced`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pydantic import TypeAdapter


@dataclass(frozen=True)
class BestEvaluation:
    """The best evaluation so far."""

    step: int
    metric: float
    checkpoint: str  # folder name below checkpoints/


@dataclass
class RunProgress:
    """Where a run stands; saved with every checkpoint, JSON only."""

    step: int = 0
    tokens: int = 0  # trained targets
    seconds: float = 0.0  # wall clock over all attempts, up to `step`
    base: dict[str, float] = field(default_factory=dict)  # evaluation before the first step
    eval: dict[str, float] = field(default_factory=dict)  # the last one, {"eval_loss": 2.1, ...}
    best: BestEvaluation | None = None

    @staticmethod
    def from_json(saved: Mapping[str, object]) -> RunProgress:
        """The inverse of `dataclasses.asdict`.

        Raises:
            ValidationError: it is something else.
        """
        return _PROGRESS.validate_python(saved)


@dataclass(frozen=True)
class RunSize:
    """What a run turns out to be once it is assembled."""

    steps_total: int
    params_total: int = 0
    params_trainable: int = 0


_PROGRESS = TypeAdapter(RunProgress)
