"""The contracts between the rooms. No room imports another; they meet only through these.

Method      what is trainable                Strategy / Engine  how a step happens
Objective   what is minimised                Stream             rows -> micro-batches, by step
Policy      the model as an objective sees it
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from rayft.core.batch import Batch
from rayft.core.row_facts import RowFacts
from rayft.core.shards import ShardReader, StateShard

if TYPE_CHECKING:  # types alone: this room needs torch and nothing else
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class ParamGroup:
    """Parameters that share a learning rate and a weight decay.

    `name` is stable over restarts ("lora_B", "decay", "no_decay") and unique in a run; the learning
    rate of the group is lr(step) * lr_ratio; `decay` False means weight decay 0.
    """

    name: str
    params: tuple[nn.Parameter, ...]
    lr_ratio: float = 1.0
    decay: bool = True


class Delta(Protocol):
    """What a method adds to one weight: W = W0 + delta, (o, i)."""

    @property
    def name(self) -> str:
        """Of the weight in the base model."""
        ...

    @property
    def shape(self) -> tuple[int, int]:
        """(o, i)."""
        ...

    def factors(self) -> tuple[Tensor, Tensor]:
        """L (o, k) and R (k, i) with delta = L R, for as long as nothing trains; gradients flow."""
        ...

    def norm_sq(self) -> Tensor:
        """Scalar ||delta||_F^2, without the (o, i) matrix; gradients flow."""
        ...

    def dense(self) -> Tensor:
        """(o, i); gradients flow."""
        ...


FullParams = Callable[[], Iterator[tuple[str, Tensor]]]
"""(name, full tensor on CPU) of every trained parameter; collective: every rank must iterate to the
end."""


class Method(Protocol):
    """What is trainable. Everything is frozen before the first method is applied; methods are
    applied in the order of their site (config/traits.py)."""

    def apply(self, model: PreTrainedModel) -> list[ParamGroup]:
        """Change `model` in place, set requires_grad on what trains, return it in groups (never an
        empty one)."""
        ...

    def kept(self, model: nn.Module) -> dict[str, Tensor]:
        """Frozen tensors that are the method's own and not the base's, by parameter or buffer name:
        they are saved once with every checkpoint, and a run continues only where they are equal."""
        ...

    def before(self, step: int, full: FullParams) -> None:
        """Called before each step (1-based) on every rank; `full` gives the trained parameters."""
        ...

    def deltas(self, model: nn.Module) -> Iterator[Delta]:
        """What is added to each weight; nothing where the spec's `deltas` says no."""
        ...

    def off(self, model: nn.Module) -> AbstractContextManager[None]:
        """Inside the context the model computes what the base computes (only where the spec's
        `keeps_base` says so)."""
        ...

    def merge(self, model: PreTrainedModel) -> None:
        """Make what it has learnt part of the weights of `model`, whose base is not quantised, in
        place; its own modules are gone afterwards (only where the spec's `merges` says so)."""
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
        in the nll can so form the head's gradient in the forward pass. The result itself is *not*
        scaled.
        """
        ...


@dataclass(frozen=True)
class LossContext:
    """What an objective may look at besides the trained model and the batch.

    Attributes:
        peer: the reference or teacher, where the spec's `reference` asks for one.
    """

    peer: Policy | None = None


class Objective(Protocol):
    """What is minimised: per-row sums, and counts that the batch alone decides.

    loss = sum over terms of weight * (sum over rows of `loss`) / (sum over rows of `count`)
    """

    @property
    def metrics(self) -> tuple[str, ...]:
        """What an evaluation reports, as the spec declares it."""
        ...

    @property
    def terms(self) -> Mapping[str, float]:
        """{term: its weight in the loss, above 0}; the order is that of every table of terms."""
        ...

    def head(self, width: int) -> nn.Module | None:
        """What takes the vocabulary's place above hidden states of `width`; None: nothing does."""
        ...

    def count(self, rows: RowFacts) -> dict[str, Tensor]:
        """{term: (n,) float64}: what the sums of `loss` will be divided by, before any forward
        pass. From facts, not from tokens: every rank counts the rows of all ranks."""
        ...

    def loss(
        self, policy: Policy, batch: Batch, scale: Mapping[str, Tensor], context: LossContext
    ) -> dict[str, Tensor]:
        """{term: (B,) float32} sums per row. `scale[term]` (B,) is weight / the global count, as
        known beforehand."""
        ...

    def measure(
        self, policy: Policy, batch: Batch, context: LossContext
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """{name: (sums (B,), counts (B,))}, without gradients: every term of the loss, then what
        else an evaluation tells (accuracy, margin), each a sum over rows over a sum of counts."""
        ...


class BatchStream(Protocol):
    """The training data as a pure function of the step: the cursor of a resumed run is its step
    number."""

    def window(self, step: int, rank: int, world: int) -> list[Batch]:
        """This rank's micro-batches of `step` (1-based). Every rank gets the same number; a rank
        without rows left gets a batch that trains nothing (all labels IGNORE)."""
        ...

    def facts(self, step: int) -> RowFacts:
        """Of all rows of `step`, of every rank."""
        ...


class Evaluator(Protocol):
    """The part of an Engine that evaluation needs."""

    @property
    def device(self) -> torch.device: ...

    def measure(self, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """The objective's measures, computed inside the wrapped module."""
        ...

    def evaluating(self) -> AbstractContextManager[None]:
        """No gradients, eval mode; `measure` inside."""
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
        """Restore parameters and optimizer from shards of any world size and any strategy."""
        ...


class Engine(Evaluator, StateHolder, Protocol):
    """A prepared model, its gradients and its optimizer on this rank."""

    def forward(self, batch: Batch, scale: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The objective's rows, computed inside the wrapped module."""
        ...

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate gradients of `loss`, which is this rank's part of the global mean: gradients
        are *summed* over ranks. `last` marks the step's last micro-batch."""
        ...

    def step(self, lrs: Mapping[str, float]) -> Tensor:
        """Clip, update with these learning rates by group name, zero the gradients; the norm before
        clipping, a scalar on the device. An update with a non-finite norm is not applied."""
        ...

    def full(self) -> Iterator[tuple[str, Tensor]]:
        """See FullParams."""
        ...


class Strategy(Protocol):
    """How a step happens."""

    quant_storage: torch.dtype | None  # dtype that 4-bit codes must be stored as; None: any

    def loading(self) -> AbstractContextManager[None]:
        """Entered while the model is created (ZeRO-3 creates it sharded)."""
        ...

    def prepare(self, step: nn.Module, groups: list[ParamGroup]) -> Engine:
        """Wrap `step` (compose/step.py: TrainStep) for training."""
        ...
