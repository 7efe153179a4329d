"""Ray's control process (GCS), watched from the driver.

A driver whose GCS is gone waits in Ray's calls for a minute and is then ended by Ray's C++ code, in
the middle of whatever it does. This watch notices within seconds, and ends the run in its own words
while run.json can still be written.
"""

from __future__ import annotations

import os
import socket
import threading
import time

from rayft.cluster.interrupt import Interrupt
from rayft.core.errors import ClusterLostError

PERIOD = 0.5  # seconds between two looks
OWN_GRACE = 3.0  # seconds without an answer: nobody starts the GCS of a local Ray again
_LIMIT = "RAY_gcs_rpc_server_reconnect_timeout_s"  # after which Ray ends its processes


def patience(own: bool) -> float:
    """Seconds without an answer after which a GCS is lost.

    Args:
        own: the cluster was started by this process. Another one may have a GCS that is started
            again (fault tolerance); there most of Ray's own patience is left to it.
    """
    return OWN_GRACE if own else 0.6 * float(os.environ.get(_LIMIT, "60"))


class GcsWatch:
    """Tells `interrupt` when the GCS has not been reached for some time.

    Args:
        address: `host:port`.
        grace: seconds without an answer after which it is lost.
    """

    def __init__(self, address: str, interrupt: Interrupt, grace: float) -> None:
        host, _, port = address.rpartition(":")
        self._address = (host.strip("[]"), int(port))
        self._interrupt = interrupt
        self._grace = grace
        self._since: float | None = None  # it answers no more
        self._ended = threading.Event()
        self.lost = False
        self._thread = threading.Thread(target=self._watch, name="rayft-gcs", daemon=True)
        self._thread.start()

    def settle(self) -> None:
        """Wait until the GCS answers, as Ray's own calls would, but not for ever.

        Raises:
            ClusterLostError: it is gone.
            InterruptedRun: a signal came meanwhile.
        """
        while not self._answers():
            self._interrupt.check()
            time.sleep(PERIOD / 2)
        self._interrupt.check()

    def end(self) -> None:
        """Watch no longer."""
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(PERIOD):
            if self._answers():
                self._since = None
                continue
            self._since = self._since or time.monotonic()
            if time.monotonic() - self._since >= self._grace:
                self.lost = True
                self._interrupt.lose(
                    ClusterLostError(
                        "Ray's control process (GCS) is gone; what was committed is kept",
                        where="{}:{}".format(*self._address),
                        cause="it was killed (kill -9, out of memory), or its machine was lost",
                    )
                )
                return

    def _answers(self) -> bool:
        try:
            with socket.create_connection(self._address, timeout=2):
                return True
        except OSError:
            return False
