"""The line between driver and workers: a stop flag one way, progress events the other.

A tiny actor in the driver's job, without CPUs and not detached, so it ends with the driver. Rank 0
calls it from one background thread, twice a second, never from the training loop:
ray.train.report would be a barrier over all ranks that allows about one call per two seconds.
A worker that finds the actor gone has lost its driver and ends itself; that is also how the driver
stops everything at once.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rayft.compose.job import ProgressEvent

PERIOD = 0.5  # seconds between two exchanges
KEPT = 10_000  # events held back while one side is slow; the oldest are dropped
ORPHANED = 3  # exit code of a worker that lost its driver


class _ControlActor:
    def __init__(self) -> None:
        self._events: deque[ProgressEvent] = deque(maxlen=KEPT)
        self._stop = False

    def exchange(self, events: list[ProgressEvent]) -> bool:
        """The worker's call: hand over events, learn whether to stop."""
        self._events.extend(events)
        return self._stop

    def drain(self) -> list[ProgressEvent]:
        """The driver's call: take what has come in."""
        events = list(self._events)
        self._events.clear()
        return events

    def stop(self) -> None:
        """Ask the workers to save and leave."""
        self._stop = True


class DriverControl:
    """The driver's end."""

    def __init__(self, name: str) -> None:
        here = ray.get_runtime_context().get_node_id()
        self._actor: Any = (  # Ray's types know no method of it
            ray.remote(_ControlActor)
            .options(
                name=name,
                num_cpus=0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=False),
            )
            .remote()
        )

    def drain(self) -> list[ProgressEvent]:
        """Events since the last call."""
        return ray.get(self._actor.drain.remote(), timeout=60)

    def stop(self) -> None:
        """Ask the workers to save at the step boundary and leave."""
        ray.get(self._actor.stop.remote(), timeout=60)

    def kill(self) -> None:
        """End the actor; workers that still run end themselves."""
        ray.kill(self._actor)


class WorkerSignals:
    """The worker's end (compose.job.DriverSignals). Only rank 0 talks to the driver; the loop
    spreads the stop flag to the other ranks together with the loss."""

    def __init__(self, name: str, rank: int) -> None:
        self.step: int | None = None  # last finished step, as far as the events say
        self._events: deque[ProgressEvent] = deque(maxlen=KEPT)
        self._stop = threading.Event()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        if rank == 0:
            actor = ray.get_actor(name)
            self._thread = threading.Thread(
                target=self._talk, args=(actor,), name="rayft-signals", daemon=True
            )
            self._thread.start()

    def stop_requested(self) -> bool:
        """Whether the driver asked for a stop; reads a flag."""
        return self._stop.is_set()

    def progress(self, event: ProgressEvent) -> None:
        """Queue one event; never blocks."""
        if event.kind in ("start", "step"):
            self.step = event.step
        if self._thread is not None:
            self._events.append(event)

    def close(self) -> None:
        """Send what is left, and stop talking."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join(timeout=10)

    def _talk(self, actor: Any) -> None:
        closing = False
        while not closing:
            closing = self._closing.wait(PERIOD)
            batch = [self._events.popleft() for _ in range(len(self._events))]
            try:
                if ray.get(actor.exchange.remote(batch)):
                    self._stop.set()
            except RayActorError:
                if not closing:
                    os._exit(ORPHANED)
