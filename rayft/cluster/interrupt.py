"""SIGTERM, SIGINT and SIGHUP (the terminal is closed): the first asks for a save and a stop, the
second stops at once, the third ends the process. SIGHUP that is ignored (nohup) stays so."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType

from rayft.core.errors import InterruptedRun

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
Handler = Callable[[int, FrameType | None], object] | int | None


class Interrupt:
    """Counts signals. `asked` and `forced` are read by whoever can act on them."""

    def __init__(self) -> None:
        self.count = 0
        self._error: InterruptedRun | None = None
        self._former: dict[int, Handler] = {}

    @property
    def asked(self) -> bool:
        """Save at the step boundary, then stop."""
        return self.count >= 1

    @property
    def forced(self) -> bool:
        """Stop now."""
        return self.count >= 2

    @property
    def cut_off(self) -> bool:
        """The cluster is gone: whatever asks it would wait."""
        return self._error is not None

    def arm(self) -> None:
        """Take the signals, also after a library took them. Python allows it in the main thread
        only; elsewhere (a notebook's worker thread) signals keep their meaning."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                former = signal.getsignal(number)
                if former is not signal.SIG_IGN and former != self.notice:
                    self._former.setdefault(number, former)
                    signal.signal(number, self.notice)

    def disarm(self) -> None:
        """Give the signals back to whoever had them."""
        if threading.current_thread() is threading.main_thread():
            for number, former in self._former.items():
                signal.signal(number, former)

    def sleep(self, seconds: float) -> None:
        """Wait, unless a stop is asked for.

        Raises:
            InterruptedRun: it was; nothing is running, so there is nothing to save.
        """
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.check()
            time.sleep(0.1)

    def check(self) -> None:
        """Raises InterruptedRun when a stop is asked for and no training is under way."""
        if self.asked:
            raise self.ended("stopped while no step was under way; nothing is lost")

    def ended(self, what: str, *, fix: str = "") -> InterruptedRun:
        """The error that ends the run: why it must stop, else `what` of a stop that was asked."""
        return self._error or InterruptedRun(what, fix=fix)

    def lose(self, error: InterruptedRun) -> None:
        """Stop now, because of `error`; called from any thread."""
        self._error = error
        self.stop()

    def stop(self) -> None:
        """Stop now, as two signals would."""
        self.count = max(self.count, 2)

    def notice(self, signum: int, frame: FrameType | None) -> None:
        """The signal handler: takes no lock, so it may interrupt anything. The third signal is for
        whoever was asked before: the command leaves with 75, a notebook has KeyboardInterrupt."""
        self.count += 1
        if self.count >= 3:
            former = self._former.get(signum)
            if callable(former):
                former(signum, frame)
                return
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)


@contextmanager
def handling() -> Generator[Interrupt]:
    """Signals go to the Interrupt inside the block."""
    interrupt = Interrupt()
    interrupt.arm()
    try:
        yield interrupt
    finally:
        interrupt.disarm()
