"""The simulated placement of sweeps: bounds that hold always, and the case of a large cluster."""

import random
import time

from hypothesis import given, settings
from hypothesis import strategies as st

from rayft.trials.simulate import asha_lengths, simulate


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 200), min_size=1, max_size=60),
    st.integers(1, 8),
    st.integers(1, 5),
    st.floats(0.05, 1.0),
    st.floats(0.05, 1.0),
)
def test_nothing_is_faster_than_the_bound_or_slower_than_one_pack(lengths, packs, slots, a, b):
    found = simulate(lengths, packs, slots, a, b)
    assert found.makespan >= found.bound * (1 - 1e-6)
    alone = sum(lengths) * (a + b) + found.moves * (a + b * slots)
    assert found.makespan <= alone * (1 + 1e-6)
    assert 0 <= found.fullness <= 1 + 1e-6


def test_one_pack_by_hand():
    """Two trials of 10 and 20 steps: 10 steps at 1 + 2 x 0.5, then 10 at 1 + 0.5."""
    found = simulate([10, 20], packs=1, slots=2, a=1.0, b=0.5)
    assert found.makespan == 10 * 2.0 + 10 * 1.5


def test_an_idle_pack_takes_over_from_a_full_one():
    found = simulate([30, 5, 30, 30], packs=2, slots=2, a=0.0, b=1.0)
    assert found.moves == 1 and found.makespan < 65


def test_ten_thousand_trials_on_a_thousand_gpus():
    """Lengths known beforehand, the longest first, two slots a pack."""
    rng = random.Random(0)
    for lengths in (
        asha_lengths(10_000, 900, 100, 3),
        [rng.randint(100, 900) for _ in range(10_000)],
    ):
        began = time.perf_counter()
        found = simulate(sorted(lengths, reverse=True), 1000, 2, a=0.3, b=0.7)
        assert time.perf_counter() - began < 60  # half a second; a square of 10,000 takes minutes
        assert found.makespan <= 1.10 * found.bound and found.fullness >= 0.95


def test_nobody_knows_the_lengths():
    """First come, first served: enough trials per GPU hide the last survivors, ten do not."""
    lengths = asha_lengths(10_000, 900, 100, 3)
    many, few = (simulate(lengths, packs, 2, a=0.3, b=0.7) for packs in (300, 1000))
    assert many.makespan <= 1.10 * many.bound and many.fullness >= 0.95
    assert few.makespan > 1.2 * few.bound and few.fullness < 0.85  # as the README has it


def test_lengths_of_successive_halving():
    lengths = asha_lengths(30_000, 900, 100, 3)
    shares = [lengths.count(steps) / len(lengths) for steps in (100, 300, 900)]
    assert all(abs(s - w) < 0.01 for s, w in zip(shares, (2 / 3, 2 / 9, 1 / 9), strict=True))
