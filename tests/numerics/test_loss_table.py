"""The committed table of losses (experiments/losses) still holds, within its reasoned limits."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
from pathlib import Path

import pytest

HERE = Path(__file__).parents[2] / "experiments/losses"


@pytest.fixture(scope="module")
def table():
    """The script as a module."""
    threads = os.environ.get("OMP_NUM_THREADS")
    spec = importlib.util.spec_from_file_location("loss_table", HERE / "table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if threads is None:  # the script sets it, for its own process
        del os.environ["OMP_NUM_THREADS"]
    return module


@pytest.fixture(scope="module")
def committed() -> dict:
    return json.loads((HERE / "losses.json").read_text())


def test_losses_are_those_of_the_table(table, committed):
    here = table.measure()
    assert here["data"] == committed["data"], "builtin:arith or the tokenizer has changed"
    gaps = table.differences(here, committed)
    wrong = {way: gap for way, gap in gaps.items() if not gap <= table.TOLERANCE[way]}
    assert not wrong, f"{wrong}; print the table: python experiments/losses/table.py"


def test_the_table_shows_that_all_ways_learn_and_that_packed_is_solo(table, committed):
    for way in table.WAYS:
        assert len(committed["losses"][way]) == table.STEPS
        base, tuned = committed["eval"][way]
        assert tuned < 0.5 * base
    for solo, packed in zip(*(committed["losses"][way] for way in ("lora", "packed")), strict=True):
        assert packed == pytest.approx(solo, rel=1e-6)


def test_what_is_compared_and_how(table, committed, capsys):
    """--exact wants every bit and the same kind of machine; without it there is a limit."""
    mine = copy.deepcopy(committed) | {"machine": table.machine()}
    assert table.verdict(mine, mine, exact=True) == table.verdict(mine, mine, exact=False) == 0
    near = copy.deepcopy(mine)
    near["losses"]["full"][7] *= 1 + 1e-7
    assert table.verdict(near, mine, exact=False) == 0
    assert table.verdict(near, mine, exact=True) == 1
    near["losses"]["full"][7] *= 1 + 1e-4
    assert table.verdict(near, mine, exact=False) == 1
    other = copy.deepcopy(mine)
    other["machine"]["cpu"] = "another"
    assert table.verdict(mine, other, exact=True) == 1
    near["losses"]["full"][7] = float("nan")
    assert table.verdict(near, mine, exact=False) == 1
    said = capsys.readouterr().out
    assert "not the same bits" in said and "another kind of machine" in said
