"""What saving costs: the stall of a background save against a synchronous one, and hashing.

    python experiments/bench/checkpoint.py [--mb 512] [--repeats 7] [--folder DIR]

Interleaved, medians. Every save is of the same fp32 state (parameter and two moments) into a new
file; the file of two saves before is deleted, as retention does.
  stall   what `CheckpointWriter.save` takes before training goes on (the copy into host memory)
  save    that save from start to COMMIT.json and retention
  sync    the plain way on the training thread: safetensors' save_file, fsync, sha256 of the file
  write   write + fsync of the staged buffer, no hash
  hash    sha256 of the staged buffer alone
"""

from __future__ import annotations

import argparse
import hashlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from rayft.checkpoint.shard_file import StagingBuffer
from rayft.checkpoint.writer import CheckpointWriter
from rayft.core.shards import ParamSlice, StateShard
from rayft.storage.folder import Storage

KINDS = ("param", "exp_avg", "exp_avg_sq")


def state(megabytes: int, parameters: int = 24) -> StateShard:
    """`megabytes` MiB in `parameters` slices."""
    numel = (megabytes << 20) // (parameters * len(KINDS) * 4)
    return StateShard(
        {
            f"layer.{n}": ParamSlice((numel,), 0, {kind: torch.randn(numel) for kind in KINDS})
            for n in range(parameters)
        }
    )


def seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def plain_write(storage: Storage, staging: StagingBuffer, step: int) -> None:
    with storage.open_output(f"plain-{step}") as file:
        for chunk in staging.chunks():
            file.write(chunk)
    storage.delete(f"plain-{step - 2}")


def synchronous(folder: Path, shard: StateShard, step: int) -> None:
    flat = {
        f"{kind}:{name}": tensor
        for name, piece in shard.slices.items()
        for kind, tensor in piece.tensors.items()
    }
    path = folder / f"sync-{step}.safetensors"
    save_file(flat, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())
        hashlib.file_digest(file, "sha256")
    (folder / f"sync-{step - 2}.safetensors").unlink(missing_ok=True)


def hash_only(staging: StagingBuffer) -> None:
    digest = hashlib.sha256()
    for chunk in staging.chunks():
        digest.update(chunk)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mb", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--folder", type=Path, default=None)
    args = parser.parse_args()
    shard, times = state(args.mb), {}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        storage, staging = Storage.open(folder), StagingBuffer()
        writer = CheckpointWriter(storage.child("run"), 0, 1, 1)
        writer.reserve(shard)
        staging.fill(shard)
        for step in range(1, args.repeats + 1):
            row = {"sync": seconds(lambda step=step: synchronous(Path(folder), shard, step))}
            start = time.perf_counter()
            row["stall"] = seconds(lambda step=step: writer.save(step, shard, {}))
            writer.wait()
            row["save"] = time.perf_counter() - start
            row["write"] = seconds(lambda step=step: plain_write(storage, staging, step))
            row["hash"] = seconds(lambda: hash_only(staging))
            for name, value in row.items():
                times.setdefault(name, []).append(value)
    median = {name: statistics.median(values) for name, values in times.items()}
    print(f"{args.mb} MiB, {args.repeats} repeats, medians")
    for name, value in median.items():
        spread = f"{min(times[name]):.3f} .. {max(times[name]):.3f}"
        print(f"  {name:8} {value:7.3f} s   ({spread})")
    hashed = writer.stats.hash_seconds / args.repeats
    print(f"  stall / sync             {median['stall'] / median['sync']:6.1%}   (at most 5 %)")
    print(f"  stall / save             {median['stall'] / median['save']:6.1%}")
    print(f"  hash after write / save  {hashed / median['save']:6.1%}   (at most 10 %)")


if __name__ == "__main__":
    main()
