"""What a pack and whoever drives it tell each other: plain data, and one refusal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rayft.core.errors import ConfigError, RayftError
from rayft.records.run_record import Status

HostStatus = Status | Literal["moved", "lost"]
"""moved: it is committed and out; lost: its pack broke, and what was not committed is gone. In both
its client has to enter again."""


@dataclass(frozen=True)
class TrialReport:
    """What a trial says after an evaluation, and at its end."""

    trial: str
    step: int
    metrics: dict[str, float]
    """All of the last evaluation (eval_loss, eval_ppl, eval_loss/TASK, ...), and: loss (of the last
    step), base_loss (eval_loss of the base model), tokens (trained targets so far), seconds (engine
    seconds charged to this trial so far, its share of packed steps), params_trainable, memory
    (bytes charged to it: a pack's peak over its slots; on its own the run's peak)."""
    status: HostStatus = "running"
    error: str = ""


class NoRoom(RayftError):
    """A pack has no slot, or no memory, for this trial now; it has when another one leaves."""


class UnsharedBase(ConfigError):
    """No trials can share this base, or these targets; each of them can still run on its own."""
