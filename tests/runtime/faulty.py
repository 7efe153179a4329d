"""rayft's own engine, in a process that ends itself at a step of the first attempt."""

import os
import signal

from rayft.compose.execute import execute as real

STEP = 5


class Doomed:
    def __init__(self, signals):
        self.stop_requested, self._progress = signals.stop_requested, signals.progress

    def progress(self, event):
        self._progress(event)
        if event["kind"] == "step" and event["step"] == STEP:
            os.kill(os.getpid(), signal.SIGKILL)


def execute(job, rank, world, device, signals):
    doomed = rank == 0 and job.attempt.startswith("1x")
    return real(job, rank, world, device, Doomed(signals) if doomed else signals)
