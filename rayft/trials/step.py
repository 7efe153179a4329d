"""One optimizer step of several trials: gradients together, clipping and AdamW each alone."""

from __future__ import annotations

import statistics
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from rayft.compose.gradient_check import dead_graphs_named
from rayft.core.batch import Batch
from rayft.core.errors import DeadGradientError, DivergedError, RayftError, StorageError
from rayft.core.reduce import counts
from rayft.trials.forward import PackedModel, TrialBatch, cut_into_passes
from rayft.trials.memory import MemoryBudget
from rayft.trials.rank_bucket import TrialAdapter
from rayft.trials.slot import TrialSlot, TrialStep

ALONE = 3  # timed steps of a trial by itself


@contextmanager
def isolated(slot: TrialSlot, broken: dict[TrialSlot, RayftError]) -> Generator[None]:
    """One trial's loss, adapters or files must not end the others: what is wrong with it goes to
    `broken`."""
    try:
        yield
    except (DeadGradientError, DivergedError, StorageError) as error:
        broken.setdefault(slot, error)


def step_trials(model: PackedModel, slots: Sequence[TrialSlot]) -> dict[TrialSlot, TrialStep]:
    """The next step of every trial. Where loss or norm is not finite nothing is applied, and the
    caller has to look; also at TrialSlot.unreached.

    Raises:
        DeadGradientError: the base they share passes no gradients on.
    """
    windows = {slot: slot.session.parts.stream.window(slot.step + 1, 0, 1) for slot in slots}
    losses = gradients(model, windows)
    places = model.buckets.places()
    norms = {
        bucket: torch.linalg.vector_norm(bucket.grads, dim=1).double()
        for bucket in model.buckets.all.values()
    }
    values = []
    for slot in slots:
        bucket, place = places[slot.adapter]
        values += [losses[slot.adapter], norms[bucket][place]]
    numbers = torch.stack(values).tolist()  # the one time a step waits for the device
    found = {}
    for index, slot in enumerate(slots):
        loss, norm = numbers[2 * index : 2 * index + 2]
        bucket, place = places[slot.adapter]
        slot.unreached = bucket.unreached(slot.adapter) if slot.starting else []
        slot.update(bucket.grads[place], loss, norm)
        facts = slot.session.parts.stream.facts(slot.step + 1)
        tokens, seen = int(facts.trained.sum()), int(facts.lengths.sum())
        found[slot] = TrialStep(loss, norm, tokens, seen)
    for bucket in model.buckets.all.values():
        bucket.updated()
    return found


def gradients(
    model: PackedModel, windows: Mapping[TrialSlot, list[Batch]]
) -> dict[TrialAdapter, Tensor]:
    """Fill the buckets with the gradients of whole windows; each trial's loss, on the device.

    Raises:
        DeadGradientError: the base passes no gradients on.
    """
    for bucket in model.buckets.all.values():
        bucket.forget_gradients()
    totals = {
        slot.adapter: counts(model.objective, [batch.facts() for batch in window])[:, 0]
        for slot, window in windows.items()
    }
    losses = {
        adapter: torch.zeros((), dtype=torch.float64, device=model.device) for adapter in totals
    }
    for number in range(max(len(window) for window in windows.values())):
        parts = [
            TrialBatch(slot.adapter, window[number], slot.generators.used)
            for slot, window in windows.items()
            if number < len(window)
        ]
        for together in cut_into_passes(model.in_order(parts), model.pass_tokens):
            with dead_graphs_named("in a pack"):
                found = model.train(together, totals)
            for adapter, loss in found.items():
                losses[adapter] += loss
    return losses


def solo_seconds(model: PackedModel, slot: TrialSlot) -> float:
    """Seconds of forward and backward passes of a trial's next step by itself; nothing of it
    stays."""
    window = slot.session.parts.stream.window(slot.step + 1, 0, 1)
    return statistics.median(_solo_pass(model, slot, window) for _ in range(ALONE))


def measure_activations(model: PackedModel, slot: TrialSlot, budget: MemoryBudget) -> None:
    """Tell `budget` what a forward and backward pass of a trial's largest micro-batch takes;
    nothing of it stays."""
    window = slot.session.parts.stream.window(slot.step + 1, 0, 1)
    largest = max(window, key=lambda batch: batch.input_ids.numel())

    def once() -> int:
        _solo_pass(model, slot, [largest])
        return largest.input_ids.numel()

    budget.measure(slot.claim, once)


def _solo_pass(model: PackedModel, slot: TrialSlot, window: list[Batch]) -> float:
    """Seconds of forward and backward passes of one trial; its generators stay as they are."""
    state, began = slot.generators.state(), time.perf_counter()
    try:
        gradients(model, {slot: window})
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        return time.perf_counter() - began
    finally:
        slot.generators.restore(state, 0)
