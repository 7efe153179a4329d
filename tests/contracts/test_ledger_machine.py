"""The ledger against a model: lines, replayed steps, ends, donors, kills at any byte, reopening.

The model keeps the rows that must have survived and folds them its own way. It runs on a local
folder (a killed machine loses what was not yet on disk, and may leave a torn or a zeroed tail) and
on an object store (parts; what was not uploaded is lost).
"""

from __future__ import annotations

import itertools
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from pyarrow.fs import LocalFileSystem

from rayft.records.ledger import LEDGER, Ledger, LedgerContents, read_ledger
from rayft.records.run_record import ENDED
from rayft.storage.backends import ObjectBackend
from rayft.storage.folder import Storage

TRIALS = st.sampled_from(["t0001", "t0002", "t0003"])
METRICS = st.dictionaries(
    st.sampled_from(["eval_loss", "eval_ppl", "eval_loss/a", "tokens"]),
    st.sampled_from([0, 1.5, -2.0, 1e300, math.inf]),
    max_size=3,
)
PARAMS = st.dictionaries(
    st.sampled_from(["optim.lr", "methods.0.rank", "data.train.0.path"]),
    st.sampled_from([1, 0.1, "é\n", None, [1, 2], {"a": True}]),
    max_size=2,
)
FACTS = st.fixed_dictionaries(
    {},
    optional={
        "error": st.sampled_from(["boom", 'a "line"\nand another']),
        "donor": TRIALS,
        "origin": TRIALS,
        "pack": st.sampled_from(["pack-0", "pack-1"]),
    },
)


