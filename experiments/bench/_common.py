"""What the training benchmarks share: facts, a random model, made-up rows, rayft's own loop.

rayft is measured as a run uses it (compose.assemble, compose.loop.train, compose.session), less
Ray, evaluation and checkpoints.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.multiprocessing as mp
from transformers import LlamaConfig

import rayft
from rayft.compose.assemble import assemble
from rayft.compose.data import Corpus
from rayft.compose.execute import stepper_of
from rayft.compose.job import AttemptJob
from rayft.compose.loop import LoopHooks, StepResult, StepSchedule, train
from rayft.compose.session import RunSession
from rayft.config.run import (
    DataSpec,
    FullSpec,
    ModelSpec,
    OptimSpec,
    Run,
    SourceSpec,
    TrainSpec,
    ZeroSpec,
)
from rayft.config.strategies import StrategySpec
from rayft.core.protocols import BatchStream
from rayft.data.table import TokenTable, from_documents
from rayft.storage.folder import Storage

ROOT = Path(__file__).parents[2]
TINY = Path(rayft.__file__).parent / "models" / "tiny"
FIRST_ID = 16  # smaller ones are special tokens
ENDLESS = 1_000_000  # steps of the constant schedule
OPTIM = OptimSpec(lr=1e-4, schedule="constant", warmup=0, weight_decay=0.01, clip=1.0)
SIZES = {  # of the model; steps must take 100 ms or more to say something about overhead
    "cpu": {"hidden": 256, "layers": 4, "vocab": 4096},
    "cuda": {"hidden": 2048, "layers": 8, "vocab": 32000},
    "quick": {"hidden": 32, "layers": 2, "vocab": 2048},
}


def parse(parser: argparse.ArgumentParser, presets: dict[str, dict[str, Any]], argv: Sequence[str]):
    """Arguments; defaults that depend on --device and --quick come from SIZES and `presets`."""
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if cuda else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run at all")
    parser.add_argument("--threads", type=int, default=1, help="torch threads of every process")
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=None)
    known, _ = parser.parse_known_args(argv)
    preset = "quick" if known.quick else known.device
    defaults = SIZES[preset] | presets[preset] | {"memory": not known.quick}
    for name, value in defaults.items():
        if name != "memory":
            parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    args = parser.parse_args(argv)
    if args.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    if args.memory is None:
        args.memory = defaults["memory"]
    return args


def header(args: argparse.Namespace, processes: int, *more: str) -> None:
    """Command line, commit, machine and versions (`more`: of further packages)."""
    load = os.getloadavg()[0]
    cores = len(os.sched_getaffinity(0))
    device = torch.cuda.get_device_name() if args.device == "cuda" else _processor()
    names = ("torch", "transformers", "deepspeed", *more)
    print("$", shlex.join(["python", *sys.argv]))
    print(f"commit   {_commit()}")
    print(f"machine  {device}, {cores} cores, load average {load:.1f} at the start")
    print(f"threads  {processes} processes x {args.threads}, {args.device} {args.dtype}")
    print("versions", ", ".join(f"{name} {version(name)}" for name in names))
    print(f"model    random Llama, {parameters(args) / 1e6:.1f} M parameters ", end="")
    print(f"(hidden {args.hidden}, layers {args.layers}, vocabulary {args.vocab})")
    if args.quick or load > cores / 4:
        reason = "tiny sizes" if args.quick else "the machine is busy with something else"
        print(f"WARNING  {reason}: these numbers are not to be relied on")
    print(flush=True)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def _commit() -> str:
    """Short hash, "+ changes" where rayft/ or the benchmarks differ from it."""
    git = ["git", "-C", str(ROOT)]
    if not shutil.which("git") or not (ROOT / ".git").exists():
        return "unknown"
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    state = [*git, "status", "--porcelain", "rayft", "experiments/bench"]
    changes = subprocess.run(state, capture_output=True, text=True).stdout.strip()
    return head.stdout.strip() + (" + changes" if changes else "")


def llama(args: argparse.Namespace) -> LlamaConfig:
    """Grouped-query attention, separate head, weights large enough for attention to matter."""
    heads = max(1, args.hidden // 64)
    return LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 11 // 4 // 16 * 16,
        num_hidden_layers=args.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        max_position_embeddings=1 << 20,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        use_cache=False,
        architectures=["LlamaForCausalLM"],
    )


def parameters(args: argparse.Namespace) -> int:
    """Of the random model."""
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        return sum(param.numel() for param in LlamaForCausalLM(llama(args)).parameters())


@contextmanager
def model_folder(args: argparse.Namespace) -> Iterator[Path]:
    """Config of the random model beside the tokenizer of builtin:tiny; weights come from the
    seed."""
    with tempfile.TemporaryDirectory(prefix="rayft-bench-") as name:
        folder = Path(name) / "model"
        shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("*.safetensors"))
        llama(args).save_pretrained(folder)
        yield folder


def rows(lengths: Sequence[int], vocab: int, seed: int) -> TokenTable:
    """Random documents; the first third of each is prompt and not trained."""
    rng = np.random.default_rng(seed)
    documents = [
        (
            rng.integers(FIRST_ID, vocab, size, dtype=np.int32),
            np.arange(size) >= max(1, size // 3),
        )
        for size in lengths
    ]
    return from_documents(
        documents, list(range(len(documents))), source=0, counts=(), sources=("random",)
    )


def run_of(
    args: argparse.Namespace,
    model: Path,
    strategy: StrategySpec,
    *,
    global_batch: int,
    micro_batch: int,
    max_length: int,
    packing: bool = False,
) -> Run:
    """Full fine-tuning at a constant learning rate."""
    born = args.dtype if isinstance(strategy, ZeroSpec) else "fp32"  # else fp32 under autocast
    return Run(
        name="bench",
        seed=args.seed,
        model=ModelSpec(path=str(model), init="random", dtype=born),
        methods=(FullSpec(),),
        data=DataSpec(train=(SourceSpec(path="random"),), max_length=max_length, packing=packing),
        optim=OPTIM,
        train=TrainSpec(
            steps=ENDLESS,
            global_batch=global_batch,
            micro_batch=micro_batch,
            precision=args.dtype,
        ),
        strategy=strategy,
    )


class Quiet:
    """Signals that nobody hears."""

    def stop_requested(self) -> bool:
        return False

    def progress(self, event: dict[str, Any]) -> None:
        pass


class RayftLoop:
    """A run of rayft in this process: its own assembly, loop, metrics lines and events.

    Args:
        stream: instead of the run's own over `table`.
    """

    def __init__(
        self,
        run: Run,
        table: TokenTable,
        device: torch.device,
        folder: Path,
        stream: BatchStream | None = None,
    ) -> None:
        self.parts = assemble(run, Corpus(table, None, ("default",)), device)
        job = AttemptJob(run.resolved(), run.digest(), attempt="0", data_dir="", data_hash="")
        storage = Storage.open(str(folder))
        self.session = RunSession(job, self.parts, storage, Quiet(), time.monotonic())
        parts = self.parts
        self.stepper = stepper_of(parts if stream is None else replace(parts, stream=stream))

    def steps(self, count: int, after: Callable[[StepResult], None] = lambda result: None) -> None:
        """`count` more steps; `after` is called once each is done and logged."""

        def log(step: int, result: StepResult, seconds: float) -> None:
            self.session.log(step, result, seconds)
            after(result)

        hooks = LoopHooks(
            stop=self.session.signals.stop_requested,
            log=log,
            evaluate=lambda step: False,
            save=lambda step, best: None,
        )
        progress = self.session.progress
        train(self.stepper, StepSchedule(progress.step + count, None, None), progress, hooks)


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device) -> int:
    """Bytes: largest GPU allocation, or the largest resident size. Not ru_maxrss: that begins with
    the parent's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))


def fresh(world: int, threads: int, work: Callable[..., Any], *args: Any) -> list[Any]:
    """work(rank, world, folder, *args) in `world` fresh processes; what each returned (JSON)."""
    os.environ["OMP_NUM_THREADS"] = str(threads)  # read when a process loads its maths libraries
    with tempfile.TemporaryDirectory(prefix="rayft-bench-") as folder:
        mp.spawn(_one, (world, threads, folder, work, args), nprocs=world)
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(world)]


def _one(rank: int, world: int, threads: int, folder: str, work: Callable, args: tuple) -> None:
    torch.set_num_threads(threads)
    warnings.filterwarnings("ignore", category=FutureWarning)
    result = work(rank, world, Path(folder), *args)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(result))


def spread(values: Sequence[float], digits: int = 1) -> str:
    """median (min .. max)"""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f} .. {high:.{digits}f})"


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Of what was measured side by side."""
    return [a / b for a, b in zip(ours, theirs, strict=True)]
