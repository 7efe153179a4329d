"""One base, many trials: a batch of all of them goes through the model together.

    loss_n = sum over rows b of trial n of  sums[b] / (what trial n counts in its step)

Each trial's micro-batch keeps its rows; shorter ones are padded on the right to the longest, which
neither attention nor the loss sees.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rayft.compose.step import TrainStep
from rayft.core.batch import IGNORE, Batch
from rayft.core.protocols import Objective
from rayft.core.reduce import scales, trial_losses
from rayft.models.policy import CausalPolicy
from rayft.trials.packed_lora import PackedLinear
from rayft.trials.seating import Bunch, Desk, Drop, Seating
from rayft.trials.shelf import LayerSize, Row, Shelves
from rayft.trials.types import Unshared


@dataclass(frozen=True, eq=False)
class Guest:
    """One trial's part of a batch."""

    row: Row
    batch: Batch
    generator: torch.Generator


class PackedModel:
    """The base with its target layers replaced; also the Engine that evaluates the base alone.

    Args:
        model: frozen, on `device`; it is changed in place.
        layers: what to adapt.
        packing: see CausalPolicy.
        autocast: arithmetic in bfloat16.
        recomputes: activations are computed again in the backward pass.

    Raises:
        Unshared: the model draws dropout of its own, or adapts its output head.
    """

    rank, world = 0, 1

    def __init__(
        self,
        model: PreTrainedModel,
        layers: tuple[LayerSize, ...],
        objective: Objective,
        device: torch.device,
        *,
        packing: bool,
        autocast: bool,
        recomputes: bool = False,
    ) -> None:
        dtype = next(model.parameters()).dtype
        dtype = dtype if dtype == torch.float64 else torch.float32
        self.device, self.objective, self._autocast = device, objective, autocast
        self.shelves = Shelves(layers, device, dtype)
        self._desk = Desk(torch.zeros((), device=device, requires_grad=True))
        head = model.get_output_embeddings()
        for index, layer in enumerate(layers):
            base = model.get_submodule(layer.name)
            if base is head:
                raise Unshared(
                    "an adapter on the output head cannot share a pack",
                    fix="leave the head out of targets, or set sweep.pack=off",
                )
            model.set_submodule(layer.name, PackedLinear(base, index, layer, self._desk))
        _refuse_dropout(model)
        self.step = TrainStep(CausalPolicy(model, packing=packing), objective)
        self.step.train()
        self._recomputes = recomputes
        self.most_tokens = 0  # of a training batch so far, padding included

    # ---- an Engine of the base alone

    def forward(self, batch: Batch, scale: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rows of the step module: {term: (B,)}."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._autocast):
            return self.step(batch.tensors(), batch.packed, dict(scale))

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """No gradients, eval mode."""
        self.step.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.step.train()

    # ---- trials

    def arranged(self, guests: Sequence[Guest]) -> tuple[Batch, Seating, list[Guest]]:
        """Their rows as one batch (`trial`: the place in the list that comes back), and who sits
        where; in the order of the shelves."""
        places = self.shelves.places()
        order = {row: number for number, row in enumerate(places)}
        guests = sorted(guests, key=lambda guest: order[guest.row])
        batch = together([guest.batch for guest in guests])
        bunches: list[Bunch] = []
        first = 0
        for guest in guests:
            shelf, index = places[guest.row]
            rows, drops = guest.batch.rows, ()
            if guest.row.dropout > 0:
                own = guest.batch.input_ids.shape[1]
                drops = (Drop(guest.row.dropout, guest.generator, rows, own),)
            one = Bunch(shelf, index, index + 1, first, first + rows, drops)
            if bunches and bunches[-1].takes(one):
                one = bunches.pop().joined(one)
            bunches.append(one)
            first += rows
        masks = {} if self._recomputes else None
        return batch, Seating(first, batch.input_ids.shape[1], tuple(bunches), masks), guests

    def run(self, batch: Batch, seating: Seating, scale: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rows of a batch of trials: {term: (B,)}."""
        self._desk.seating = seating
        try:
            return self.forward(batch, scale)
        finally:
            self._desk.seating = None

    def train(self, guests: Sequence[Guest], totals: Mapping[Row, Tensor]) -> dict[Row, Tensor]:
        """Forward and backward of one micro-batch of each guest: gradients go to the shelves, the
        trials' parts of their losses (scalars on the device) come back.

        Args:
            totals: (terms,) float64: what each trial counts in its whole step.
        """
        batch, seating, guests = self.arranged(guests)
        self.most_tokens = max(self.most_tokens, batch.input_ids.numel())
        counted = torch.stack([totals[guest.row] for guest in guests], dim=1)
        batch = batch.to(self.device)
        scale = scales(self.objective, batch, counted)
        self._desk.seating = seating
        try:  # activations may be computed again in the backward pass: it needs the seating too
            losses = trial_losses(self.forward(batch, scale), scale, batch.trial, len(guests))
            losses.sum().backward()
        finally:
            self._desk.seating = None
        parts = losses.detach().double()
        return {guest.row: parts[index] for index, guest in enumerate(guests)}

    def sums(self, rows: Sequence[Row], batch: Batch) -> Tensor:
        """(terms, trials, B) float64 on the CPU: sums of every row of `batch` under each trial's
        adapter. Call it inside `evaluating`."""
        guests = [Guest(row, batch, _NOBODY) for row in rows]
        joined, seating, guests = self.arranged(guests)
        joined = joined.to(self.device)
        ones = torch.ones(joined.rows, device=self.device)
        found = self.run(joined, seating, dict.fromkeys(self.objective.terms, ones))
        place = {guest.row: index for index, guest in enumerate(guests)}
        order = [place[row] for row in rows]
        stacked = torch.stack([found[term] for term in self.objective.terms])
        return stacked.view(len(found), len(rows), -1).to("cpu", torch.float64)[:, order]


_NOBODY = torch.Generator()  # nothing is drawn in evaluations


def together(batches: Sequence[Batch]) -> Batch:
    """One batch; `trial` is the number of the batch a row comes from."""
    length = max(batch.input_ids.shape[1] for batch in batches)
    wide = [_widened(batch, length) for batch in batches]
    fields = {
        name: torch.cat([batch.tensors()[name] for batch in wide]) for name in batches[0].tensors()
    }
    trial = torch.repeat_interleave(
        torch.arange(len(batches)), torch.tensor([batch.rows for batch in batches])
    )
    return Batch(**{**fields, "trial": trial}, packed=any(batch.packed for batch in batches))


def _widened(batch: Batch, length: int) -> Batch:
    """Padding on the right, one more document where rows are packed (see data/collate.py)."""
    have = batch.input_ids.shape[1]
    more = length - have
    if more == 0:
        return batch
    pad = torch.nn.functional.pad
    rest = torch.arange(more) if batch.packed else torch.arange(have, length)
    return replace(
        batch,
        input_ids=pad(batch.input_ids, (0, more)),
        labels=pad(batch.labels, (0, more), value=IGNORE),
        position_ids=torch.cat([batch.position_ids, rest.expand(batch.rows, -1)], dim=1),
    )


def _refuse_dropout(model: PreTrainedModel) -> None:
    """The base's own dropout would draw from one generator for all trials."""
    config = model.config.get_text_config().to_dict()
    drawn = [
        key
        for key, value in config.items()
        if isinstance(value, float) and value > 0 and ("dropout" in key or key.endswith("pdrop"))
    ]
    if drawn:
        raise Unshared(
            f"the base model has dropout of its own ({drawn[0]}), so its trials cannot share it",
            fix="set sweep.pack=off",
        )
