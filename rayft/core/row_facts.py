"""What is known of rows before any of their tokens is looked at.

The training data is a pure function of the step, so every rank knows these facts of the *whole*
global batch without asking the others, and without making batches of the others' tokens. Objectives
count from them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class RowFacts:
    """Of n rows, in host memory."""

    trained: Tensor  # (n,) float64, trained targets; float64 counts exactly and sums exactly
    lengths: Tensor  # (n,) int64, real tokens
    task: Tensor  # (n,) int64, index into the run's task names
    trial: Tensor  # (n,) int64, slot of a pack; 0 in a solo run
    columns: Mapping[str, Tensor] = field(default_factory=dict)  # (n,), those that are per row
