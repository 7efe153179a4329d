"""What is minimised: one objective per file."""

from __future__ import annotations

from rayft.config.objectives import LmSpec, ObjectiveSpec, SftSpec
from rayft.core.protocols import Objective
from rayft.objectives.lm import Lm
from rayft.objectives.sft import Sft

OBJECTIVES = {SftSpec: Sft, LmSpec: Lm}


def build(spec: ObjectiveSpec) -> Objective:
    """The objective that `spec` describes."""
    return OBJECTIVES[type(spec)](spec)


__all__ = ["OBJECTIVES", "build"]
