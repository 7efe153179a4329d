"""Part: the ways of training of experiments/losses/table.py, on CPU and GPU side by side.

Same data, same seeds, fp32; on the GPU without TF32. LIMITS are the largest relative differences
allowed, of 20 losses and two held-out ones. They are chosen, not measured: nothing has run on a GPU
yet. 1e-3 is what tests/gpu asks for; nf4 rounds, and a weight at a border may fall to the other
side there (2.8e-4 for one code per layer, see table.py).
"""

from __future__ import annotations

import table
import torch
from part import Part

from rayft.models.quiet import hush

part = Part()

LIMITS = {"full": 1e-3, "lora": 1e-3, "qlora": 1e-2, "packed": 1e-3}


def main() -> None:
    hush()
    device = torch.device("cuda:0" if part.device == "cuda" else "cpu")
    steps = 4 if part.tiny else table.STEPS
    ways = ("packed",) if part.tiny else ("full", "lora", "packed", "qlora")
    wrong = []
    for way in ways:
        if way == "qlora":
            part.need("bitsandbytes")
        sides = [table.measure([way], on, steps) for on in (table.CPU, device)]
        gap = table.differences(sides[1], sides[0])[way]
        cpu, gpu = (side["losses"][way] for side in sides)
        part.note(**{way: {"difference": gap, "limit": LIMITS[way], "CPU": cpu, "GPU": gpu}})
        if not gap <= LIMITS[way]:
            wrong.append(f"{way} {gap:.1e}")
    if wrong:
        part.fail(f"CPU and GPU differ too much: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
