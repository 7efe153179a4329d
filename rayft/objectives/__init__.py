"""What is minimised: one objective per file."""

from __future__ import annotations

from rayft.config.objectives import LmSpec, ObjectiveSpec, SftSpec
from rayft.core.protocols import Objective
from rayft.objectives.lm import Lm
from rayft.objectives.sft import Sft

IMPLEMENTATIONS = {SftSpec: Sft, LmSpec: Lm}


def build(spec: ObjectiveSpec) -> Objective:
    """The objective that `spec` describes."""
    return IMPLEMENTATIONS[type(spec)](spec)


__all__ = ["IMPLEMENTATIONS", "build"]
