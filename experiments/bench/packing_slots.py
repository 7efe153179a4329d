"""What a slot of a pack takes, from 8 slots to 1,024: `python experiments/bench/packing.py slots`.

Each row is a process of its own, with a pack of toy trials (--shape d64; one row of --length tokens
a step; held-out loss every --every steps). Columns:
  slots, parked   trials that train at a time, and those beyond them, which take turns
  admit           ms of one admission, median over the last tenth of them
  step            ms per trial-step, evaluations, commits and turns included
  copied          rows of the buckets that were copied per admission, because they grew
  MB per trial    adapter, gradients, moments: their tensors, as allocated; best: states that wait
                  to be written; other: what the process has grown by at rest, less these
  passes          MB at most, of all trials together, while stepping, above rest: activations of a
                  pass, evaluations, states on their way to storage
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import FIRST_ID, _commit, _processor, fresh
from packing import SHAPES, Lab, arguments, run_of

from rayft.compose.job import AttemptJob
from rayft.config.run import Run
from rayft.data.cache import save
from rayft.data.table import from_documents
from rayft.trials.pack import Pack

HELD_OUT = 8  # documents
HEAD = """\
                 ms per            rows     MB per trial                                        MB
slots   parked   admit    step     copied   adapter gradients moments best   other  all    passes"""


def table(args: argparse.Namespace) -> None:
    """A row per number of slots, then one where --resident of the most train at a time."""
    print("$ python experiments/bench/packing.py slots", *sys.argv[2:])
    print(f"commit {_commit()}; {_processor()}; {args.threads} threads; torch {torch.__version__}")
    print(f"model {args.shape} {args.dtype}; rank {args.rank}; {args.length} tokens a trial-step\n")
    print(HEAD, flush=True)
    cases = [(slots, 0) for slots in args.slots]
    if args.resident < max(args.slots):
        cases.append((args.resident, max(args.slots) - args.resident))
    for slots, parked in cases:
        row = fresh(1, args.threads, _measure, args, slots, parked)[0]
        print(
            f"{slots:<7} {parked:<8} "
            f"{row['admit']:<8.1f} {row['step']:<8.2f} {row['copied']:<8.1f} "
            f"{row['adapter']:<7.3f} {row['gradients']:<9.3f} {row['moments']:<7.3f} "
            f"{row['best']:<6.3f} {row['other']:<6.3f} {row['all']:<6.3f} {row['passes']:.0f}",
            flush=True,
        )


def _measure(
    _rank: int, _world: int, folder: Path, args: argparse.Namespace, slots: int, parked: int
) -> dict[str, float]:
    trials = slots + parked
    lab = Lab(args, folder)
    digest = _with_held_out(lab)
    runs = [_run(args, lab, f"t{number}") for number in range(trials + 1)]
    pack = Pack(runs[0], lab.cache.uri, digest, lab.device, slots=slots, waiting=parked)
    pack.admit(_job(runs[0], lab, digest))  # the first one measures, and warms everything up
    for _ in range(2 * args.every):
        pack.step()
    pack.leave(runs[0].name, keep=False).result()
    before, seconds = _resident(), []
    for run in runs[1:]:
        job, began = _job(run, lab, digest), time.perf_counter()
        pack.admit(job)
        seconds.append(time.perf_counter() - began)
    copied = sum(bucket.copied for bucket in pack._model.buckets.all.values())
    step = _stepped(args, pack, trials)
    peak = _peak()
    rest = _resident()
    parts = _parts(pack)
    for trial in pack.trials:
        pack._table.all[trial].commits.forget()  # a thousand last commits are not measured
    known = sum(parts.values())
    return {
        "admit": 1e3 * statistics.median(seconds[-max(1, trials // 10) :]),
        "step": step,
        "copied": copied / trials,
        **{name: value / trials / 1e6 for name, value in parts.items()},
        "other": (rest - before - known) / trials / 1e6,
        "all": (rest - before) / trials / 1e6,
        "passes": (peak - rest) / 1e6,
    }


def _stepped(args: argparse.Namespace, pack: Pack, trials: int) -> float:
    """ms per trial-step, over as many steps as give every trial --evaluations evaluations."""
    stepped, wanted = 0, trials * args.every * args.evaluations
    for _ in range(args.every):  # moments come to be, and every slot gets its first step
        stepped += len(pack.trials) - len(pack.parked)
        pack.step()
    began, warm = time.perf_counter(), stepped
    while stepped < warm + wanted:
        stepped += len(pack.trials) - len(pack.parked)
        pack.step()
    return 1e3 * (time.perf_counter() - began) / (stepped - warm)


def _with_held_out(lab: Lab) -> str:
    """Put a held-out table into the lab's cache; what names both tables."""
    rng, shape = np.random.default_rng(1), (HELD_OUT, lab.args.length)
    tokens = rng.integers(FIRST_ID, SHAPES[lab.args.shape][-1], shape, dtype=np.int32)
    documents = [(one, one >= 0) for one in tokens]
    held = from_documents(documents, [*range(HELD_OUT)], source=0, counts=(), sources=("random",))
    save(held, {"hash": held.digest, "fingerprint": {}}, lab.cache.child(held.digest))
    return f"{lab.table.digest}+{held.digest}"


def _run(args: argparse.Namespace, lab: Lab, name: str) -> Run:
    plain = run_of(args, lab.folder, lab.storage, name, args.rank, 1).resolved()
    data: dict[str, Any] = plain["data"] | {"eval": plain["data"]["train"]}
    train = plain["train"] | {"eval_every": args.every}
    return Run.model_validate(plain | {"data": data, "train": train})


def _job(run: Run, lab: Lab, digest: str) -> AttemptJob:
    return AttemptJob(run.resolved(), run.digest(), "1x0", lab.cache.uri, digest)


def _parts(pack: Pack) -> dict[str, float]:
    """Bytes of all trials' tensors."""
    buckets = pack._model.buckets.all.values()
    adapters = sum(bucket._params.nbytes for bucket in buckets)
    moments = 0
    for slot in pack._table.all.values():
        moments += sum(t.nbytes for s in slot.optimizer.state.values() for t in s.values())
    for slot in pack._table.parked.values():
        adapters += sum(param.nbytes for param in slot.adapter.params.values())
    grads = sum(bucket._grads.nbytes for bucket in buckets)
    waiting = [slot.commits._best for slot in pack._table.all.values()]
    best = sum(
        tensor.nbytes
        for state in waiting
        if state is not None
        for piece in state.shard.slices.values()
        for tensor in piece.tensors.values()
    )
    return {"adapter": adapters, "gradients": grads, "moments": moments, "best": best}


def _resident() -> int:
    """Bytes of this process, without what it has freed; the peak begins anew."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    found = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    return found


def _peak() -> int:
    """Bytes at most since `_resident`."""
    return _status("VmHWM")


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--slots", type=int, nargs="+", default=[8, 64, 256, 1024])
    parser.add_argument("--resident", type=int, default=64, help="that train at a time, last row")
    parser.add_argument("--every", type=int, default=5, help="steps between evaluations")
    parser.add_argument("--evaluations", type=int, default=2, help="of each trial")
    parser.add_argument("--length", type=int, help="tokens of a row; 64")
    parser.add_argument("--shape", choices=list(SHAPES), help="d64")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="cpu")
    defaults = arguments(["--shape", "d64", "--device", "cpu"])
    table(parser.parse_args(argv, defaults))
