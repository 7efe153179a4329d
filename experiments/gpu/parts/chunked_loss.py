"""Part: the chunked loss at vocabulary 128,256 against whole logits (bench/loss.py), bf16.

A whole training step of a random Llama, hidden 2,048, 4 layers, 4 rows of 1,024 tokens; both ways
of training the head.
"""

from __future__ import annotations

import statistics

import loss
from part import Part

part = Part()

SIZES = {"vocab": 128256, "hidden": 2048, "layers": 4, "rows": 4, "length": 1024, "repetitions": 10}
TINY = {"vocab": 2048, "hidden": 32, "layers": 1, "rows": 2, "length": 16, "repetitions": 2}


def main() -> None:
    given = [f"--{name}={value}" for name, value in (TINY if part.tiny else SIZES).items()]
    dtype = "float32" if part.tiny else "bfloat16"
    for train in ("full", "frozen_head"):
        argv = [*given, "--device", part.device, "--dtype", dtype, "--train", train]
        times, memories = loss.measure(loss.arguments(argv))
        pairs = zip(times["chunked"], times["plain"], strict=True)
        numbers = {"time, chunked / plain": statistics.median(a / b for a, b in pairs)}
        for way, (largest, _, device) in memories.items():
            numbers[f"{way} ms"] = 1e3 * statistics.median(times[way])
            numbers[f"{way} largest logits MiB"] = largest / 2**20
            if part.device == "cuda":
                numbers[f"{way} device peak MiB"] = device / 2**20
        part.note(**{train: numbers})


if __name__ == "__main__":
    main()
