"""The contracts between the rooms. No room imports another; they meet only through these.

Method      what is trainable                Strategy / Engine  how a step happens
Objective   what is minimised                Stream             rows -> micro-batches, by step
Policy      the model as an objective sees it
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from rayft.core.batch import Batch
from rayft.core.row_facts import RowFacts
from rayft.core.shards import ShardReader, StateShard

if TYPE_CHECKING:  # a type alone: this room needs torch and nothing else
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class ParamGroup:
    """Parameters that share a learning rate and a weight decay.

    `name` is stable over restarts ("lora_B", "decay", "no_decay") and unique in a run; the learning
    rate of the
    group is lr(step) * lr_ratio; `decay` False means weight decay 0.
    """

    name: str
    params: tuple[nn.Parameter, ...]
    lr_ratio: float = 1.0
    decay: bool = True


class Method(Protocol):
    """What is trainable. Everything is frozen before the first method is applied."""

    keeps_base: bool  # True: the base weights never change, so `off` gives the base model back

    def apply(self, model: PreTrainedModel) -> list[ParamGroup]:
        """Change `model` in place, set requires_grad on what trains, return it in groups (never an
        empty one)."""
        ...

    def off(self, model: nn.Module) -> AbstractContextManager[None]:
        """Inside the context the model computes what the base computes (only where
        `keeps_base`)."""
        ...

    def export(self, model: PreTrainedModel, state: Mapping[str, Tensor], folder: Path) -> None:
        """Write hub format into `folder`: `state` holds the full trained tensors by parameter
        name."""
        ...


class Policy(Protocol):
    """The model as objectives see it; knows how to avoid whole logits."""

    def row_nll(self, batch: Batch, scale: Tensor) -> Tensor:
        """(B,) float32 summed negative log-likelihood of the labels of each row, in nats.

        `scale` (B,): what the loop will multiply each row by before backward. A loss that is linear
        in the nll
        can so form the head's gradient in the forward pass. The result itself is *not* scaled.
        """
        ...


class Objective(Protocol):
    """What is minimised: per-row sums, and counts that the data alone decides."""

    terms: tuple[str, ...]

    def count(self, rows: RowFacts) -> dict[str, Tensor]:
        """{term: (n,) float64}: what the sums of `loss` will be divided by, before any forward
        pass. From facts, not from tokens: every rank counts the rows of all ranks."""
        ...

    def loss(self, policy: Policy, batch: Batch, scale: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """{term: (B,) float32} sums per row. `scale[term]` (B,) is 1 / the global count, as known
        beforehand."""
        ...


class BatchStream(Protocol):
    """The training data as a pure function of the step: the cursor of a resumed run is its step
    number."""

    def window(self, step: int, rank: int, world: int) -> list[Batch]:
        """This rank's micro-batches of `step` (1-based). Every rank gets the same number; a rank
        without rows left
        gets a batch that trains nothing (all labels IGNORE)."""
        ...

    def facts(self, step: int) -> RowFacts:
        """Of all rows of `step`, of every rank."""
        ...


class Evaluator(Protocol):
    """The part of an Engine that evaluation needs."""

    @property
    def device(self) -> torch.device: ...

    def forward(self, batch: Batch, scale: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The objective's rows, computed inside the wrapped module."""
        ...

    def evaluating(self) -> AbstractContextManager[None]:
        """No gradients, eval mode; `forward` inside."""
        ...


class StateHolder(Protocol):
    """The part of an Engine that a session keeps, logs and restores."""

    @property
    def rank(self) -> int: ...
    @property
    def world(self) -> int: ...
    @property
    def device(self) -> torch.device: ...

    def lrs(self) -> dict[str, float]:
        """Learning rates by group name, as the optimizer itself holds them."""
        ...

    def shard(self) -> StateShard:
        """This rank's part of the state (live references, no copies)."""
        ...

    def load(self, reader: ShardReader) -> None:
        """Restore parameters and optimizer from shards written by any world size and any
        strategy."""
        ...


class Engine(Evaluator, StateHolder, Protocol):
    """A prepared model, its gradients and its optimizer on this rank."""

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate gradients of `loss`, which is this rank's part of the global mean: gradients
        are *summed* over
        ranks. `last` marks the step's last micro-batch."""
        ...

    def step(self, lrs: Mapping[str, float]) -> Tensor:
        """Clip, update with these learning rates by group name, zero the gradients; the norm before
        clipping, a scalar on the device. An update with a non-finite norm is not applied."""
        ...

    def full(self) -> Iterator[tuple[str, Tensor]]:
        """(name, full tensor on CPU) of every trained parameter; collective: every rank must
        iterate to the end."""
        ...


class Strategy(Protocol):
    """How a step happens."""

    quant_storage: torch.dtype | None  # dtype that 4-bit codes must be stored as; None: any

    def loading(self) -> AbstractContextManager[None]:
        """Entered while the model is created (ZeRO-3 creates it sharded)."""
        ...

    def prepare(self, step: nn.Module, groups: list[ParamGroup]) -> Engine:
        """Wrap `step` (forward(tensors, packed, scale) -> rows) for training."""
        ...
