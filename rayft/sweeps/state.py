"""The driver's view of a sweep: sweep.json, the ledger, what is best, and what may be deleted."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from rayft.config.run import Run
from rayft.config.sweep import PbtSpec
from rayft.records.ledger import (
    LEDGER,
    Ledger,
    LedgerContents,
    LedgerTrial,
    TrialParams,
    fold,
    read_ledger,
)
from rayft.records.run_record import SweepWinner, stored_record
from rayft.records.series import base_of
from rayft.storage.folder import Storage
from rayft.storage.lease import Lease
from rayft.storage.sealed import damage_sentence
from rayft.sweeps.ledger_repair import TRIALS, earlier_sweep, lost_lines
from rayft.sweeps.trial import TuneResult, metrics_of
from rayft.training.state import versions

RECORD = "sweep.json"


class SweepState:
    """Keeps sweep.json and trials.jsonl true while a sweep goes on. Thread-safe: Tune's thread
    reports, the main thread shows.

    Args:
        lease: of this driver; once it is lost nothing is written or deleted any more.

    Attributes:
        left: waits until a trial has left its host; whether it has.
    """

    def __init__(self, home: Storage, run: Run, lease: Lease | None = None) -> None:
        self.lease = lease
        self.left: Callable[[str], bool] = lambda trial: True
        self.home, self.run, self.spec = home, run, run.swept
        self.ledger: LedgerContents = read_ledger(home)
        self.news: list[str] = []  # lines for people, taken by the view
        if self.ledger.damage:
            self.news.append(f"warning: {damage_sentence(home.shown(LEDGER), self.ledger.damage)}")
        self.record, said = earlier_sweep(home, run, self.ledger)
        self.news += [f"warning: {said}"] * bool(said)
        self._writer: Ledger | None = None
        self._began = time.monotonic()
        self._before = self.record.seconds
        self._lock = threading.Lock()
        self._deletions = ThreadPoolExecutor(1, thread_name_prefix="losers")
        self._here: dict[str, str] = {}  # trial -> what this start knows of it
        self.origins: dict[str, str] = {}  # repetitions with other seeds
        self.interrupted = False
        self._first = not self.record.starts

    # ---- the record

    @property
    def seconds(self) -> float:
        """Wall clock over all starts."""
        return self._before + time.monotonic() - self._began

    def mark(self, what: str, at: float | None = None) -> None:
        """SweepRecord.start: `what` is there, or was after `at` seconds; the first time counts."""
        if self._first:
            seconds = time.monotonic() - self._began if at is None else at
            self.record.start.setdefault(what, round(seconds, 3))

    def begin(self, **facts: Any) -> None:
        """From here on the sweep exists on storage."""
        self.write(status="running", starts=self.record.starts + 1, versions=versions(), **facts)
        self._writer = Ledger(self.home)
        hashes = (self.record.config_hash, self.record.data_hash)
        line = self._open_ledger().start(self.record.name, self.record.starts, *hashes)
        fold([line], self.ledger)
        if self.record.starts > 1:
            self._mend()

    def _mend(self) -> None:
        """Lines that a damaged ledger should have."""
        for lost in lost_lines(self.home.child(TRIALS), self.run, self.ledger):
            facts = {"error": lost.error} if lost.error else {}
            values = (lost.status, lost.step, lost.params, lost.metrics)
            self._add(lost.trial, *values, **facts)
            self.news.append(f"{lost.trial} was {lost.status}: from its folder, not the ledger")

    def write(self, **changes: Any) -> None:
        """Change sweep.json."""
        self.fence(changes.get("status") in ("done", "running"))
        self.record = replace(self.record, seconds=round(self.seconds, 3), **changes)
        self.home.write_text(RECORD, self.record.to_json())

    @property
    def fenced(self) -> bool:
        """The lease is lost."""
        return self.lease is not None and self.lease.lost

    def fence(self, now: bool = False) -> None:
        """Raises where this driver may write no more: storage.lease.Lease.check."""
        if self.lease is not None:
            self.lease.check(now)

    def close(self) -> None:
        """No more lines; whatever is to be deleted is gone."""
        if not (self.interrupted or self.fenced):
            self._clear_losers(final=True)
        self._deletions.shutdown(wait=True)
        writer, self._writer = self._writer, None
        if writer is not None:
            (writer.abandon if self.fenced else writer.close)()

    # ---- TrialListener: called from Tune's thread

    def started(self, trial: str, params: TrialParams) -> None:
        """The line makes sure that a killed sweep knows what to continue."""
        with self._lock:
            if trial not in self._here:
                self._here[trial] = "running"
                known = self.ledger.trials.get(trial)
                self._add(trial, "running", known.step if known else 0, params)

    def reported(self, trial: str, params: TrialParams, result: TuneResult) -> None:
        """An end is written by `ended`, with the same numbers."""
        if result.get("status") != "running":
            return
        with self._lock:
            if self._already_known(trial, result):
                return
            spent = float(result.get("seconds", 0.0))
            self.mark("first step", time.monotonic() - self._began - spent)
            self.mark("first report")
            before = self.best()
            facts = {key: result[key] for key in ("donor", "pack") if result.get(key)}
            self._add(trial, "running", int(result["step"]), params, metrics_of(result), **facts)
            self._announce_best(before)

    def ended(self, trial: str, params: TrialParams, result: TuneResult) -> None:
        status = result.get("status", "running")
        with self._lock:
            known = self.ledger.trials.get(trial)
            if known is None or known.over:
                return
            if status == "running":
                if self.interrupted or not known.reports:
                    return  # it goes on when the same command is given again
                self._add(trial, "stopped", known.step, known.params)
            else:
                before = self.best()
                facts = {"pack": result["pack"]} if result.get("pack") else {}
                facts |= {"error": result["error_text"]} if result.get("error_text") else {}
                step = int(result["step"]) or known.step
                self._add(trial, status, step, params, metrics_of(result), **facts)
                self._announce_best(before)
                if status in ("diverged", "failed"):
                    self.news.append(f"{trial} {status} at step {step}: {facts.get('error', '')}")
            self._here[trial] = status
            self._clear_losers()

    def paused(self, trial: str) -> None:
        """It waits at a rung; when it goes on, a line says so."""
        with self._lock:
            self._here.pop(trial, None)

    def _already_known(self, trial: str, result: TuneResult) -> bool:
        """A host says again what lies behind a trial's commit; the first line has more numbers."""
        known, name = self.ledger.trials.get(trial), self.spec.metric
        told = () if known is None or result.get("donor") else known.reports
        step, value = int(result["step"]), result.get(name)
        return any(r.step == step and r.metrics.get(name) == value for r in told)

    def stop(self, trial: str) -> None:
        """It ends where it is: the sweep does."""
        with self._lock:
            known = self.ledger.trials[trial]
            self._add(trial, "stopped", known.step, known.params)
            self._here[trial] = "stopped"
            self._clear_losers()

    def broke(self, trial: str, params: TrialParams, why: str) -> None:
        self.ended(trial, params, {"status": "failed", "step": 0, "error_text": why})

    def pack(self, name: str, numbers: dict[str, float]) -> None:
        """A line on how full a pack is."""
        with self._lock:
            self.fence()
            fold([self._open_ledger().pack(f"{name}.{self.record.starts}", numbers)], self.ledger)

    def _open_ledger(self) -> Ledger:
        if self._writer is None:
            raise RuntimeError("the sweep has not begun")
        return self._writer

    def _add(
        self,
        trial: str,
        status: str,
        step: int,
        params: TrialParams,
        metrics: dict[str, float] | None = None,
        **facts: str,
    ) -> None:
        self.fence()
        origin = self.origins.get(trial)
        facts |= {"origin": origin} if origin else {}
        fold([self._open_ledger().add(trial, status, step, params, metrics, **facts)], self.ledger)

    # ---- what is best

    def searched(self) -> list[LedgerTrial]:
        """The trials of the search, without repetitions."""
        return [trial for trial in self.ledger.trials.values() if not trial.origin]

    def best(self) -> tuple[LedgerTrial, float] | None:
        """The best trial and its metric: of all that neither diverged nor failed, the best report
        of each."""
        spec = self.spec
        found: list[tuple[LedgerTrial, float]] = []
        for trial in self.searched():
            report = trial.best(spec.metric, spec.mode)
            if report is not None and trial.status not in ("diverged", "failed"):
                found.append((trial, report.metrics[spec.metric]))
        sign = 1 if spec.mode == "min" else -1
        return min(found, key=lambda pair: sign * pair[1], default=None)

    def is_best(self, trial: str) -> bool:
        """Whether its state is worth keeping now."""
        best = self.best()
        return best is not None and best[0].id == trial

    def reached_target(self) -> bool:
        """A trial is as good as sweep.target."""
        best = self.best()
        if self.spec.target is None or best is None:
            return False
        sign = 1 if self.spec.mode == "min" else -1
        return sign * best[1] <= sign * self.spec.target

    def _announce_best(self, before: tuple[LedgerTrial, float] | None) -> None:
        now = self.best()
        if now is None or (before is not None and before[1] == now[1]):
            return
        if before is None or before[0].id != now[0].id:
            self.news.append(f"best so far: {now[0].id}, {self.spec.metric} {now[1]:.4f}")

    def _clear_losers(self, final: bool = False) -> None:
        """Checkpoints of trials that are over and not the best go; their metrics stay. In a
        population a loser may still be copied, so there they go at the end."""
        if isinstance(self.spec.scheduler, PbtSpec) and not final:
            return
        best = self.best()
        for trial in self.ledger.trials.values():
            lost = trial.over and (best is None or trial.id != best[0].id)
            if lost and self._here.get(trial.id) != "cleared":
                self._here[trial.id] = "cleared"
                self._deletions.submit(self._clear, trial.id)

    def _clear(self, trial: str) -> None:
        """Nothing is deleted under a host that still writes it."""
        if not self.left(trial):
            self._here[trial] = "left"  # too slow: tried again at the end
        elif not self.fenced:
            for folder in ("checkpoints", "export"):
                self.home.child(TRIALS, trial).delete(folder)

    # ---- the end

    def summary(self) -> SweepWinner | None:
        """SweepRecord.best."""
        best = self.best()
        if best is None:
            return None
        trial, metric = best
        report = trial.best(self.spec.metric, self.spec.mode)
        step = trial.step if report is None else report.step
        return SweepWinner(trial.id, step, metric, trial.params)

    def base(self) -> dict[str, float]:
        """The base model's evaluation, as the best trial's run.json has it."""
        best = self.best()
        if best is None:
            return self.record.base
        home = self.home.child(TRIALS, best[0].id)
        record = stored_record(home)
        return base_of(home) if record is None else record.base
