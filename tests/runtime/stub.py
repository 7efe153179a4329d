"""A stand-in for compose.job.execute: saves a step number, misbehaves on demand.

`job.data_dir` is a folder: `step` holds the committed step, `pid-<rank>` the process ids, `fault`
holds lines `<what> <rank or all> <step> <n-th attempt whose workers started, or *>`.
"""

import os
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist

from rayft.compose.job import AttemptOutcome, PreparedData, ProgressEvent
from rayft.core.errors import DivergedError
from rayft.records.run_progress import RunProgress, RunSize

SECONDS = 0.02  # per step


def prepare(run, mapper):
    """The data folder beside the run, and a task on the way to see that tasks work."""
    folder = Path(run.storage) / "work"
    folder.mkdir(parents=True, exist_ok=True)
    assert mapper(double, [1, 2]) == [2, 4]
    total = dict(rows=4, documents=4, tokens=40, trained=20, cut=0, dropped=0, bad=0)
    return PreparedData(str(folder), "d" * 16, {"train": {"total": total}})


def double(value):
    return 2 * value


def execute(job, rank, world, device, signals):
    """Counts to train.steps; commits every save_every steps."""
    folder = Path(job.data_dir)
    (folder / f"pid-{rank}").write_text(str(os.getpid()))
    total, every = job.config["train"]["steps"], job.config["train"]["save_every"]
    kept = folder / "step"
    step = int(kept.read_text()) if kept.exists() else 0
    with (folder / "starts").open("a") as log:
        log.write(f"{rank} {step} {job.attempt} {torch.get_num_threads()} {Path.cwd()}\n")
    # Counted by what started: Ray may lose an attempt before it has any worker.
    started = (folder / "starts").read_text().splitlines()
    nth = str(len({line.split()[2] for line in started}))
    signals.progress(ProgressEvent("start", step, total))
    status = "done"
    while step < total:
        flag = torch.tensor([float(signals.stop_requested())])
        dist.all_reduce(flag)
        if flag.item():
            status = "interrupted"
            save(folder, rank, step, signals)
            break
        misbehave(folder, rank, step + 1, nth)
        time.sleep(SECONDS)
        step += 1
        numbers = {"loss": 1 / step}
        signals.progress(ProgressEvent("step", step, numbers=numbers, lr={"all": 1e-3}))
        if step % every == 0 or step == total:
            save(folder, rank, step, signals)
    progress = RunProgress(step, 10 * step, base={"eval_loss": 2.0}, eval={"eval_loss": 1.0})
    return AttemptOutcome(status, progress, RunSize(total))


def save(folder, rank, step, signals):
    dist.barrier()
    if rank == 0:
        (folder / "step.tmp").write_text(str(step))
        (folder / "step.tmp").rename(folder / "step")
        signals.progress(ProgressEvent("save", step))


def misbehave(folder, rank, step, attempt):
    fault = folder / "fault"
    if not fault.exists():
        return
    for line in fault.read_text().splitlines():
        what, who, when, which = line.split()
        here = who in ("all", str(rank)) and which in ("*", attempt) and step == int(when)
        if here and what == "bug":
            raise ValueError(f"boom at 0x{id(fault):x}")
        if here and what == "nan":
            raise DivergedError("loss nan: not a number any more", where=f"step {step}")
        if here and what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
