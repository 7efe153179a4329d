"""Standard output and standard error, which may be closed, full or of few characters.

Lost output never changes what a command does: a reader that has seen enough (`rayft check | head`)
ends no training and is no error. Only a result that was to be kept and could not be written is one.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Generator
from contextlib import contextmanager, suppress
from typing import TextIO

from rayft.core.address import redact
from rayft.core.errors import RayftError


def say(text: str, *, err: bool = False, end: str = "\n") -> None:
    """Write `text` now, without credentials; what the stream's encoding cannot hold as an escape.

    Raises:
        RayftError: standard output cannot be written for another reason than a closed pipe.
    """
    stream = sys.stderr if err else sys.stdout
    if stream is None:  # closed before the command began
        return
    try:
        encoding = stream.encoding or "utf-8"
        print(
            redact(text).encode(encoding, "backslashreplace").decode(encoding), end=end, file=stream
        )
        stream.flush()
    except BrokenPipeError:
        _silence(stream)
    except (OSError, ValueError) as error:  # ValueError: closed within this process
        _silence(stream)
        if not err:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise RayftError(f"cannot write to standard output: {reason}") from None


class LastingStream(io.TextIOBase):
    """A stream for a live display: when its terminal or pipe is gone, the display goes nowhere."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    @property
    def encoding(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]  # read-only in C
        """That of the stream."""
        return self._stream.encoding

    def isatty(self) -> bool:
        """As the stream."""
        return self._stream.isatty()

    def fileno(self) -> int:
        """As the stream."""
        return self._stream.fileno()

    def write(self, text: str) -> int:
        """Write, while anybody reads."""
        with self._while_there():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush, while anybody reads."""
        with self._while_there():
            self._stream.flush()

    @contextmanager
    def _while_there(self) -> Generator[None]:
        try:
            yield
        except (OSError, ValueError):
            _silence(self._stream)


def takes(text: str) -> bool:
    """Whether standard output can hold every character of `text` as it is."""
    try:
        text.encode(sys.stdout.encoding if sys.stdout is not None else "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _silence(stream: TextIO) -> None:
    """Nobody reads it any more: what is still buffered, and the flush at exit, go nowhere."""
    with suppress(OSError, ValueError):  # a stream without a file, or closed
        void = os.open(os.devnull, os.O_WRONLY)
        os.dup2(void, stream.fileno())
        os.close(void)
