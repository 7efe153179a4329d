"""One call beside the main thread, whose value or error somebody waits for.

The threads of executors (`concurrent.futures`) are joined when the interpreter ends, so storage or
a cluster that hangs would keep a finished process alive for ever; these are daemons.
Loops that live as long as their owner (a lease, signals, a pack) stay plain threads: nobody asks
for their result, so an error must go to stderr, where `threading` sends it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def in_background(call: Callable[[], T], name: str) -> Future[T]:
    """Start `call` in a daemon thread of that `name`; the future holds what it returns or raises.
    It cannot be cancelled."""
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            value = call()
        except BaseException as error:  # whoever waits for the result raises it
            future.set_exception(error)
        else:
            future.set_result(value)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future
