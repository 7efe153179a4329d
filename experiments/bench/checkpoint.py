"""What saving costs: the stall of a background save against a synchronous one, and hashing.

    python experiments/bench/checkpoint.py [--mb 512] [--repeats 7] [--folder DIR]

Interleaved, medians. Every save is of the same fp32 state (parameter and two moments).
  sync    serialise to bytes on the training thread: write + fsync, then sha256 of the same bytes
  stall   what `CheckpointWriter.save` takes before training goes on
  save    that save from start to COMMIT.json
  no hash write + fsync of the same buffer, nothing else (what hashing is compared with)
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from rayft.compose.checkpoint import CheckpointWriter
from rayft.compose.shardfile import Staging
from rayft.core.shards import Shard, Slice
from rayft.core.storage import Storage

KINDS = ("param", "exp_avg", "exp_avg_sq")


def state(megabytes: int, parameters: int = 24) -> Shard:
    """`megabytes` MiB in `parameters` slices."""
    numel = (megabytes << 20) // (parameters * len(KINDS) * 4)
    return Shard(
        {
            f"layer.{n}": Slice((numel,), 0, {kind: torch.randn(numel) for kind in KINDS})
            for n in range(parameters)
        }
    )


def seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def plain_write(storage: Storage, staging: Staging) -> None:
    with storage.open_output("plain.safetensors") as file:
        for chunk in staging.chunks():
            file.write(chunk)


def synchronous(storage: Storage, staging: Staging, shard: Shard) -> None:
    staging.fill(shard)
    plain_write(storage, staging)
    digest = hashlib.sha256()
    for chunk in staging.chunks():
        digest.update(chunk)
    digest.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mb", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--folder", type=Path, default=None)
    args = parser.parse_args()
    shard, times = state(args.mb), {}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        storage, staging = Storage.open(folder), Staging()
        writer = CheckpointWriter(storage.child("run"), 0, 1, 1)
        writer.reserve(shard)
        staging.fill(shard)
        for step in range(1, args.repeats + 1):
            row = {"sync": seconds(lambda: synchronous(storage, staging, shard))}
            start = time.perf_counter()
            row["stall"] = seconds(lambda step=step: writer.save(step, shard, {}))
            writer.wait()
            row["save"] = time.perf_counter() - start
            row["no hash"] = seconds(lambda: plain_write(storage, staging))
            for name, value in row.items():
                times.setdefault(name, []).append(value)
    median = {name: statistics.median(values) for name, values in times.items()}
    print(f"{args.mb} MiB, {args.repeats} repeats, medians")
    for name, value in median.items():
        spread = f"{min(times[name]):.3f} .. {max(times[name]):.3f}"
        print(f"  {name:8} {value:7.3f} s   ({spread})")
    hashed = writer.stats.hash_seconds / args.repeats
    print(f"  stall / sync            {median['stall'] / median['sync']:6.1%}   (at most 5 %)")
    print(f"  waiting for hash / save {hashed / median['save']:6.1%}   (at most 10 %)")
    print(f"  save / no hash          {median['save'] / median['no hash']:6.2f}x")


if __name__ == "__main__":
    main()
