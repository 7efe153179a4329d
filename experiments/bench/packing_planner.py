"""The placement of a sweep, simulated: `python experiments/bench/packing.py planner`."""

from __future__ import annotations

import random
import time

from rayft.trials.simulate import asha_lengths, simulate


def planner() -> None:
    """The placement rule on a large cluster."""
    rng = random.Random(0)
    cases = {
        "steps 100 to 900": [rng.randint(100, 900) for _ in range(10_000)],
        "survivors of 3 rungs": asha_lengths(10_000, 900, 100, 3),
    }
    print("10,000 trials, one pack per GPU, one step = 0.3 + 0.7 n seconds at n trials")
    print("lengths                order          GPUs   slots  makespan/bound  slots full  took")
    for name, lengths in cases.items():
        for order, gpus in (("longest first", 1000), ("as drawn", 1000), ("as drawn", 300)):
            for slots in (2, 4):
                given = sorted(lengths, reverse=True) if order == "longest first" else lengths
                began = time.perf_counter()
                o = simulate(given, gpus, slots, 0.3, 0.7)
                spent = time.perf_counter() - began
                print(
                    f"{name:<22} {order:<14} {gpus:<6} {slots:<6} {o.makespan / o.bound:<15.3f} "
                    f"{o.fullness:<11.3f} {spent:.2f} s"
                )
