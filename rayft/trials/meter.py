"""What a pack measures of itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from rayft.trials.slot import TrialSlot
from rayft.trials.step import TrialStep


@dataclass
class PackMeter:
    """Sums since the pack was opened; seconds are wall clock."""

    start_seconds: float = 0.0  # opening: model, data, evaluation of the base
    alone_step_seconds: float = 0.0  # forward and backward of the first trial's first step, apart
    alone_eval_seconds: float = 0.0  # evaluation of the base
    steps: float = 0.0
    seconds: float = 0.0  # stepping and evaluating
    busy: float = 0.0  # slot-seconds of these
    tokens: float = 0.0  # seen

    def charge(self, stepped: Mapping[TrialSlot, TrialStep], seconds: float) -> None:
        """Share the seconds of a packed step by tokens."""
        seen = sum(one.seen for one in stepped.values())
        for slot, one in stepped.items():
            slot.charged += seconds * one.seen / max(seen, 1)
        self.steps += 1
        self.seconds += seconds
        self.busy += seconds * len(stepped)
        self.tokens += seen

    def numbers(self) -> dict[str, float]:
        """All of them, by name."""
        return asdict(self)
