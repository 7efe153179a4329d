"""Commits of one trial, written behind its back: the best state waits in memory until a commit is
due, and its writes happen one after another, in threads that all trials of a pack share."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

from rayft.checkpoint.writer import CheckpointWriter
from rayft.core.shards import StateShard

EVERY = 15.0  # seconds between two commits of a trial, if nothing else asks for one
NOTHING = StateShard({})
THREADS = 32  # of a pack, at most: storage that hangs for some trials must not stop the others


class CommitThreads:
    """For all trials of a pack; a thread starts when there is work and none is idle."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="trial-commits")
        self._lock, self._unfinished = threading.Lock(), 0

    @property
    def crowded(self) -> bool:
        """There is work for every thread. States that wait for one take memory, and with a thousand
        trials storage is the narrow place: a commit that nobody asked for comes later then."""
        return self._unfinished >= THREADS

    def submit(self, action: Callable[[], None]) -> None:
        """Run it as soon as a thread is free."""
        with self._lock:
            self._unfinished += 1
        self._threads.submit(self._run, action)

    def _run(self, action: Callable[[], None]) -> None:
        try:
            action()
        finally:
            with self._lock:
                self._unfinished -= 1


class OrderedWork:
    """Does one thing after another, in threads that others use too."""

    def __init__(self, threads: CommitThreads) -> None:
        self._threads, self._lock = threads, threading.Lock()
        self._waiting: deque[tuple[Callable[[], None], Future[None]]] = deque()
        self._busy = False

    def submit(self, action: Callable[[], None]) -> Future[None]:
        """Behind all that was submitted before."""
        future: Future[None] = Future()
        with self._lock:
            self._waiting.append((action, future))
            idle, self._busy = not self._busy, True
        if idle:
            self._threads.submit(self._next)
        return future

    def _next(self) -> None:
        """One of them; the rest goes to the back of the line, so that nobody waits for long."""
        with self._lock:
            action, future = self._waiting.popleft()
        try:
            action()
        except BaseException as error:  # belongs to whoever holds the future
            future.set_exception(error)
        else:
            future.set_result(None)
        with self._lock:
            self._busy = bool(self._waiting)
            more = self._busy
        if more:
            self._threads.submit(self._next)


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

    def __init__(self, writer: CheckpointWriter, threads: CommitThreads) -> None:
        self._writer = writer
        self._best: StateSnapshot | None = None
        self._last: Future[None] | None = None
        self._since = time.monotonic()
        self._forgotten = False
        self._threads, self._work = threads, OrderedWork(threads)

    @property
    def idle(self) -> bool:
        """The last write is over."""
        return self._last is None or self._last.done()

    @property
    def since(self) -> float:
        """When the last write began, by time.monotonic(). Where storage cannot keep up, whoever
        has waited longest comes first."""
        return self._since

    @property
    def due(self) -> bool:
        """EVERY seconds have passed since the last write began, it is over, a thread is free."""
        return self.idle and not self._threads.crowded and time.monotonic() - self._since > EVERY

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
                self._last = self._work.submit(partial(self._write, state))

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
        """No more writes: behind those that wait `last` runs. Whoever steps the others need not
        wait for this one's storage."""
        return self._work.submit(last)

    def _write(self, state: StateSnapshot) -> None:
        if self._forgotten:
            return
        self._writer.save(state.step, state.shard, state.extra, best=state.best)
        try:
            self._writer.wait()
        finally:
            self._writer.reserve(NOTHING)  # else a buffer as large as the state stays, per trial
