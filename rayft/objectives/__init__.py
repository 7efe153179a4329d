"""What is minimised: one objective per file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rayft.config.base import Spec
from rayft.config.objectives import LmSpec, ObjectiveSpec, SftSpec
from rayft.core.protocols import Objective
from rayft.objectives.lm import Lm
from rayft.objectives.sft import Sft

IMPLEMENTATIONS: dict[type[Spec], Callable[[Any], Objective]] = {SftSpec: Sft, LmSpec: Lm}


def build(spec: ObjectiveSpec) -> Objective:
    """The objective that `spec` describes."""
    return IMPLEMENTATIONS[type(spec)](spec)


__all__ = ["IMPLEMENTATIONS", "build"]
