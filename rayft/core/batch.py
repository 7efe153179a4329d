"""Batch: the one thing that travels from data to objective.

Shape legend, used everywhere: B rows of a micro-batch, T tokens of a row, V vocabulary, H hidden
size.
A row holds one document, or several packed ones; all documents of a row belong to one task and one
trial.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from rayft.core.row_facts import RowFacts

IGNORE = -100  # the label of a position that is not trained, as in torch's cross_entropy


@dataclass(frozen=True)
class Batch:
    """One micro-batch of token rows, padded on the right.

    `labels[b, t]` is the token that position t itself holds where it is trained, IGNORE elsewhere
    (the Hugging Face convention: the loss predicts labels[:, t] from position t - 1). The first
    token of
    a document is never a label, so nothing is predicted across a document border.
    """

    input_ids: Tensor  # (B, T) int64
    labels: Tensor  # (B, T) int64
    position_ids: Tensor  # (B, T) int64, restarts at 0 with every packed document
    lengths: Tensor  # (B,) int64, real tokens of each row (the rest is padding)
    task: Tensor  # (B,) int64, index into the run's task names
    trial: Tensor  # (B,) int64, slot of a pack; 0 in a solo run
    packed: bool  # True: rows may hold several documents, attention must not cross them
    predicting: Tensor | None = None  # (N,) int64, `trained_positions` of a batch that was moved

    @property
    def rows(self) -> int:
        """B."""
        return self.input_ids.shape[0]

    def targets(self) -> Tensor:
        """(B, T - 1) int64: what positions 0..T-2 must predict."""
        return self.labels[:, 1:]

    def tokens(self) -> Tensor:
        """(B,) float64: trained targets per row. float64 counts exactly and sums exactly."""
        return (self.targets() != IGNORE).sum(dim=1).to(torch.float64)

    def facts(self) -> RowFacts:
        """What an objective counts from; of a batch in host memory."""
        return RowFacts(self.tokens(), self.lengths, self.task, self.trial)

    def trained_positions(self) -> Tensor:
        """(N,) int64: where in the flattened (B T) positions something is predicted. How many
        there are the host must know: looking for them on a device would make it wait."""
        if self.predicting is not None:
            return self.predicting
        following = functional.pad(self.targets(), (0, 1), value=IGNORE).flatten()
        return (following != IGNORE).nonzero().squeeze(1)

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`; the host does not wait."""
        found = replace(self, predicting=self.trained_positions())
        return replace(
            found, **{name: to_device(each, device) for name, each in found.tensors().items()}
        )

    def tensors(self) -> dict[str, Tensor]:
        """The tensor fields by name; wrappers (DDP, DeepSpeed) carry plain dicts of tensors
        best."""
        tensors = {
            "input_ids": self.input_ids,
            "labels": self.labels,
            "position_ids": self.position_ids,
            "lengths": self.lengths,
            "task": self.task,
            "trial": self.trial,
        }
        return tensors if self.predicting is None else tensors | {"predicting": self.predicting}


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`. A copy from pageable memory waits until the GPU has done all that was
    asked of it before, whatever `non_blocking` says; one from pinned memory does not."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
