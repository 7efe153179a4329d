"""The driver's view of a run: run.json, the events that come in, the failures that are kept."""

from __future__ import annotations

import platform
import secrets
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

from rayft.checkpoint.folders import give_up, last_attempt
from rayft.compose.job import AttemptJob, AttemptOutcome, PreparedData, ProgressEvent
from rayft.config.run import Run
from rayft.core.errors import (
    DataError,
    DivergedError,
    InterruptedRun,
    PermanentStorageError,
    StorageError,
    first_line,
)
from rayft.records.run_record import RunRecord, Status
from rayft.storage.folder import Storage
from rayft.training.attempts import GiveUp, RetryAfter
from rayft.training.earlier_record import RECORD, earlier_record
from rayft.training.failure import AttemptFailure
from rayft.training.progress import ProgressView
from rayft.training.trackers import Trackers

BAD_ROWS = "bad_rows.jsonl"
PACKAGES = ("ray", "torch", "transformers", "peft", "deepspeed", "bitsandbytes", "datasets")

Fence = Callable[[bool], None]
"""Raises where another driver writes here, or may: storage.lease.Lease.check."""


class RunState:
    """Keeps run.json true while a run goes on."""

    def __init__(
        self,
        home: Storage,
        run: Run,
        view: ProgressView,
        *,
        source: str = "",
        export: bool = True,
        insist: bool = True,
    ) -> None:
        self.home, self._run, self._view = home, run, view
        self._source, self._export, self._insist = source, export, insist
        self._earlier = earlier_record(home, run)
        self.record = self._earlier.record
        self.reached = self.record.steps  # furthest finished step of any attempt
        self._step: int | None = None  # last finished step of this attempt
        self._saved = 0  # step of the last commit that was found or made; 0 for none
        self._before, self._began = self.record.seconds, time.monotonic()
        self._trackers: Trackers | None = None
        self._begun = False  # before it has, errors leave run.json as it is
        self.fence: Fence = lambda now: None
        self.lease = ""  # id of the claim

    @property
    def done(self) -> bool:
        """Nothing is left to do."""
        return self.record.status == "done"

    def reread(self) -> None:
        """Another driver may have gone on since this one began.

        Raises:
            ConfigError, StorageError: as at the beginning.
        """
        self._earlier = earlier_record(self.home, self._run)
        self.record = self._earlier.record
        if self._earlier.word:
            self.warn(self._earlier.word)
        self.reached, self._before = self.record.steps, self.record.seconds

    def restart(self) -> None:
        """Begin at step 0: checkpoints, metrics and run.json are set aside, nothing is deleted."""
        gone, number = give_up(self.home), max(self.record.attempts, last_attempt(self.home))
        folder = f"before-{number + 1}"
        for entry in self.home.list():
            if entry.name.startswith("metrics") or entry.name == RECORD:
                self.home.write_bytes(f"{folder}/{entry.name}", self.home.read_bytes(entry.name))
                self.home.delete(entry.name)
        self._earlier = earlier_record(self.home, self._run)
        self.record = replace(self._earlier.record, attempts=number)
        self.reached, self._before = 0, 0.0
        self.note(
            f"beginning at step 0; {len(gone)} checkpoints are set aside, the rest is in {folder}"
        )

    def begin(self, prepared: PreparedData, hardware: Mapping[str, object]) -> None:
        """Training is about to start; from here on run.json exists.

        Raises:
            DataError: the data is not what the run began with.
        """
        before = self.record.data_hash
        if before and before != prepared.hash:
            from rayft.compose.data import what_changed  # torch comes with it; rarely needed here

            diff = what_changed(prepared.uri, before, prepared.hash)
            raise DataError(
                "\n".join([f"the data changed since run {self._run.name} began:", *diff]),
                where="data.train, data.eval",
                fix="put the data back to continue, or choose another name",
            )
        self._trackers = Trackers(self._run, self.home, self.warn)
        self._begun = True
        if self._earlier.damaged:
            self.home.write_bytes(f"{RECORD}.damaged", self._earlier.damaged)
        if prepared.bad_rows:
            self.fence(False)
            self.home.write_bytes(BAD_ROWS, prepared.bad_rows)
        self._write(
            status="running",
            data_hash=prepared.hash,
            data=prepared.stats,
            versions=versions(),
            hardware=hardware,
            error="",
        )
        for split, found in prepared.stats.items():
            self.note(f"{split} data: {_counted(found['total'])}")

    def job(self, prepared: PreparedData) -> AttemptJob:
        """The next attempt, under a name no other attempt of this run has."""
        # digits that grow, then a letter: the commit protocol fences off older attempts by number
        number = max(self.record.attempts, last_attempt(self.home)) + 1
        attempt = f"{number}x{secrets.token_hex(3)}"
        self._step = None
        self._write(attempts=number)
        # Where a relative path leads must not depend on the worker.
        config = self._run.resolved() | {"storage": Storage.open(self._run.storage).uri}
        return AttemptJob(
            config,
            self._run.digest(),
            attempt,
            prepared.uri,
            prepared.hash,
            source=self._source,
            export=self._export,
            insist=self._insist,
            lease=self.lease,
        )

    def hear(self, events: Sequence[ProgressEvent]) -> int | None:
        """Take events; the last finished step of this attempt, None before it is known."""
        for event in events:
            self._view.show(event)
            if self._trackers:
                self._trackers.observe(event)
            self._take(event)
        return self._step

    def _take(self, event: ProgressEvent) -> None:
        if event.kind in ("start", "save"):
            self._saved = event.step
        if event.kind in ("start", "step"):
            self._step = event.step
            self.reached = max(self.reached, event.step)
        elif event.kind == "save":
            self._write(steps=max(self.record.steps, event.step))

    def warn(self, text: str) -> None:
        """One warning line."""
        self._view.show(ProgressEvent("warn", text=text))

    def note(self, text: str) -> None:
        """One plain line."""
        self._view.show(ProgressEvent("note", text=text))

    def failed(self, failure: AttemptFailure, verdict: RetryAfter | GiveUp) -> str:
        """Keep the traceback, say what happens next; where the traceback lies."""
        name = f"errors/attempt-{self.record.attempts}.txt"
        text = f"{failure.where}\n{failure.kind}: {failure.message}\n\n{failure.trace}\n"
        try:
            self.fence(False)
            self.home.write_text(name, text)
            place = self.home.shown(name)
        except StorageError:
            place = str(Path(tempfile.mkdtemp(prefix="rayft-error-")) / "traceback.txt")
            Path(place).write_text(text)
        if isinstance(verdict, RetryAfter):
            where = f" ({failure.where})" if failure.where else ""
            self.warn(
                f"attempt {self.record.attempts} failed{where}: {failure.kind}: "
                f"{first_line(failure.message)}; next attempt in {verdict.delay:g} s ({place})"
            )
        return place

    def finish(self, outcome: AttemptOutcome) -> RunRecord:
        """The run reached its end, or a step boundary after a signal."""
        status: Status = "done" if outcome.status == "done" else "interrupted"
        self.record = self.record.advanced(outcome.progress, outcome.size)
        self._write(status=status, peak_memory=outcome.peak_memory)
        return self.record

    def broke(self, error: BaseException) -> None:
        """The run ended with an error."""
        if not self._begun:
            return
        status: Status = "failed"
        if isinstance(error, DivergedError):
            status = "diverged"
        elif isinstance(error, InterruptedRun):
            status = "interrupted"
        try:
            asked = type(error) is InterruptedRun  # by a signal: there is nothing to explain
            self._write(status=status, error="" if asked else str(error))
        except StorageError as lost:  # must not hide the error that ended the run
            self.warn(f"run.json still says running: {lost.what}")

    def with_last_commit(self, error: PermanentStorageError) -> PermanentStorageError:
        """The error that ends the run, with what of the run is safe."""
        last = f"of step {self._saved}" if self._saved else "none yet"
        what = f"{error.what}\n  last good checkpoint: {last}, in {self.home.shown('checkpoints')}"
        return type(error)(what, where=error.where, cause=error.cause, fix=error.fix)

    def close(self) -> None:
        """Let trackers finish and give the terminal back."""
        if self._trackers:
            self._trackers.close()
        self._view.close()

    def _write(self, **changes: Any) -> None:
        seconds = self._before + time.monotonic() - self._began
        self.record = replace(self.record, seconds=round(seconds, 3), **changes)
        self.fence(changes.get("status") == "done")
        self.home.write_text(RECORD, self.record.to_json())


def _counted(total: dict[str, int]) -> str:
    """`4,363 documents, 213,407 tokens, 3 cut`: what was kept, then what was not and why."""
    kept = f"{total['documents']:,} documents, {total['tokens']:,} tokens"
    lost = [f"{total[key]:,} {key}" for key in ("cut", "dropped", "bad") if total[key]]
    return ", ".join([kept, *lost])


def versions() -> dict[str, str]:
    """Of what shapes the numbers."""
    from rayft import __version__

    found = {"python": platform.python_version(), "rayft": __version__}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
