"""The grid of all combinations (tests/grid.py), every pair of values at least once."""

from __future__ import annotations

import itertools
from typing import get_args

import pytest

from rayft.config.methods import MethodSpec
from rayft.config.objectives import ObjectiveSpec
from rayft.config.traits import QUANTS as ALL_QUANTS
from tests.grid import (
    METHODS,
    OBJECTIVES,
    QUANTS,
    Cell,
    broken_promises,
    pairwise,
    product,
    train_all,
    verdict,
)

CELLS = pairwise(product())


def kinds(union) -> set[str]:
    return {spec.model_fields["kind"].default for spec in get_args(get_args(union)[0])}


def test_the_grid_has_every_kind_of_the_menu():
    assert {one["kind"] for one in METHODS.values()} == kinds(MethodSpec)
    assert {one["kind"] for one in OBJECTIVES.values()} == kinds(ObjectiveSpec)
    assert QUANTS == ALL_QUANTS


def test_a_choice_of_cells_has_every_pair():
    def pairs(cells) -> set:
        return {
            pair for cell in cells for pair in itertools.combinations(sorted(vars(cell).items()), 2)
        }

    assert pairs(CELLS) == pairs(product()) and len(CELLS) < 30


def refused(cell: Cell) -> bool:
    """By hand: what must not start, or cannot share a base."""
    if cell.method == "full" and cell.quant != "none":
        return True
    if cell.quant == "int8" and (cell.method == "dora" or cell.place in ("zero3", "pack")):
        return True
    if cell.method == "dora" and cell.quant == "nf4" and cell.place == "zero3":
        return True
    return cell.method == "full" and cell.place == "pack"


ABLE = [cell for cell in CELLS if not refused(cell)]


def test_what_is_refused_is_refused_by_a_sentence(tmp_path):
    said = {cell: verdict(cell, cell.run("builtin:tiny", tmp_path)) for cell in product()}
    assert {cell for cell, text in said.items() if text} == set(filter(refused, product()))
    assert all("{" not in text for text in said.values())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train_all(CELLS, tmp_path_factory.mktemp("grid"))


@pytest.mark.timeout(900)
@pytest.mark.parametrize("cell", ABLE, ids=[cell.name for cell in ABLE])
def test_a_cell_trains_and_keeps_every_promise(cell, trained, tmp_path):
    run = cell.run("builtin:tiny", tmp_path)
    broken = [text for found in trained[cell] for text in broken_promises(cell, run, found)]
    assert len(trained[cell]) == cell.world and broken == []
