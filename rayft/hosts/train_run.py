"""A trial that cannot share a base: a Ray Train run of its own, told like a packed one.

Ray's bridge from Train to Tune (TuneReportCallback) passes metrics but no checkpoint of Tune's, so
population-based training silently does nothing with it. rayft's own: the run is what `rayft train`
does, in a thread; its events, which a named actor carries from the workers, become reports; the
pointer that Tune gets is the address of a committed checkpoint.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import replace

from rayft.cluster.interrupt import Interrupt
from rayft.compose.job import PreparedData, ProgressEvent
from rayft.config.run import Run
from rayft.core.errors import DivergedError, InterruptedRun, InUseError, RayftError
from rayft.records.run_record import RunRecord, Status, stored_record
from rayft.records.series import base_of
from rayft.storage.folder import Storage
from rayft.storage.lease import PATIENCE
from rayft.training.driver import RunContext, train
from rayft.trials.report_replay import missed_reports
from rayft.trials.types import HostStatus, TrialReport

LEAVE = 30.0  # seconds that the workers get to go
COMMIT = 120.0  # seconds that a commit may take after its evaluation was told


class TrainRun:
    """Starts, or continues, the run at once.

    Args:
        run: of the trial.
        prepared: its tokenised data.
        source: checkpoint folder of another trial to begin from, with this one's settings.
        divergence: a held-out loss above this times the base model's ends the trial.
        heard: the last step whose report is known; later ones behind its commit come first.
    """

    def __init__(
        self,
        run: Run,
        prepared: PreparedData,
        *,
        source: str | None,
        divergence: float,
        heard: int,
    ) -> None:
        self._run, self._prepared = run, prepared
        self._home = Storage.open(run.storage).child(run.name)
        self._interrupt = Interrupt()
        self._reports: queue.SimpleQueue[TrialReport] = queue.SimpleQueue()
        self._last: TrialReport | None = None  # once it is over
        self._relay = _EventRelay(run, self._reports.put, self._diverge, divergence)
        self._diverged = ""
        if source:
            for old in ("run.json", "checkpoints"):  # of the trial before it took other settings
                self._home.delete(old)
        else:
            self._replay_missed(heard)
        self._thread = threading.Thread(
            target=self._work, args=(source or "",), name=f"run-{run.name}", daemon=True
        )
        self._thread.start()

    def _replay_missed(self, heard: int) -> None:
        from rayft.checkpoint.reader import find_commit

        found = find_commit(self._home, set_bad_aside=False)
        for report in missed_reports(self._home, heard, 0 if found is None else found.step):
            self._reports.put(report)

    def next(self) -> TrialReport:
        """Wait for the next report; the last one again and again once it is over."""
        if self._last is None:
            report = self._reports.get()
            if report.status == "running":
                return report
            self._last = report
        return self._last

    def save(self) -> str:
        """The address of a commit at, or after, the last report that was told.

        Raises:
            RayftError: it does not come.
        """
        from rayft.checkpoint.manifest import FOLDER
        from rayft.checkpoint.reader import find_commit

        end = time.monotonic() + COMMIT
        while time.monotonic() < end:
            found = find_commit(self._home, set_bad_aside=False)
            if found is not None and found.step >= self._relay.reported:
                return self._home.child(FOLDER, found.name).uri
            time.sleep(0.2)
        raise RayftError(f"{self._run.name} has no commit at step {self._relay.reported}")

    def leave(self, status: Status = "interrupted", *, keep: bool) -> None:
        """Stop the run, if it still runs; its workers are gone on return. Without `keep` its
        checkpoints go; metrics and run.json stay, which then says `status`."""
        self._interrupt.stop()
        self._thread.join(LEAVE)
        if self._thread.is_alive():  # it hangs and may still write; the process is ended next
            return
        if not keep:
            for folder in ("checkpoints", "export"):
                self._home.delete(folder)
        record = stored_record(self._home)
        if record is not None and record.status == "interrupted":
            self._home.write_text("run.json", replace(record, status=status).to_json())

    # ---- the run's thread

    def _work(self, source: str) -> None:
        status, error = "done", ""
        try:
            context = RunContext(self._relay, self._interrupt, source)
            self._relay.done(self._trained(context))
        except DivergedError as problem:
            status, error = "diverged", problem.what
        except InterruptedRun:
            status, error = ("diverged", self._diverged) if self._diverged else ("failed", "left")
            if self._diverged:
                self._rewrite(self._diverged)
        except Exception as problem:  # the sweep goes on without this trial, and says why
            text = problem.what if isinstance(problem, RayftError) else str(problem)
            status, error = "failed", f"{type(problem).__name__}: {text}"
        self._reports.put(self._relay.end(status, error))

    def _trained(self, context: RunContext) -> RunRecord:
        """The run; a host of the sweep's former driver gets time to go."""
        end = time.monotonic() + 2 * PATIENCE
        while True:
            try:
                return train(self._run, prepare=lambda run, mapper: self._prepared, context=context)
            except InUseError:
                if time.monotonic() > end:
                    raise
                self._interrupt.sleep(1.0)

    def _diverge(self, why: str) -> None:
        self._diverged = why
        self._interrupt.stop()

    def _rewrite(self, why: str) -> None:
        record = RunRecord.from_json(self._home.read_bytes("run.json"))
        self._home.write_text("run.json", replace(record, status="diverged", error=why).to_json())


