"""The command from its first moment to its last: signals outside of what handles them itself.

Imports next to nothing: until `main` runs, Ctrl-C still shows Python's traceback.

A signal to `train` or `sweep` ends in exit code 75 at any time: the same command continues, also
when nothing had begun. Other commands end as programs do (130 after Ctrl-C). Once the exit code is
known, a further signal ends the process at once, with that code.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
RESUMED = ("train", "sweep")
INTERRUPTED = 75

_code: int | None = None  # what a signal ends the process with; None: 128 + its number


def main() -> int:
    """Run the command in sys.argv; the exit code."""
    global _code
    resumed = sys.argv[1:2] and sys.argv[1] in RESUMED
    _code = INTERRUPTED if resumed else None
    _streams()
    atexit.register(_ignore)  # the first one registered runs last
    arm()
    from rayft.cli import main as run

    if not resumed:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # clean up, then exit
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    code = run()
    _code = code
    arm()
    from rayft.core.process import abandoned

    if abandoned.is_set():  # what Ray left in this process would wait for a dead cluster
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def arm() -> None:
    """Take the signals. One that is ignored (SIGHUP under nohup) stays so."""
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, stop)


def stop(number: int, frame: FrameType | None) -> None:
    """The handler: nothing is under way that had to be put in order, so end at once."""
    if os.isatty(2):
        os.write(2, b"\x1b[?25h\n")  # the cursor, which a live line hides; off the line of ^C
    os._exit(128 + number if _code is None else _code)


def _ignore() -> None:
    """From here on the interpreter takes itself apart, where no handler can run."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _streams() -> None:
    """Standard streams that were closed lead nowhere: libraries expect that there are three, and
    the next file to be opened would take the descriptor of a missing one."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdin = sys.stdin or os.fdopen(0)
    sys.stdout = sys.stdout or os.fdopen(1, "w")
    sys.stderr = sys.stderr or os.fdopen(2, "w")


if __name__ == "__main__":
    sys.exit(main())
