"""The random models of the benches, made once per day and shared by the parts."""

from __future__ import annotations

import argparse
import gc
import shutil
from pathlib import Path

import packing
import torch
from part import Part

GIB = {"d64": 0.1, "1b": 3.0, "8b": 17.0}  # of the saved weights in bf16, and some room


def options(part: Part, shape: str, *more: str) -> argparse.Namespace:
    """packing.py's arguments on the part's device; toy sizes where it is asked for them."""
    size = ["--shape", "d64", "--dtype", "fp32"] if part.tiny else ["--shape", shape]
    dtype = [] if part.tiny else ["--dtype", "bf16"]
    return packing.arguments([*more, "--device", part.device, *size, *dtype])


def saved(part: Part, args: argparse.Namespace) -> Path:
    """Folder of the model of `args.shape`; another part may have left it."""
    folder = part.args.scratch / f"model-{args.shape}"
    if not folder.exists():
        part.room(GIB[args.shape], f"the {args.shape} model")
        half = folder.with_suffix(".half")  # what a part that was cut off may have left
        shutil.rmtree(half, ignore_errors=True)
        packing.model(args, half).rename(folder)
    return folder


def begin(device: str) -> None:
    """Free what was dropped; peak memory counts from here. On a CPU: one thread."""
    gc.collect()  # models hold cycles
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    else:
        torch.set_num_threads(1)
