"""Packing: every document once, no row too full, as few rows as best-fit decreasing gives."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayft.data.packing import pack

CASES = st.integers(1, 64).flatmap(
    lambda capacity: st.tuples(st.just(capacity), st.lists(st.integers(1, capacity), max_size=120))
)


def rows_of(lengths, capacity):
    order, offsets = pack(np.asarray(lengths, dtype=np.int64), capacity)
    return [order[a:b].tolist() for a, b in zip(offsets, offsets[1:], strict=False)]


def first_fit_decreasing(lengths, capacity):
    free = []
    for length in sorted(lengths, reverse=True):
        for row, room in enumerate(free):
            if room >= length:
                free[row] -= length
                break
        else:
            free.append(capacity - length)
    return len(free)


def best_fit_decreasing(lengths, capacity):
    free = []
    for length in sorted(lengths, reverse=True):
        fitting = [row for row, room in enumerate(free) if room >= length]
        if fitting:
            free[min(fitting, key=lambda row: free[row])] -= length
        else:
            free.append(capacity - length)
    return len(free)


@settings(deadline=None)  # machines under load
@given(CASES)
def test_every_document_once_and_no_row_too_full(case):
    capacity, lengths = case
    rows = rows_of(lengths, capacity)
    assert sorted(document for row in rows for document in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[document] for document in row) <= capacity for row in rows)
    assert rows == rows_of(lengths, capacity)


@settings(deadline=None)  # machines under load
@given(CASES)
def test_rows_as_best_fit_decreasing(case):
    capacity, lengths = case
    assert len(rows_of(lengths, capacity)) == best_fit_decreasing(lengths, capacity)


def test_within_a_row_of_first_fit_decreasing_on_lengths_like_chat():
    rng = np.random.default_rng(0)
    for _ in range(10):
        lengths = np.clip(rng.lognormal(4, 1, 500), 1, 512).astype(np.int64)
        assert len(rows_of(lengths, 512)) <= first_fit_decreasing(lengths.tolist(), 512) + 1


def test_refuses_what_cannot_fit():
    for lengths in ([0], [9]):
        with pytest.raises(ValueError, match="from 1 to 8"):
            pack(np.asarray(lengths), 8)
