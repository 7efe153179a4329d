"""The arithmetic behind the report, on numbers worked by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from rayft.config.sweep import Domain
from rayft.records.ledger import LedgerContents, fold
from rayft.report.axes import axes, written
from rayft.report.facts import TrialResult, cost, front, read_facts
from rayft.report.numbers import MetricScale, many, seconds, size
from rayft.report.savings import savings
from tests.ledgers import START, write_sweep


def book(*rows: dict[str, Any]) -> LedgerContents:
    times = ({"time": float(i), "params": {}} | row for i, row in enumerate(rows))
    return fold(times)


def trial(name: str, status: str, step: int, charged: float, **more: Any) -> dict[str, Any]:
    return {"trial": name, "status": status, "step": step, "seconds": charged, **more}


PACK = {"start_seconds": 4.0, "alone_step_seconds": 0.5}


def test_savings_of_packed_trials() -> None:
    made = book(
        trial("a", "done", 100, 20.0),
        trial("b", "stopped", 10, 3.0),
        trial("c", "diverged", 20, 5.0),
        trial("d", "failed", 30, 7.0),
        trial("e", "running", 40, 9.0),
        {"pack": "p0", **PACK},
        {"pack": "p1", "start_seconds": 6.0, "alone_step_seconds": 0.5},
    )
    found = savings(made, lambda _: 100)
    assert found is not None
    # five starts of (4 + 6) / 2 s; a, b and c to 100 steps, d and e to where they are
    assert found.alone == pytest.approx(5 * 5 + (100 + 100 + 100 + 30 + 40) * 0.5)
    assert found.stopping == pytest.approx((90 + 80) * 0.5)
    assert found.spent == pytest.approx(20 + 3 + 5 + 7 + 9 + 4 + 6)
    assert found.packing == pytest.approx(5 * 5 + 200 * 0.5 - 54)
    assert (found.planned, found.taken, found.cut, found.packed) == (370, 200, 170, 5)


def test_a_saving_that_is_a_loss_is_shown_as_it_is() -> None:
    found = savings(book(trial("a", "done", 10, 30.0), {"pack": "p0", **PACK}), lambda _: 10)
    assert found is not None and found.packing == pytest.approx(4 + 5 - 34)


def test_trials_on_their_own_save_by_stopping_only() -> None:
    found = savings(
        book(trial("a", "done", 100, 50.0), trial("b", "stopped", 10, 6.0)), lambda _: 100
    )
    assert found is not None
    assert (found.alone, found.stopping, found.packing) == pytest.approx((50 + 60, 90 * 0.6, 0.0))


def test_packed_and_own_trials_beside_each_other() -> None:
    made = book(
        trial("a", "done", 10, 2.0, pack="p0"),
        trial("b", "stopped", 5, 4.0),
        {"pack": "p0", **PACK},
    )
    found = savings(made, lambda _: 10)
    assert found is not None and found.packed == 1
    assert found.alone == pytest.approx((4 + 10 * 0.5) + 10 * 0.8)
    assert found.packing == pytest.approx(4 + 5 - (2 + 4))


def test_the_cost_of_a_sweep_adds_up(tmp_path: Path) -> None:
    found = cost(read_facts(write_sweep(tmp_path, 20)))
    saved = found["saved_by_stopping"] + found["saved_by_packing"]
    assert found["trial_seconds"] + saved == pytest.approx(found["alone_seconds"], abs=0.01)
    assert found["start_seconds"] == pytest.approx(START + 0.15)  # the mean of four packs
    assert cost(read_facts(write_sweep(tmp_path / "none", 0))) == {}


def test_nothing_told_nothing_saved() -> None:
    assert savings(book({"trial": "a", "status": "running", "step": 0}), lambda _: 10) is None
    unknown = savings(book(trial("a", "stopped", 10, 6.0)), lambda _: None)
    assert unknown is not None and unknown.stopping == 0


def row(name: str, value: float, cost: float) -> TrialResult:
    made = book({"trial": name, "status": "done", "step": 1, "eval_loss": value})
    return TrialResult(made.trials[name], value, 1, {"seconds": cost})


def test_the_pareto_front() -> None:
    rows = [row("a", 3, 1), row("b", 2, 2), row("c", 2.5, 3), row("d", 1, 4), row("e", 2, 2.5)]
    assert [r.trial.id for r in front(rows, "seconds", 1)] == ["a", "b", "d"]
    assert [r.trial.id for r in front(rows, "seconds", -1)] == ["a"]
    assert front(rows, "memory", 1) == []


def test_axes() -> None:
    space = {
        "optim.lr": Domain(loguniform=(1e-4, 1e-2)),
        "methods.0.rank": Domain(choice=(16, 4, 8)),
        "methods.1.rank": Domain(choice=("x", None)),
        "train.warm": Domain(integers=(0, 10)),
    }
    lr, rank, other, warm = axes(space, [{"methods.0.rank": 12, "optim.lr": 1e-5}])
    assert [axis.label for axis in (lr, rank, other, warm)] == ["lr", "0.rank", "1.rank", "warm"]
    assert lr.low == 1e-5 and lr.unit({"optim.lr": 1e-2}) == pytest.approx(1)
    assert lr.unit({"optim.lr": math.sqrt(1e-7)}) == pytest.approx(0.5)
    assert rank.levels == ("4", "8", "12", "16") and rank.at({"methods.0.rank": 8}) == 1
    assert rank.edge({"methods.0.rank": 16}) == "high" and rank.edge({"methods.0.rank": 8}) == ""
    assert other.levels == ("x", "null") and other.edge({"methods.1.rank": "x"}) == ""
    close = {"optim.lr": Domain(choice=(0.00012341, 0.00012342))}
    assert axes(close, [])[0].levels == ("0.00012341", "0.00012342")
    assert warm.unit({"train.warm": 5}) == 0.5 and warm.at({}) is None


def test_numbers_for_people() -> None:
    assert [seconds(s) for s in (0.142, 9.96, 53.2, 250, 7512, -31, None)] == [
        "0.14 s", "10 s", "53 s", "4 min 10 s", "2 h 05 min", "−31 s", "–",
    ]  # fmt: skip
    assert [size(b) for b in (900, 740261888, 2**34)] == ["900 B", "706 MiB", "16 GiB"]
    assert [many(n) for n in (950, 41376, 2_050_000)] == ["950", "41.4 k", "2.05 M"]
    assert MetricScale.of([3.62, 3.82, 3.91, 4.9]).text(3.6219) == "3.622"
    assert MetricScale.of([0.5]).text(-0.25) == "−0.250" and MetricScale(2).text(None) == "–"
    assert [written(v) for v in (2e-5, 0.00152, True, None, [1, "a"])] == [
        "2e-5", "0.00152", "true", "null", '[1, "a"]',
    ]  # fmt: skip
