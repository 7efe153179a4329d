"""An error that nobody foresaw, told in a few lines; its traceback goes to a file.

Nothing here raises: whatever is wrong with the machine, people learn what happened first.
"""

from __future__ import annotations

import os
import tempfile
import time
import traceback
from pathlib import Path

from rayft.core.address import redact
from rayft.core.errors import line_of


def told(error: Exception, folder: str) -> list[str]:
    """What it says, the innermost line of rayft it passed, and where the traceback is.

    Args:
        folder: of the run, "" before a command knows it.
    """
    try:
        text = str(error)
    except Exception:  # an exception of a library that cannot even say what it is
        text = "(it has no readable message)"
    text = redact(text if len(text) < 10**5 else f"{text[:1000]}\n{text[-9000:]}")
    said = [line_of(line.rstrip(), 200) for line in text.splitlines() if line.strip()]
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "rayft" in f.filename]
    where = [f"  where: {frames[-1].filename}:{frames[-1].lineno}"] if frames else []
    # Ray puts a remote traceback into the message; its last lines are the ones that say something.
    head = [f"error: {type(error).__name__}" + (f": {said[0]}" if said else "()")]
    return [*head, *(f"  {line.strip()}" for line in said[1:][-8:]), *where, log(error, folder)]


def log(error: Exception, folder: str) -> str:
    """Write the traceback into `folder`, or the temporary one; the line that says where."""
    name = f"rayft-error-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    reason = ""
    for place, opener in ((lambda: folder, None), (tempfile.gettempdir, _private)):
        try:
            path = Path(place(), name)
            if path.parent.is_dir() and path.parent.name:
                text = redact("".join(traceback.format_exception(error)))
                with open(  # noqa: PTH123
                    path, "x", encoding="utf-8", errors="backslashreplace", opener=opener
                ) as file:
                    file.write(text)
                return f"  traceback: {line_of(str(path), 4000)}"
        except Exception as broken:  # a full disk, no memory: must not hide the error itself
            reason = reason or f" ({type(broken).__name__}: {line_of(str(broken), 200)})"
    return f"  traceback: could not be written{reason}"


def _private(path: str, flags: int) -> int:
    """An opener: in everybody's folder, for this user alone, and never through what somebody else
    has put there."""
    return os.open(path, flags, 0o600)
