"""What is trainable: one technique per file. `build` maps a spec of the menu to its
implementation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rayft.config.base import Spec
from rayft.config.methods import FullSpec, LoraSpec, MethodSpec
from rayft.config.traits import SITES
from rayft.core.protocols import Method
from rayft.methods.apply import apply_all
from rayft.methods.full import Full
from rayft.methods.lora import Lora

IMPLEMENTATIONS: dict[type[Spec], Callable[[Any], Method]] = {FullSpec: Full, LoraSpec: Lora}


def build(spec: MethodSpec) -> Method:
    """The method that `spec` describes."""
    return IMPLEMENTATIONS[type(spec)](spec)


def build_all(specs: Sequence[MethodSpec]) -> tuple[Method, ...]:
    """The methods of a run in the order in which they are applied: by site, the weights first."""
    return tuple(build(spec) for spec in sorted(specs, key=lambda one: SITES.index(one.site)))


__all__ = ["IMPLEMENTATIONS", "apply_all", "build", "build_all"]
