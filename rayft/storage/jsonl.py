"""Append-only JSON lines on storage: a log that grows while a run goes on, and its reader.

What a line looks like, and how damage is found: `storage/sealed.py`.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import IO

from rayft.storage.backends import open_for_append
from rayft.storage.folder import Storage
from rayft.storage.retry import RetryPolicy
from rayft.storage.sealed import SealedLog, Sound, any_row, damage_sentence, line_of, read_lines

log = logging.getLogger(__name__)


class LineAppender:
    """An append-only JSON-lines file; one writer at a time.

    Local: a line is with the system when `append` returns (a killed process loses nothing) and on
    disk every few seconds. Object stores cannot append: lines gather in a part (`metrics.jsonl`,
    `metrics-00001.jsonl`, ...) that a background thread rewrites every few seconds until it is
    full; a new LineAppender starts a new part. There a failed upload is logged and tried again with
    the next; only `flush` and `close` raise it.

    Attributes:
        lines: number of the last line, over all parts.
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
            self.lines, self._file = storage.attempt("append to", path, lambda: _reopened(local))
        else:
            taken = _parts(storage, path)
            self.lines = read_lines(storage.read_bytes(part) for part in taken[-1:]).last
            # Never the number of a part that was lost: lines are read in the order of parts.
            self._part = _after(path, taken)
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="appender")

    def append(self, row: Mapping[str, object]) -> None:
        """Add one line. The keys "line" and "crc" are the log's own.

        Raises:
            StorageError: a local write failed.
        """
        line = line_of(row, self.lines + 1)
        if self._file is not None:
            self._once(lambda file: _write(file, line), self._file)
        else:
            self._lines.append(line)
        self.lines += 1
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

    def abandon(self) -> None:
        """No more, and nothing of what is not on storage yet."""
        if self._file is None:
            self._thread.shutdown(wait=False, cancel_futures=True)
        else:
            self._file.close()

    def __enter__(self) -> LineAppender:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _sync(self) -> None:
        self._synced = time.monotonic()
        if self._file is not None:
            self._once(lambda file: os.fsync(file.fileno()), self._file)
        elif self._settle(wait=False):
            self._pending = self._thread.submit(self._upload)

    def _once(self, action: Callable[[IO[bytes]], object], file: IO[bytes]) -> None:
        """Neither half a line nor a failed fsync can be repeated."""
        place = self._storage.shown(self._path)
        RetryPolicy(attempts=1).run("append to", place, lambda: action(file))

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


def read_log(storage: Storage, path: str, sound: Sound = any_row) -> SealedLog:
    """All parts of a log, in order, and what is damaged in it; an empty one where there is none.

    Args:
        sound: see `read_lines`.
    """
    return read_lines((storage.read_bytes(part) for part in _parts(storage, path)), sound)


def read_jsonl(storage: Storage, path: str, sound: Sound = any_row) -> list[dict[str, object]]:
    """The rows of `read_log`; damage is logged."""
    found = read_log(storage, path, sound)
    if found.damage:
        log.warning("%s", damage_sentence(storage.shown(path), found.damage))
    return list(found.rows)


def _reopened(path: Path) -> tuple[int, IO[bytes]]:
    """(number of the last line, the file). What a killed writer left of a line is cut off: it must
    neither swallow the next one nor look like damage. A whole line that lacks only its end stays.
    """
    file = open_for_append(path)
    file.seek(0)
    data = file.read()
    torn = data.rpartition(b"\n")[2]
    if torn and read_lines([torn]).rows:
        _write(file, b"\n")
    elif torn:
        os.ftruncate(file.fileno(), len(data) - len(torn))
    return read_lines([data]).last, file


def _write(file: IO[bytes], line: bytes) -> None:
    """The whole line or nothing of it: a full disk may take a part, and without a word."""
    before = os.fstat(file.fileno()).st_size
    try:
        if file.write(line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError:
        with suppress(OSError):
            os.ftruncate(file.fileno(), before)
        raise


def _part(path: str, number: int) -> str:
    stem, dot, suffix = path.rpartition(".")
    return path if number == 0 else f"{stem}-{number:05d}{dot}{suffix}"


def _after(path: str, taken: list[str]) -> int:
    """The number after that of the last part."""
    return 1 + next(n for n in count() if _part(path, n) == taken[-1]) if taken else 0


def _parts(storage: Storage, path: str) -> list[str]:
    """The parts that exist, first to last."""
    folder, slash, name = path.rpartition("/")
    stem, _, suffix = name.rpartition(".")
    numbered = re.compile(rf"{re.escape(stem)}-(\d{{5}})\.{re.escape(suffix)}")
    names = [entry.name for entry in storage.list(folder)]
    later = sorted(other for other in names if numbered.fullmatch(other))
    return [f"{folder}{slash}{part}" for part in ([name] if name in names else []) + later]
