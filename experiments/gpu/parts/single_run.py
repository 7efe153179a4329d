"""Part: tokens/s of one run by itself and its share of the device's peak (MFU), 1B shape, bf16.

rayft's own loop (compose/loop.py) without Ray, evaluation and checkpoints. Full fine-tuning counts
6 N FLOP per token, LoRA 4 N: a frozen base has no weight gradients. N: parameters that multiply,
so without the input embedding; attention's own products are left out, as is usual.
"""

from __future__ import annotations

import statistics

import packing
import torch
from models import begin, options, saved
from part import Part
from peaks import peak_of

from rayft.config.run import FullSpec
from rayft.models.quiet import hush

part = Part()

FLOP = {"full": 6, "lora": 4}


def multiplying(shape: str) -> int:
    """Parameters of the random Llama without its input embedding."""
    hidden, layers, heads, kv, inner, vocab = packing.SHAPES[shape]
    attention = 2 * hidden * hidden + 2 * hidden * (hidden // heads) * kv
    return layers * (attention + 3 * hidden * inner) + vocab * hidden


def main() -> None:
    hush()
    length, rows = (32, 2) if part.tiny else (1024, 8)
    rounds = ["--rounds", "2", "--steps", "1"] if part.tiny else ["--rounds", "5", "--steps", "3"]
    args = options(part, "1b", "--length", str(length), *rounds)
    model = saved(part, args)
    lab = packing.Lab(args, part.folder("single"), model)
    count = multiplying(args.shape)
    name = torch.cuda.get_device_name() if part.device == "cuda" else "a CPU"
    peak = peak_of(name)
    part.note(**{"parameters, N": count, "tokens per step": rows * length})
    unknown = {"no MFU": f"the peak of {name} is not known"}
    part.note(**({"peak TFLOP/s": peak} if peak else unknown))
    for way, factor in FLOP.items():
        begin(part.device)
        run = lab.run(16, rows)
        if way == "full":
            run = run.model_copy(update={"methods": (FullSpec(),)})
        loop = packing.RayftLoop(run, lab.table, lab.device, lab.storage / run.name)
        times = packing.timed(args, {way: (lambda loop=loop: loop.steps(1), args.steps)})[way]
        rate = rows * length / statistics.median(times)
        numbers = {"tokens/s": rate, "ms": 1e3 * statistics.median(times)}
        numbers["peak GiB"] = packing.peak_memory(lab.device) / 2**30
        if peak:
            numbers["MFU"] = factor * count * rate / (peak * 1e12)
        part.note(**{way: numbers})
        del loop


if __name__ == "__main__":
    main()
