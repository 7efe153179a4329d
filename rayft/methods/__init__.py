"""What is trainable: one technique per file. `build` maps a spec of the menu to its
implementation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rayft.config.base import Spec
from rayft.config.methods import FullSpec, LoraSpec, MethodSpec
from rayft.core.protocols import Method
from rayft.methods.apply import apply_all
from rayft.methods.full import Full
from rayft.methods.lora import Lora, load_adapter, merge_adapters

IMPLEMENTATIONS: dict[type[Spec], Callable[[Any], Method]] = {FullSpec: Full, LoraSpec: Lora}


def build(spec: MethodSpec) -> Method:
    """The method that `spec` describes."""
    return IMPLEMENTATIONS[type(spec)](spec)


__all__ = ["IMPLEMENTATIONS", "apply_all", "build", "load_adapter", "merge_adapters"]