class _EventRelay:
    """The run's View: events in, reports out."""

    def __init__(
        self,
        run: Run,
        tell: Callable[[TrialReport], None],
        diverge: Callable[[str], None],
        divergence: float,
    ) -> None:
        self._run, self._tell, self._diverge, self._limit = run, tell, diverge, divergence
        self._metrics: dict[str, float] = {}
        self._base: float | None = None
        self._step = 0
        self.reported = 0  # step of the last report
        workers = run.scale.workers
        self._workers = workers[1] if isinstance(workers, tuple) else workers

    def show(self, event: ProgressEvent) -> None:
        kind, numbers = event.kind, event.numbers
        if kind in ("start", "step", "eval"):
            self._step = event.step
        if kind == "start":
            self._metrics["params_trainable"] = float(event.params_trainable)
        elif kind == "step":
            taken = ("loss", "tokens", "memory")
            self._metrics |= {name: numbers[name] for name in taken if name in numbers}
        elif kind == "eval":
            self._evaluated(event)

    def close(self) -> None:
        """Nothing to restore."""

    def done(self, record: RunRecord) -> None:
        """What the run's record says counts: one that was done before has no events."""
        self._step = record.steps
        self._metrics |= record.eval
        self._metrics["params_trainable"] = float(record.params_trainable)
        if record.base:
            self._metrics["base_loss"] = record.base["eval_loss"]

    def end(self, status: HostStatus, error: str) -> TrialReport:
        """The last report."""
        return TrialReport(self._run.name, self._step, dict(self._metrics), status, error)

    def _evaluated(self, event: ProgressEvent) -> None:
        numbers = event.numbers
        found = {name: value for name, value in numbers.items() if name.startswith("eval_")}
        if self._step == 0:
            self._base = found["eval_loss"]
        if self._base is None:  # continued: the record knows
            self._base = self._known_base()
        self._metrics |= found
        self._metrics["seconds"] = numbers["seconds"] * max(self._workers, 1)
        self._metrics["base_loss"] = self._base
        loss = found["eval_loss"]
        if not (math.isfinite(loss) and loss <= self._limit * self._base):
            self._diverge(f"held-out loss {loss:.4g}, the base model has {self._base:.4g}")
        elif 0 < self._step < event.steps:  # the last one is told with the end
            self.reported = self._step
            self._tell(TrialReport(self._run.name, self._step, dict(self._metrics)))

    def _known_base(self) -> float:
        """Of the line of step 0; infinite for a clone, whose donor was evaluated."""
        home = Storage.open(self._run.storage).child(self._run.name)
        return base_of(home).get("eval_loss", math.inf)
