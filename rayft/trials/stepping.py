"""One optimizer step of several trials: gradients together, clipping and AdamW each alone."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from rayft.compose.gradient_check import dead_graphs_named
from rayft.core.batch import Batch
from rayft.core.errors import DeadGradientError, DivergedError, RayftError, StorageError
from rayft.core.reduce import counts
from rayft.trials.forward import Guest, PackedModel
from rayft.trials.room import Claim, Room
from rayft.trials.shelf import Row
from rayft.trials.slots import Slot, Stepped

ALONE = 3  # timed steps of a trial by itself


@contextmanager
def apart(slot: Slot, broken: dict[Slot, RayftError]) -> Iterator[None]:
    """One trial's loss, adapters or files must not end the others: what is wrong with it goes to
    `broken`."""
    try:
        yield
    except (DeadGradientError, DivergedError, StorageError) as error:
        broken.setdefault(slot, error)


def optimize(model: PackedModel, slots: Sequence[Slot]) -> dict[Slot, Stepped]:
    """The next step of every trial. Where loss or norm is not finite nothing is applied, and the
    caller has to look; also at Slot.unreached.

    Raises:
        DeadGradientError: the base they share passes no gradients on.
    """
    windows = {slot: slot.session.parts.stream.window(slot.step + 1, 0, 1) for slot in slots}
    losses = gradients(model, windows)
    places = model.shelves.places()
    norms = {
        shelf: torch.linalg.vector_norm(shelf.grads, dim=1).double()
        for shelf in model.shelves.all.values()
    }
    values = []
    for slot in slots:
        shelf, place = places[slot.row]
        values += [losses[slot.row], norms[shelf][place]]
    numbers = torch.stack(values).tolist()  # the one time a step waits for the device
    found = {}
    for index, (slot, window) in enumerate(windows.items()):
        loss, norm = numbers[2 * index : 2 * index + 2]
        shelf, place = places[slot.row]
        slot.unreached = shelf.unreached(slot.row) if slot.starting else []
        slot.update(shelf.grads[place], loss, norm)
        tokens = int(sum(float(batch.tokens().sum()) for batch in window))
        seen = sum(int(batch.lengths.sum()) for batch in window)
        found[slot] = Stepped(loss, norm, tokens, seen)
    for shelf in model.shelves.all.values():
        shelf.updated()
    return found


def gradients(model: PackedModel, windows: Mapping[Slot, list[Batch]]) -> dict[Row, Tensor]:
    """Fill the shelves with the gradients of whole windows; each trial's loss, on the device.

    Raises:
        DeadGradientError: the base passes no gradients on.
    """
    for shelf in model.shelves.all.values():
        shelf.forget_gradients()
    totals = {slot.row: counts(model.objective, w)[:, 0] for slot, w in windows.items()}
    losses = {row: torch.zeros((), dtype=torch.float64, device=model.device) for row in totals}
    for number in range(max(len(window) for window in windows.values())):
        guests = [
            Guest(slot.row, window[number], slot.generators.used)
            for slot, window in windows.items()
            if number < len(window)
        ]
        with dead_graphs_named("in a pack"):
            found = model.train(guests, totals)
        for row, loss in found.items():
            losses[row] += loss
    return losses


def alone(model: PackedModel, slot: Slot) -> float:
    """Seconds of forward and backward passes of a trial's next step by itself; nothing of it
    stays."""
    window = slot.session.parts.stream.window(slot.step + 1, 0, 1)
    return statistics.median(_apart(model, slot, window) for _ in range(ALONE))


def weigh(model: PackedModel, slot: Slot, claim: Claim, room: Room) -> None:
    """Tell `room` what a forward and backward pass of a trial's largest micro-batch takes; nothing
    of it stays."""
    window = slot.session.parts.stream.window(slot.step + 1, 0, 1)
    largest = max(window, key=lambda batch: batch.input_ids.numel())

    def once() -> int:
        _apart(model, slot, [largest])
        return largest.input_ids.numel()

    room.measure(claim, once)


def _apart(model: PackedModel, slot: Slot, window: list[Batch]) -> float:
    """Seconds of forward and backward passes of one trial; its generators stay as they are."""
    state, began = slot.generators.state(), time.perf_counter()
    try:
        gradients(model, {slot: window})
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        return time.perf_counter() - began
    finally:
        slot.generators.restore(state, 0)
