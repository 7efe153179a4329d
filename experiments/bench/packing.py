"""Packed LoRA trials against one adapter, and against the same trials one after another.

    python experiments/bench/packing.py [engine] [--tokens 64 256 512 1024] [--trials 8] [--quick]
    python experiments/bench/packing.py planner
    python experiments/bench/packing.py slots --help

engine, without Ray, one process, --threads threads; ways take turns, medians of --rounds rounds:
  efficiency   tokens/s of N packed trials over tokens/s of one adapter with the same total tokens
               (the faster of rayft's solo engine and a pack of one); equal ranks, then 4 to 64
               mixed. Targets: at least 0.95, at least 0.85.
  sequential   N packed trials against N solo runs one after another. Targets: at least 1.3x at 64
               tokens per trial-step, never below 0.97x at 512 and more.
Rows are --length tokens long, every token trained. --shape names a random model: tiny (hidden 256,
4 layers, vocabulary 2,048), d64, d512, 1b and 8b (the shapes of Llama 3.2 1B and 3.1 8B; written to
a temporary folder first). --quant nf4 quantises it. --memory: peak of the pack at the end.
planner: the simulated placement of 10,000 trials on 1,000 and 300 GPUs (rayft/trials/simulate.py).
slots: time and memory of a pack by its number of slots, and with trials that take turns
(packing_slots.py).
"""

from __future__ import annotations

import argparse
import importlib
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import (
    FIRST_ID,
    TINY,
    RayftLoop,
    _commit,
    _processor,
    peak_memory,
    ratios,
    spread,
    synchronise,
)
from packing_planner import planner
from transformers import LlamaConfig, LlamaForCausalLM

from rayft.compose.job import AttemptJob
from rayft.config.run import Run
from rayft.data.cache import save
from rayft.data.table import TokenTable, from_documents
from rayft.storage.folder import Storage
from rayft.trials.pack import Pack

SHAPES = {  # hidden, layers, heads, key-value heads, intermediate, vocabulary
    "d64": (64, 2, 4, 2, 176, 2048),
    "tiny": (256, 4, 4, 2, 704, 2048),
    "d512": (512, 8, 8, 4, 1408, 8192),
    "1b": (2048, 16, 32, 8, 8192, 128256),
    "8b": (4096, 32, 32, 8, 14336, 128256),
}
MIXED = (4, 4, 8, 8, 16, 16, 32, 64)
WAYS = ("packed", "mixed", "one", "pack of one", "one mixed", "solo")
ENDLESS = 1_000_000


def model(args: argparse.Namespace, folder: Path) -> Path:
    """A random Llama of the shape, saved in --dtype, with builtin:tiny's tokenizer."""
    hidden, layers, heads, kv, inner, vocab = SHAPES[args.shape]
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        max_position_embeddings=4096,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    torch.manual_seed(0)
    with torch.device(args.device):
        made = LlamaForCausalLM(config).to(dtype)
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    made.save_pretrained(folder)
    return folder


def table(args: argparse.Namespace) -> TokenTable:
    """Documents of --length random tokens, all trained."""
    rng = np.random.default_rng(0)
    vocab = SHAPES[args.shape][-1]
    documents = [
        (rng.integers(FIRST_ID, vocab, args.length, dtype=np.int32), np.arange(args.length) >= 0)
        for _ in range(256)
    ]
    return from_documents(documents, list(range(256)), source=0, counts=(), sources=("random",))


def run_of(
    args: argparse.Namespace, folder: Path, storage: Path, name: str, rank: int, rows: int
) -> Run:
    """A LoRA run of `rows` rows a step, in one forward pass, on the model in `folder`."""
    return Run.model_validate(
        {
            "name": name,
            "model": {"path": str(folder), "dtype": args.dtype, "quant": args.quant},
            "methods": [{"kind": "lora", "rank": rank, "alpha": 2 * rank, "lr_ratio": 4}],
            "objective": {"kind": "lm"},
            "data": {"train": [{"path": "random"}], "max_length": args.length},
            "optim": {"lr": 1e-4, "schedule": "constant", "warmup": 0},
            "train": {"steps": ENDLESS, "global_batch": rows, "micro_batch": rows},
            "storage": str(storage),
        }
    )


class Lab:
    """Packs and solo loops over one model and one table.

    Args:
        folder: what the runs leave goes here.
        saved: the model, where one of the shape is there already; default: it is made in `folder`.
    """

    def __init__(self, args: argparse.Namespace, folder: Path, saved: Path | None = None) -> None:
        self.args, self.device = args, torch.device("cuda:0" if args.device == "cuda" else "cpu")
        self.storage = folder / "runs"
        self.folder = saved or model(args, folder / "model")
        self.table = table(args)
        self.cache = Storage.open(str(folder / "cache"))
        save(
            self.table,
            {"hash": self.table.digest, "fingerprint": {}},
            self.cache.child(self.table.digest),
        )
        self.made = 0

    def run(self, rank: int, rows: int) -> Run:
        """The next one."""
        self.made += 1
        return run_of(self.args, self.folder, self.storage, f"r{self.made}", rank, rows)

    def pack(self, ranks: tuple[int, ...], rows: int) -> Callable[[], Any]:
        """One packed step of a trial per rank."""
        runs = [self.run(rank, rows) for rank in ranks]
        where = (self.cache.uri, self.table.digest)
        pack = Pack(runs[0], *where, self.device, slots=len(runs))
        for run in runs:
            pack.admit(AttemptJob(run.resolved(), run.digest(), "1x0", *where))
        self.last = pack
        return pack.step

    def solo(self, rank: int, rows: int) -> Callable[[], Any]:
        """One step of rayft's solo engine."""
        run = self.run(rank, rows)
        home = Path(run.storage) / run.name
        loop = RayftLoop(run, self.table, self.device, home)
        return lambda: loop.steps(1)


