"""Chunked loss against `F.cross_entropy(model(...).logits)` in a whole training step.

    python experiments/bench/loss.py [--threads 2] [--device cpu] [--train full|frozen_head] ...

Interleaved: every repetition times both ways, in alternating order; medians and the median of the
paired ratios. Memory: on a GPU `max_memory_allocated` above the model; anywhere the largest logits
tensor and the largest sum of live logits-shaped tensors (V columns) that the head and loss hold.
"""

from __future__ import annotations

import argparse
import statistics
import time
import weakref
from collections.abc import Callable, Sequence

import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from rayft.core.batch import IGNORE, Batch
from rayft.models import chunked
from rayft.models.policy import CausalPolicy


class LogitsBytes(TorchDispatchMode):
    """Bytes of live storages whose tensors have at least one row of V elements, weights apart."""

    def __init__(self, vocab: int, hidden: int) -> None:
        super().__init__()
        self.vocab, self.hidden = vocab, hidden
        self.live: dict[int, int] = {}
        self.peak = self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if torch.is_tensor(out) and out.dim() >= 2 and self.vocab in out.shape[-2:]:
            self._seen(out)
        return out

    def _seen(self, out: torch.Tensor) -> None:
        storage = out.untyped_storage()
        key = storage.data_ptr()
        if self.hidden in out.shape or key in self.live:  # the head's weight or its gradient
            return
        self.live[key] = storage.nbytes()
        weakref.finalize(storage, self.live.pop, key, None)
        self.largest = max(self.largest, storage.nbytes())
        self.peak = max(self.peak, sum(self.live.values()))


def plain(model: LlamaForCausalLM, batch: Batch, scale: torch.Tensor) -> torch.Tensor:
    """What most training loops do."""
    logits = model(input_ids=batch.input_ids, use_cache=False).logits[:, :-1]
    flat = logits.reshape(-1, logits.shape[-1]).float()
    return functional.cross_entropy(flat, batch.targets().reshape(-1), reduction="sum") * scale[0]


Measured = tuple[dict[str, list[float]], dict[str, tuple[int, int, int]]]


def measure(args: argparse.Namespace) -> Measured:
    """{way: seconds per step, one per repetition}, and what `memory` gives, by way."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    config = LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=4 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=max(1, args.hidden // 64),
        tie_word_embeddings=args.tied,
    )
    model = LlamaForCausalLM(config).to(device, dtype).train()
    if args.train == "frozen_head":
        model.lm_head.weight.requires_grad_(False)
    chunked.MAX_CHUNK = args.chunk or chunked.MAX_CHUNK
    policy = CausalPolicy(model)
    batch = random_batch(args, device)
    scale = torch.full((args.rows,), 1.0 / float(batch.tokens().sum()), device=device)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True
    )
    ways: dict[str, Callable[[], torch.Tensor]] = {
        "plain": lambda: plain(model, batch, scale),
        "chunked": lambda: (policy.row_nll(batch, scale) * scale).sum(),
    }

    def step(way: str) -> float:
        synchronise(device)
        began = time.perf_counter()
        ways[way]().backward()
        if not args.no_optimizer:
            optimizer.step()
        optimizer.zero_grad()
        synchronise(device)
        return time.perf_counter() - began

    times = {way: [] for way in ways}
    for repetition in range(args.repetitions + 2):
        for way in sorted(ways, reverse=repetition % 2 == 0):
            seconds = step(way)
            if repetition >= 2:
                times[way].append(seconds)
    return times, {way: memory(ways[way], args, device) for way in ways}


def main() -> None:
    args = arguments()
    report(args, *measure(args))


def memory(loss: Callable[[], torch.Tensor], args, device: torch.device) -> tuple[int, int, int]:
    """(largest logits tensor, peak of live ones, device peak above the start), bytes."""
    with LogitsBytes(args.vocab, args.hidden) as seen:
        loss().backward()
    if device.type != "cuda":
        return seen.largest, seen.peak, 0
    synchronise(device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss().backward()
    return seen.largest, seen.peak, torch.cuda.max_memory_allocated() - before


def report(args, times: dict[str, list[float]], memories: dict[str, tuple[int, int, int]]) -> None:
    print(
        f"{args.device} {args.dtype} V={args.vocab} H={args.hidden} L={args.layers} "
        f"rows={args.rows} T={args.length} train={args.train} tied={args.tied} "
        f"threads={args.threads} repetitions={args.repetitions} chunk<={chunked.MAX_CHUNK}"
    )
    print(
        f"{'way':8} {'ms/step':>9} {'largest logits':>15} {'live logits':>12} {'device peak':>12}"
    )
    for way, seconds in times.items():
        largest, peak, total = (f"{value / 2**20:.1f} MiB" for value in memories[way])
        ms = statistics.median(seconds) * 1e3
        print(f"{way:8} {ms:9.1f} {largest:>15} {peak:>12} {total:>12}")
    ratios = [a / b for a, b in zip(times["chunked"], times["plain"], strict=True)]
    pairs = zip(memories["chunked"], memories["plain"], strict=True)
    shares = [a / b if b else 0.0 for a, b in pairs]
    print(
        f"chunked / plain: time {statistics.median(ratios):.3f}, largest {shares[0]:.3f}, "
        f"live {shares[1]:.3f}, device peak {shares[2]:.3f}"
    )


def random_batch(args, device: torch.device) -> Batch:
    ids = torch.randint(0, args.vocab, (args.rows, args.length), device=device)
    labels = ids.clone()
    labels[:, : int(args.length * (1 - args.trained))] = IGNORE
    labels[:, 0] = IGNORE
    zeros = torch.zeros(args.rows, dtype=torch.int64, device=device)
    return Batch(
        input_ids=ids,
        labels=labels,
        position_ids=torch.arange(args.length, device=device).repeat(args.rows, 1),
        lengths=zeros + args.length,
        task=zeros,
        trial=zeros,
        packed=False,
    )


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Of `argv`, by default of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (
        ("threads", 1),
        ("vocab", 32000),
        ("hidden", 256),
        ("layers", 4),
        ("rows", 4),
        ("length", 256),
        ("repetitions", 10),
        ("chunk", 0),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--train", default="full", choices=["full", "frozen_head"])
    parser.add_argument("--trained", type=float, default=1.0, help="share of trained positions")
    parser.add_argument("--tied", action="store_true")
    parser.add_argument(
        "--no-optimizer", action="store_true", help="time forward and backward only"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
