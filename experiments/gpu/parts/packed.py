"""Part: packed trials against one adapter and against one after another (bench/packing.py).

1b: 16 trials of 256 tokens and of 1,024; 8b: 8 trials of 512. First "sequential", how many times as
fast as one after another; then "equal" and "mixed" (ranks), tokens/s over one adapter with as many
tokens. Every way loads the model once more, and what is found is passed on case by case.
"""

from __future__ import annotations

import statistics

import packing
from models import begin, options, saved
from part import Part

from rayft.models.quiet import hush

part = Part({"--shape": "1b", "--quant": "none"})

PAIR, SHARE = ("packed", "solo"), ("packed", "one", "pack of one")
CASES = {  # trials, tokens per trial-step, ways
    "1b": ((16, 256, PAIR), (16, 256, (*SHARE, "mixed", "one mixed")), (16, 1024, PAIR)),
    "8b": ((8, 512, PAIR), (8, 512, SHARE)),
    "tiny": ((2, 64, PAIR),),
}
ROUNDS = {"1b": (5, 3), "8b": (3, 2), "tiny": (1, 1)}  # and steps per turn


def main() -> None:
    hush()
    begin(part.device)
    if part.args.quant != "none":
        part.need("bitsandbytes")
    size = "tiny" if part.tiny else part.args.shape
    more = ["--rank", "16", "--length", "64" if part.tiny else "256", "--quant", part.args.quant]
    args = options(part, part.args.shape, *more)
    args.rounds, args.steps = ROUNDS[size]
    model = saved(part, args)
    for number, (trials, tokens, ways) in enumerate(CASES[size]):
        args.trials, rows = trials, tokens // args.length
        begin(part.device)
        lab = packing.Lab(args, part.folder(f"packed-{args.quant}-{number}"), model)
        found = packing.compare(args, lab, rows, ways)
        told = packing.shares(trials, found)
        ms = 1e3 * statistics.median(found["packed"])
        numbers = {"packed step ms": ms, "tokens/s": 1e3 * trials * tokens / ms}
        numbers |= {name: statistics.median(values) for name, values in told.items()}
        numbers |= {f"{name} from": min(values) for name, values in told.items()}
        numbers["peak GiB of all ways"] = packing.peak_memory(lab.device) / 2**30
        part.note(**{f"{trials} trials x {tokens} tokens, {' / '.join(ways)}": numbers})


if __name__ == "__main__":
    main()
