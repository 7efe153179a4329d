"""One base, many trials: a batch of all of them goes through the model together.

    loss_n = sum over rows b of trial n of  sums[b] / (what trial n counts in its step)

Each trial's micro-batch keeps its rows; shorter ones are padded on the right to the longest.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rayft.compose.step import TrainStep
from rayft.core.batch import Batch, joined_batch
from rayft.core.protocols import Objective
from rayft.core.reduce import scales, trial_losses
from rayft.models.policy import CausalPolicy
from rayft.trials.adapter_layout import LayerSize
from rayft.trials.batch_layout import BatchLayout, LayoutHolder, TrialDropout, TrialSegment
from rayft.trials.packed_lora import PackedLinear
from rayft.trials.rank_bucket import BucketSet, TrialAdapter
from rayft.trials.types import UnsharedBase

PASS_TOKENS = {"cpu": 8_192, "cuda": 32_768}
"""Of one forward pass, padding included. Where many trials are in, a step takes several passes, so
that their activations need not fit together; products gain nothing from more rows by then."""


@dataclass(frozen=True, eq=False)
class TrialBatch:
    """One trial's part of a batch."""

    adapter: TrialAdapter
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
        UnsharedBase: the model draws dropout of its own, or adapts its output head.
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
        self.buckets = BucketSet(layers, device, dtype)
        self._current = LayoutHolder(torch.zeros((), device=device, requires_grad=True))
        head = model.get_output_embeddings()
        for index, layer in enumerate(layers):
            base = model.get_submodule(layer.name)
            if base is head:
                raise UnsharedBase(
                    "an adapter on the output head cannot share a pack",
                    fix="leave the head out of targets, or set sweep.pack=off",
                )
            model.set_submodule(layer.name, PackedLinear(base, index, layer, self._current))
        _refuse_dropout(model)
        self.step = TrainStep(CausalPolicy(model, packing=packing), objective)
        self.step.train()
        self._recomputes = recomputes
        self.most_tokens = 0  # of a training batch so far, padding included
        self.pass_tokens = PASS_TOKENS[device.type]

    # ---- an Engine of the base alone

    def forward(self, batch: Batch, scale: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rows of the step module: {term: (B,)}."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._autocast):
            return self.step(batch.inputs(), dict(scale))

    def measure(self, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """What the objective measures; inside `evaluating`."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._autocast):
            return self.step(batch.inputs(), None)

    @contextmanager
    def evaluating(self) -> Generator[None]:
        """No gradients, eval mode."""
        self.step.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.step.train()

    # ---- trials

    def in_order(self, parts: Sequence[TrialBatch]) -> list[TrialBatch]:
        """As the buckets have them: neighbours share products."""
        order = self.buckets.order()
        return sorted(parts, key=lambda part: order[part.adapter])

    def arranged(self, parts: Sequence[TrialBatch]) -> tuple[Batch, BatchLayout, list[TrialBatch]]:
        """Their rows as one batch (`trial`: the place in the list that comes back), and its
        layout; in the order of the buckets."""
        places = self.buckets.places()
        parts = self.in_order(parts)
        batch = joined_batch([part.batch for part in parts])
        segments: list[TrialSegment] = []
        first = 0
        for part in parts:
            bucket, index = places[part.adapter]
            rows, drops = part.batch.rows, ()
            if part.adapter.dropout > 0:
                own = part.batch.input_ids.shape[1]
                drops = (TrialDropout(part.adapter.dropout, part.generator, rows, own),)
            one = TrialSegment(bucket, index, index + 1, first, first + rows, drops)
            if segments and segments[-1].takes(one):
                one = segments.pop().joined(one)
            segments.append(one)
            first += rows
        masks = {} if self._recomputes else None
        return batch, BatchLayout(first, batch.input_ids.shape[1], tuple(segments), masks), parts

    def train(
        self, parts: Sequence[TrialBatch], totals: Mapping[TrialAdapter, Tensor]
    ) -> dict[TrialAdapter, Tensor]:
        """Forward and backward of one micro-batch of each trial: gradients go to the buckets, the
        trials' shares of their losses (scalars on the device) come back.

        Args:
            totals: (terms,) float64: what each trial counts in its whole step.
        """
        batch, layout, parts = self.arranged(parts)
        self.most_tokens = max(self.most_tokens, batch.input_ids.numel())
        counted = torch.stack([totals[part.adapter] for part in parts], dim=1)
        batch = batch.to(self.device)
        scale = scales(self.objective, batch, counted)
        self._current.layout = layout
        try:  # activations may be computed again in the backward pass: it needs the layout too
            losses = trial_losses(self.forward(batch, scale), scale, batch.trial, len(parts))
            losses.sum().backward()
        finally:
            self._current.layout = None
        shares = losses.detach().double()
        return {part.adapter: shares[index] for index, part in enumerate(parts)}

    def measure_trials(
        self, adapters: Sequence[TrialAdapter], batch: Batch
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """{name: (sums, counts), each (trials, B)}: what the objective measures of every row of
        `batch` under each trial's adapter. Call it inside `evaluating`."""
        parts = [TrialBatch(adapter, batch, _NOBODY) for adapter in adapters]
        joined, layout, parts = self.arranged(parts)
        self._current.layout = layout
        try:
            found = self.measure(joined.to(self.device))
        finally:
            self._current.layout = None
        place = {part.adapter: index for index, part in enumerate(parts)}
        order = [place[adapter] for adapter in adapters]
        trials = len(adapters)
        return {
            name: (sums.view(trials, -1)[order], counts.view(trials, -1)[order])
            for name, (sums, counts) in found.items()
        }


def cut_into_passes(parts: Iterable[TrialBatch], most: int) -> Generator[list[TrialBatch]]:
    """Neighbours whose joined batch has at most `most` tokens, padding included, or one trial's
    part that has more."""
    taken: list[TrialBatch] = []
    rows = length = 0
    for part in parts:
        rows, length = rows + part.batch.rows, max(length, part.batch.input_ids.shape[1])
        if taken and rows * length > most:
            yield taken
            taken, (rows, length) = [], part.batch.input_ids.shape
        taken.append(part)
    if taken:
        yield taken


_NOBODY = torch.Generator()  # nothing is drawn in evaluations


def _refuse_dropout(model: PreTrainedModel) -> None:
    """The base's own dropout would draw from one generator for all trials."""
    config = model.config.get_text_config().to_dict()
    drawn = [
        key
        for key, value in config.items()
        if isinstance(value, float) and value > 0 and ("dropout" in key or key.endswith("pdrop"))
    ]
    if drawn:
        raise UnsharedBase(
            f"the base model has dropout of its own ({drawn[0]}), so its trials cannot share it",
            fix="set sweep.pack=off",
        )
