"""Part: 32 trials of rank 16 in one pack on an 8B-shaped nf4 base, under 60 GB.

LoRA on all linear layers, 512 tokens per trial and step, activations recomputed (without that they
alone take more). The peak is what the allocator saw in the steps of all 32. The pack may use the
whole device: it admits by an estimate, which may be far above what 32 trials then take.
"""

from __future__ import annotations

import packing
import torch
from models import begin, options, saved
from part import Part

from rayft.compose.job import AttemptJob
from rayft.config.run import Run
from rayft.models.quiet import hush
from rayft.trials.pack import Pack
from rayft.trials.types import NoRoom

part = Part()

LIMIT = 60_000_000_000  # bytes


def runs(lab: packing.Lab, count: int, rank: int) -> list[Run]:
    """With recomputed activations."""
    made = [lab.run(rank, 1) for _ in range(count)]
    changed = {"gradient_checkpointing": True}
    trains = [run.train.model_copy(update=changed) for run in made]
    pairs = zip(made, trains, strict=True)
    return [run.model_copy(update={"train": train}) for run, train in pairs]


def main() -> None:
    hush()
    begin(part.device)
    part.need("bitsandbytes")
    count, length = (4, 32) if part.tiny else (32, 512)
    args = options(
        part, "8b", "--length", str(length), "--rank", "16", "--quant", "nf4", "--rounds", "3"
    )
    model = saved(part, args)
    lab = packing.Lab(args, part.folder("many"), model)
    begin(part.device)
    trials = runs(lab, count, args.rank)
    where = (lab.cache.uri, lab.table.digest)
    pack = Pack(trials[0], *where, lab.device, slots=count)
    for number, run in enumerate(trials):
        try:
            pack.admit(AttemptJob(run.resolved(), run.digest(), "1x0", *where))
        except NoRoom as error:
            part.fail(f"trial {number + 1} of {count} did not fit: {error}")
        part.note(trials=number + 1, **{"tokens per trial": length, "peak GB": _peak(lab.device)})
    timing = packing.timed(args, {"packed": (pack.step, 1)})["packed"]
    ms = 1e3 * min(timing)
    part.note(**{"peak GB": _peak(lab.device), "best step ms": ms, "limit GB": LIMIT / 1e9})
    part.note(**{"tokens/s": 1e3 * count * length / ms})
    if _peak(lab.device) > LIMIT / 1e9:
        part.fail(f"{_peak(lab.device):.1f} GB were taken, more than {LIMIT / 1e9:.0f}")


def _peak(device: torch.device) -> float:
    """10^9 bytes."""
    return packing.peak_memory(device) / 1e9


if __name__ == "__main__":
    main()