def timed(args: argparse.Namespace, ways: dict[str, tuple[Callable[[], Any], int]]) -> dict:
    """{way: seconds per call, one per round}; ways take turns, `int` calls per turn."""
    device = torch.device(args.device)
    found: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(args.rounds + 1):  # the first round warms up
        for name, (call, times) in ways.items():
            synchronise(device)
            began = time.perf_counter()
            for _ in range(times):
                call()
            synchronise(device)
            if number:
                found[name].append((time.perf_counter() - began) / times)
    return found


def mixed_ranks(count: int) -> tuple[int, ...]:
    """Of `count` trials."""
    return tuple(MIXED[index * len(MIXED) // count] for index in range(count))


def compare(
    args: argparse.Namespace, lab: Lab, rows: int, only: Sequence[str] = WAYS
) -> dict[str, list[float]]:
    """{way: seconds per packed step, or per step of one run, one per round}, of `only`."""
    count, times, mixed = args.trials, args.steps, mixed_ranks(args.trials)
    makers: dict[str, tuple[Callable[[], Callable[[], Any]], int]] = {
        "packed": (lambda: lab.pack((args.rank,) * count, rows), times),
        "mixed": (lambda: lab.pack(mixed, rows), times),
        "one": (lambda: lab.solo(args.rank, rows * count), times),
        "pack of one": (lambda: lab.pack((args.rank,), rows * count), times),
        "one mixed": (lambda: lab.solo(round(statistics.mean(mixed)), rows * count), times),
        "solo": (lambda: lab.solo(args.rank, rows), times * count),
    }
    return timed(args, {way: (makers[way][0](), makers[way][1]) for way in only})


def shares(count: int, found: dict[str, list[float]]) -> dict[str, list[float]]:
    """The comparisons that the ways in `found` allow, one number per round: "equal" and "mixed"
    (efficiency) and "sequential" (times as fast as one after another)."""
    told = {}
    if {"one", "pack of one"} <= found.keys():
        # the same total tokens, so times compare as rates do
        best = [min(pair) for pair in zip(found["one"], found["pack of one"], strict=True)]
        told["equal"] = ratios(best, found["packed"])
    if {"one mixed", "mixed"} <= found.keys():
        told["mixed"] = ratios(found["one mixed"], found["mixed"])
    if "solo" in found:
        pairs = zip(found["solo"], found["packed"], strict=True)
        told["sequential"] = [count * one / many for one, many in pairs]
    return told


def engine(args: argparse.Namespace) -> None:
    """Both comparisons at every --tokens."""
    torch.set_num_threads(args.threads)
    count = args.trials
    print("$ python", " ".join(sys.argv))
    name = torch.cuda.get_device_name() if args.device == "cuda" else _processor()
    print(f"commit {_commit()}; {name}; {args.threads} threads; torch {torch.__version__}")
    print(f"model {args.shape} {args.dtype} quant {args.quant}; {count} trials, rank {args.rank},")
    print(f"mixed ranks {mixed_ranks(count)}; rows of {args.length} tokens; ", end="")
    print(f"{args.rounds} rounds\n", flush=True)
    print("tokens per    packed step   efficiency        efficiency         packed against one")
    print("trial-step    ms            equal ranks       mixed ranks        after another")
    for tokens in args.tokens:
        rows = max(1, tokens // args.length)
        with tempfile.TemporaryDirectory(prefix="rayft-bench-") as folder:
            lab = Lab(args, Path(folder))
            found = compare(args, lab, rows)
            told = shares(count, found)
            print(
                f"{rows * args.length:<13} {1e3 * statistics.median(found['packed']):<13.1f} "
                f"{spread(told['equal'], 2):<17} {spread(told['mixed'], 2):<18} "
                f"{spread(told['sequential'], 2)}x",
                flush=True,
            )
            if args.memory:
                print(f"  peak memory {peak_memory(lab.device) / 2**30:.2f} GiB")


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Of `argv`, by default of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", nargs="?", default="engine", choices=["engine", "planner"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 256, 512, 1024])
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--length", type=int, default=64, help="tokens of a row")
    parser.add_argument("--shape", default="tiny", choices=list(SHAPES))
    parser.add_argument("--quant", default="none", choices=["none", "nf4"])
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if cuda else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=5, help="packed steps per turn")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run at all")
    args = parser.parse_args(argv)
    if args.quick:
        args.shape, args.tokens, args.rounds, args.steps = "d64", [64], 2, 2
    return args


def main() -> None:
    if sys.argv[1:2] == ["slots"]:
        importlib.import_module("packing_slots").main(sys.argv[2:])  # which imports this module
        return
    args = arguments()
    planner() if args.what == "planner" else engine(args)


if __name__ == "__main__":
    main()
