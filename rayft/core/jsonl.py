"""Append-only JSON lines on storage: a log that grows while a run goes on, and its reader."""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from typing import IO, Any

from rayft.core.backends import open_for_append
from rayft.core.retry import Retry
from rayft.core.storage import Storage

log = logging.getLogger(__name__)


class Appender:
    """An append-only JSON-lines file; one writer at a time.

    Local: a line is with the system when `append` returns (a killed process loses nothing) and on
    disk every few seconds. Object stores cannot append: lines gather in a part (`metrics.jsonl`,
    `metrics-00001.jsonl`, ...) that a background thread rewrites every few seconds until it is
    full; a new Appender starts a new part. There a failed upload is logged and tried again with the
    next; only `flush` and `close` raise it.
    """

    def __init__(
        self, storage: Storage, path: str, *, every: float = 5.0, part_bytes: int = 1 << 20
    ) -> None:
        self._storage, self._path, self._every, self._part_bytes = storage, path, every, part_bytes
        self._synced = time.monotonic()
        self._lines: list[bytes] = []
        self._pending: Future[None] | None = None
        self._file: IO[bytes] | None = None
        local = storage.local_path(path)
        if local is not None:
            self._file = storage.attempt("append to", path, lambda: open_for_append(local))
        else:
            taken = _parts(storage, path)
            self._part = next(n for n in count() if _part(path, n) not in taken)
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="appender")

    def append(self, row: Mapping[str, Any]) -> None:
        """Add one line.

        Raises:
            StorageError: a local write failed.
        """
        line = json.dumps(row, separators=(",", ":")).encode() + b"\n"
        if self._file is not None:
            self._once(lambda file: file.write(line), self._file)
        else:
            self._lines.append(line)
        if time.monotonic() - self._synced > self._every:
            self._sync()

    def flush(self) -> None:
        """Return when everything appended is durable."""
        if self._file is None:
            self._settle(wait=True)
            self._upload()
        else:
            self._sync()

    def close(self) -> None:
        """`flush`, then no more."""
        try:
            self.flush()
        finally:
            (self._thread.shutdown if self._file is None else self._file.close)()

    def __enter__(self) -> Appender:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _sync(self) -> None:
        self._synced = time.monotonic()
        if self._file is not None:
            self._once(lambda file: os.fsync(file.fileno()), self._file)
        elif self._settle(wait=False):
            self._pending = self._thread.submit(self._upload)

    def _once(self, action: Callable[[IO[bytes]], Any], file: IO[bytes]) -> None:
        """Neither half a line nor a failed fsync can be repeated."""
        place = self._storage.shown(self._path)
        Retry(attempts=1).run("append to", place, lambda: action(file))

    def _settle(self, *, wait: bool) -> bool:
        """Whether no upload is under way; a failed one is only logged, its lines are still here."""
        if self._pending is None or not (wait or self._pending.done()):
            return self._pending is None
        error = self._pending.exception()
        self._pending = None
        if error is not None:
            log.warning("metrics not uploaded yet: %s", error)
        return True

    def _upload(self) -> None:
        done = len(self._lines)  # the training thread may append meanwhile
        data = b"".join(self._lines[:done])
        if not data:
            return
        self._storage.write_bytes(_part(self._path, self._part), data)
        if len(data) >= self._part_bytes:
            del self._lines[:done]
            self._part += 1


def read_jsonl(storage: Storage, path: str) -> list[dict[str, Any]]:
    """All rows of all parts, in order; [] when there is none. A torn line (a writer was killed) is
    ignored; one that is not the last of its part is also logged."""
    rows: list[dict[str, Any]] = []
    for part in _parts(storage, path):
        lines = storage.read_bytes(part).split(b"\n")
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line) if line.strip() else None
            except ValueError:  # also bytes that are not UTF-8
                row = None
                if number < len(lines):
                    log.warning("%s:%d is not JSON, ignored", storage.shown(part), number)
            if isinstance(row, dict):
                rows.append(row)
    return rows


def _part(path: str, number: int) -> str:
    stem, dot, suffix = path.rpartition(".")
    return path if number == 0 else f"{stem}-{number:05d}{dot}{suffix}"


def _parts(storage: Storage, path: str) -> list[str]:
    """The parts that exist, first to last."""
    folder, slash, name = path.rpartition("/")
    stem, _, suffix = name.rpartition(".")
    numbered = re.compile(rf"{re.escape(stem)}-(\d{{5}})\.{re.escape(suffix)}")
    names = [entry.name for entry in storage.list(folder)]
    later = sorted(other for other in names if numbered.fullmatch(other))
    return [f"{folder}{slash}{part}" for part in ([name] if name in names else []) + later]