def expected(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What a trial is, from its rows up to the one that ends it."""
    found: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(row["trial"] for row in rows if "trial" in row):
        its = [row for row in rows if row.get("trial") == name]
        ends = [index for index, row in enumerate(its) if row["status"] in ENDED]
        its = its[: ends[0] + 1] if ends else its
        reports: dict[int, tuple[float, dict[str, float]]] = {}
        for row in its:
            if row["metrics"]:
                for step in [step for step in reports if step >= row["step"]]:
                    del reports[step]
                reports[row["step"]] = (row["time"], row["metrics"])
        found[name] = {
            "params": its[-1]["params"],
            "status": its[-1]["status"],
            "step": its[-1]["step"],
            "reports": [(step, *reports[step]) for step in sorted(reports)],
            "began": its[0]["time"],
            "ended": its[-1]["time"],
            "error": its[-1].get("error", ""),
            "donors": [(row["step"], row["donor"]) for row in its if "donor" in row],
            "origin": next((row["origin"] for row in reversed(its) if "origin" in row), ""),
            "pack": next((row["pack"] for row in reversed(its) if "pack" in row), ""),
        }
    return found


def as_data(book: LedgerContents) -> dict[str, dict[str, Any]]:
    found = {}
    for name, trial in book.trials.items():
        assert trial.id == name and trial.over == (trial.status in ENDED)
        data = {key: value for key, value in vars(trial).items() if key != "id"}
        reports = [(report.step, report.time, report.metrics) for report in trial.reports]
        found[name] = data | {"reports": reports, "donors": list(trial.donors)}
    return found


class Machine(RuleBasedStateMachine):
    """One writer at a time, killed now and then; the rows that must be there, and those that may
    be: written, but not yet durable."""

    local = True

    @initialize()
    def begin(self) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="ledger-")
        root = self.folder.name
        objects = Storage(ObjectBackend(LocalFileSystem()), root, f"objects://{root}")
        self.storage = Storage.open(root) if self.local else objects
        self.ticks = itertools.count(1)
        self.now = 0.0
        self.rows: list[dict[str, Any]] = []
        self.durable = 0  # rows, and bytes of the file
        self.durable_bytes = 0
        self.finished: dict[str, str] = {}
        self.ledger = self._open()

    def _open(self) -> Ledger:
        return Ledger(self.storage, clock=self._tick)

    def _tick(self) -> float:
        self.now = next(self.ticks) / 8
        return self.now

    @property
    def file(self) -> Path:
        return Path(self.folder.name) / LEDGER

    def _is_durable(self) -> None:
        self.durable = len(self.rows)
        if self.local:
            self.durable_bytes = self.file.stat().st_size
        for name, trial in expected(self.rows).items():
            if trial["status"] in ENDED:
                self.finished.setdefault(name, trial["status"])

    def _add(self, trial: str, status: str, step: int, data: st.DataObject) -> None:
        params, metrics, facts = data.draw(PARAMS), data.draw(METRICS), data.draw(FACTS)
        self.ledger.add(trial, status, step, params, metrics, **facts)
        row = {"trial": trial, "status": status, "step": step, "time": self.now}
        self.rows.append(row | {"params": params, "metrics": metrics, **facts})

    @rule(trial=TRIALS, step=st.integers(0, 6), data=st.data())
    def report(self, trial: str, step: int, data: st.DataObject) -> None:
        """Any step: a trial that came back from a commit repeats some."""
        self._add(trial, "running", step, data)

    @rule(trial=TRIALS, status=st.sampled_from(ENDED), step=st.integers(0, 6), data=st.data())
    def end(self, trial: str, status: str, step: int, data: st.DataObject) -> None:
        self._add(trial, status, step, data)
        self._is_durable()

    @rule(name=st.sampled_from(["pack-0", "pack-1"]), busy=st.integers(0, 9))
    def pack(self, name: str, busy: int) -> None:
        self.ledger.pack(name, {"busy": busy, "slots": 4})
        self.rows.append({"pack": name, "time": self.now, "busy": busy, "slots": 4})

    @rule()
    def reopen(self) -> None:
        self.ledger.close()
        self._is_durable()
        self.ledger = self._open()

    @rule()
    def kill(self) -> None:
        """The process is gone, the machine is not: what the system has, stays."""
        if not self.local:
            del self.rows[self.durable :]
        self.ledger = self._open()

    @rule(data=st.data(), zeroed=st.booleans())
    def crash(self, data: st.DataObject, zeroed: bool) -> None:
        """The machine is gone: of what was not on disk, any number of bytes stays."""
        if not self.local:
            return
        whole = self.file.read_bytes() if self.file.exists() else b""
        kept = data.draw(st.integers(self.durable_bytes, len(whole)))
        tail = b"\0" * (len(whole) - kept) if zeroed else b""
        self.file.write_bytes(whole[:kept] + tail)
        survived = _complete(whole[self.durable_bytes : kept])
        # What counts as complete is decided by its bytes, here as in the ledger's own reader.
        del self.rows[self.durable + survived :]
        self.ledger = self._open()
        self._is_durable_as_it_is()

    def _is_durable_as_it_is(self) -> None:
        self.durable, self.durable_bytes = len(self.rows), self.file.stat().st_size

    @invariant()
    def says_what_the_model_says(self) -> None:
        book = read_ledger(self.storage)
        rows = self.rows if self.local else self.rows[: self.durable]
        assert as_data(book) == expected(rows)
        assert list(book.trials) == list(expected(rows))
        packs = {row["pack"]: row for row in rows if "trial" not in row}
        assert book.packs == packs
        for name, status in self.finished.items():
            assert book.trials[name].status == status

    def teardown(self) -> None:
        self.ledger.close()
        self.folder.cleanup()


def _complete(tail: bytes) -> int:
    """Whole lines in `tail`; the last one may lack its line end."""
    count = 0
    for line in tail.split(b"\n"):
        try:
            count += isinstance(json.loads(line), dict)
        except ValueError:
            continue
    return count


class FarMachine(Machine):
    """The same on an object store."""

    local = False


QUICK = settings(
    max_examples=60,
    stateful_step_count=25,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
TestLocal = Machine.TestCase
TestLocal.settings = QUICK
TestFar = FarMachine.TestCase
TestFar.settings = QUICK


@pytest.mark.parametrize("mode", ["min", "max"])
def test_the_best_report_is_finite_and_the_first_among_equals(tmp_path: Path, mode: str) -> None:
    sign = 1 if mode == "min" else -1
    ledger = Ledger(Storage.open(str(tmp_path)))
    for step, value in enumerate([math.nan, 3.0, 2.0, math.inf, 2.0, -math.inf]):
        ledger.add("t0001", "running", step, {}, {"eval_loss": sign * value})
    ledger.add("t0002", "diverged", 1, {}, {"eval_loss": math.nan}, error="loss nan")
    ledger.close()
    book = read_ledger(Storage.open(str(tmp_path)))
    best = book.trials["t0001"].best("eval_loss", mode)
    assert best is not None and (best.step, best.metrics["eval_loss"]) == (2, sign * 2.0)
    assert book.trials["t0002"].best("eval_loss", mode) is None
    assert book.trials["t0001"].best("eval_ppl", mode) is None
