"""Commits of one trial, written behind its back: the best state waits in memory until a commit is
due, and every write happens in the trial's own thread, in order."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

from rayft.checkpoint.writer import CheckpointWriter
from rayft.core.shards import StateShard

EVERY = 15.0  # seconds between two commits of a trial, if nothing else asks for one


@dataclass(frozen=True)
class StateSnapshot:
    """A state in host memory."""

    step: int
    shard: StateShard  # nobody changes its tensors any more
    extra: dict[str, object]
    best: bool


class CommitQueue:
    """Keeps the best state, writes what it is told to.

    A commit names the best checkpoint so far, so a best state that waits is always written before
    a later one.
    """

    def __init__(self, writer: CheckpointWriter) -> None:
        self._writer = writer
        self._best: StateSnapshot | None = None
        self._last: Future[None] | None = None
        self._since = time.monotonic()
        self._forgotten = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="trial-commits")

    @property
    def due(self) -> bool:
        """EVERY seconds have passed since the last write began, and it is over."""
        idle = self._last is None or self._last.done()
        return idle and time.monotonic() - self._since > EVERY

    def keep(self, best: StateSnapshot) -> None:
        """The best so far; the one before it is forgotten."""
        self._best = best

    def write(self, present: StateSnapshot | None = None) -> None:
        """Commit the best one that waits, then `present`; returns at once."""
        best, self._best = self._best, None
        if best is not None and present is not None and best.step == present.step:
            best, present = None, replace(present, best=True)
        for state in (best, present):
            if state is not None:
                self._since = time.monotonic()
                self._last = self._thread.submit(self._write, state)

    def settle(self) -> None:
        """Return when everything is written.

        Raises:
            StorageError: the last commit failed.
        """
        if self._last is not None:
            self._last.result()

    def forget(self) -> None:
        """What waits is not written any more; a write under way goes on."""
        self._best, self._forgotten = None, True

    def close(self, last: Callable[[], None]) -> Future[None]:
        """No more writes: behind those that wait `last` runs, in their thread. Whoever steps the
        others need not wait for this one's storage."""
        future = self._thread.submit(last)
        self._thread.shutdown(wait=False)
        return future

    def _write(self, state: StateSnapshot) -> None:
        if self._forgotten:
            return
        self._writer.save(state.step, state.shard, state.extra, best=state.best)
        self._writer.wait()
