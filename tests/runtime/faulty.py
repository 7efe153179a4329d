"""rayft's own engine, in processes that kill -9 themselves as `KILLS` says."""

import os
import signal

from rayft.compose.execute import execute as real

# case: {attempt: (rank, or None for every rank; which step of the attempt dies before it is done)}
KILLS = {
    "full-zero3": {"1": (0, 2), "2": (None, 6)},  # before the first save; all at once after one
    "qlora-zero2": {"1": (1, 5)},
}


class Doomed:
    """Signals that count the steps by the loop's question whether to stop."""

    def __init__(self, signals, dies_in):
        self.progress, self._stop = signals.progress, signals.stop_requested
        self._left = dies_in

    def stop_requested(self):
        self._left -= 1
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return self._stop()


def execute(job, rank, world, device, signals):
    """The run's name says the case."""
    kills = KILLS[job.config["name"]]
    who, step = kills.get(job.attempt.split("x")[0], (rank + 1, 0))
    doomed = who in (None, rank)
    return real(job, rank, world, device, Doomed(signals, step) if doomed else signals)
