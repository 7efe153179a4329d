"""Part: packed trials against one adapter and against one after another (bench/packing.py).

1b: 16 trials of 256 tokens and of 1,024; 8b: 8 trials of 512 tokens, and fewer ways, for every way
loads the model once more. Efficiency: tokens/s of the pack over one adapter with as many tokens.
"""

from __future__ import annotations

import statistics

import packing
from models import begin, options, saved
from part import Part

from rayft.models.quiet import hush

part = Part({"--shape": "1b", "--quant": "none"})

CASES = {  # trials, tokens per trial-step, ways
    "1b": ((16, 256, packing.WAYS), (16, 1024, ("packed", "solo"))),
    "8b": ((8, 512, ("packed", "solo", "one", "pack of one")),),
    "tiny": ((2, 64, ("packed", "solo")),),
}


def main() -> None:
    hush()
    begin(part.device)
    if part.args.quant != "none":
        part.need("bitsandbytes")
    rounds = ["--rounds", "1", "--steps", "1"] if part.tiny else ["--rounds", "5", "--steps", "3"]
    more = ["--rank", "16", "--length", "64" if part.tiny else "256", "--quant", part.args.quant]
    args = options(part, part.args.shape, *more, *rounds)
    model = saved(part, args)
    for trials, tokens, ways in CASES["tiny" if part.tiny else part.args.shape]:
        args.trials, rows = trials, tokens // args.length
        begin(part.device)
        lab = packing.Lab(args, part.folder(f"packed-{args.quant}-{trials}x{tokens}"), model)
        found = packing.compare(args, lab, rows, ways)
        told = packing.shares(trials, found)
        ms = 1e3 * statistics.median(found["packed"])
        numbers = {"packed step ms": ms, "tokens/s": 1e3 * trials * tokens / ms}
        numbers |= {name: statistics.median(values) for name, values in told.items()}
        numbers |= {f"{name} from": min(values) for name, values in told.items()}
        numbers["peak GiB of all ways"] = packing.peak_memory(lab.device) / 2**30
        part.note(**{f"{trials} trials x {tokens} tokens": numbers})


if __name__ == "__main__":
    main()
