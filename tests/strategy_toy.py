"""A toy step, toy data, and one run of it on this rank, for the tests of strategies."""

from __future__ import annotations

import atexit
import copy
import functools
import math
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor, nn

from rayft.compose.gradient_check import GradientCheck
from rayft.config.run import ModelSpec, OptimSpec, TrainSpec
from rayft.config.strategies import DdpSpec, ZeroSpec
from rayft.core.batch import IGNORE, Batch, Inputs
from rayft.core.errors import DeadGradientError
from rayft.core.protocols import Engine, ParamGroup, Strategy
from rayft.core.reduce import sum_over_ranks
from rayft.core.shards import StateShard
from rayft.models.load import keep_nf4_as_loaded
from rayft.strategies import build
from rayft.strategies.optim import group_lrs, schedule

VOCAB, ROWS, STEPS, SAVE = 61, 6, 20, 10
CPU = torch.device("cpu")
OPTIM = OptimSpec(lr=3e-3, weight_decay=0.1, clip=0.5, warmup=4, schedule="cosine")
TRAIN = TrainSpec(steps=STEPS, global_batch=ROWS, micro_batch=2)


class Step(nn.Module):
    """Summed token nll per row; `head` says how the output head's weight is reached."""

    def __init__(self, model: nn.Module, head: str) -> None:
        super().__init__()
        self.model, self.head = model, head

    def forward(self, inputs: Inputs, scale: Mapping[str, Tensor]) -> dict[str, Tensor]:
        tensors, _ = inputs
        hidden = self.model.model(
            input_ids=tensors["input_ids"], position_ids=tensors["position_ids"], use_cache=False
        ).last_hidden_state[:, :-1]  # (B, T - 1, H)
        labels = tensors["labels"][:, 1:]
        if self.head == "fused":
            return {"nll": Fused.apply(hidden, self.model.lm_head.weight, labels, scale["nll"])}
        if self.head == "module":
            logits = self.model.lm_head(hidden)
            return {"nll": _rows(logits, labels)}
        total = torch.zeros(len(labels))
        for start in range(0, hidden.shape[1], 3):  # the weight itself, in chunks of T
            part = slice(start, start + 3)
            logits = nn.functional.linear(hidden[:, part], self.model.lm_head.weight)
            total = total + _rows(logits, labels[:, part])
        return {"nll": total}


class Fused(torch.autograd.Function):
    """Row nll whose gradients are formed in the forward pass, as a chunked loss does it."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, scale):  # (B, T, H), (V, H), (B, T), (B,)
        with torch.enable_grad():
            inputs = [hidden.detach().requires_grad_(), weight.detach().requires_grad_()]
            rows = _rows(nn.functional.linear(*inputs), labels)
            grads = torch.autograd.grad((rows * scale).sum(), inputs)
        ctx.save_for_backward(*grads, scale)
        return rows.detach()

    @staticmethod
    def backward(ctx, grad_rows):
        """What comes in is scale times a constant: the engine's own factor (ranks)."""
        grad_hidden, grad_weight, scale = ctx.saved_tensors
        factor = grad_rows.sum() / scale.sum()
        return factor * grad_hidden, factor * grad_weight, None, None


def _rows(logits: Tensor, labels: Tensor) -> Tensor:
    flat = nn.functional.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="none"
    )
    return flat.view(labels.shape).sum(dim=1)


@functools.cache
def base(tied: bool) -> str:
    """Folder of a small random Llama. Odd sizes, so that no partition comes out even."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=25,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
        tie_word_embeddings=tied,
        max_position_embeddings=32,
    )
    folder = tempfile.mkdtemp(prefix="rayft-base-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Case:
    """One run: which strategy on which step, from which shards, and what to do on the way."""

    name: str
    spec: DdpSpec | ZeroSpec
    method: str = "full"  # full | lora
    head: str = "weight"  # weight | module | fused
    checkpointing: bool = False  # recompute activations in the backward pass
    tied: bool = False
    model: ModelSpec = field(default_factory=lambda: ModelSpec(path="toy"))
    train: TrainSpec = TRAIN
    optim: OptimSpec = OPTIM
    start: int = 0  # steps already done
    steps: int = STEPS
    load: str = ""  # case whose shards (of step SAVE) are loaded first
    save: int = SAVE
    cpu_reading: int = 1  # whether bitsandbytes takes this CPU for one with AVX512-BF16
    broken: str = ""  # "graph": a layer detaches what it computes; or a group without gradients
    poison: int = 0  # a step whose loss is made infinite
    birth: bool = False  # measure the creation of a larger model, and nothing else


def groups_of(model: nn.Module, method: str) -> list[ParamGroup]:
    """full: decay and no_decay. lora: LoRA+ (lr of B is 16 times that of A), nothing undecayed."""
    for param in model.parameters():
        param.requires_grad_(False)
    if method == "lora":
        from peft import LoraConfig, inject_adapter_in_model

        torch.manual_seed(1)
        inject_adapter_in_model(LoraConfig(r=3, target_modules=["q_proj", "down_proj"]), model)
        named = dict(model.named_parameters())
        a = tuple(p for name, p in named.items() if "lora_A" in name)
        b = tuple(p for name, p in named.items() if "lora_B" in name)
        return [ParamGroup("lora_A", a), ParamGroup("lora_B", b, lr_ratio=16.0)]
    named = dict(model.named_parameters())
    for param in named.values():
        param.requires_grad_(True)
    norms = tuple(p for name, p in named.items() if "norm" in name)
    rest = tuple(p for name, p in named.items() if "norm" not in name)
    return [ParamGroup("decay", rest), ParamGroup("no_decay", norms, decay=False)]


def load_base(model: ModelSpec, tied: bool) -> nn.Module:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype = torch.bfloat16 if model.dtype == "bf16" else torch.float32
    quant = None
    if model.quant == "nf4":
        quant = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    made = AutoModelForCausalLM.from_pretrained(
        base_folder(tied), dtype=dtype, quantization_config=quant
    )
    keep_nf4_as_loaded(made)
    return made


def base_folder(tied: bool) -> str:
    return os.environ["RAYFT_TOY_TIED" if tied else "RAYFT_TOY"]


def batches(step: int, rank: int, world: int, micro: int) -> tuple[list[Batch], int]:
    """This rank's micro-batches of `step` (ragged rows) and the global count of targets."""
    generator = torch.Generator().manual_seed(step)
    lengths = torch.randint(4, 13, (ROWS,), generator=generator).tolist()
    rows = [torch.randint(0, VOCAB, (n,), generator=generator) for n in lengths]
    masked = [max(1, n // 3) for n in lengths]  # the prompt: not trained
    count = sum(n - m for n, m in zip(lengths, masked, strict=True))
    mine = list(zip(rows, masked, strict=True))[rank::world]
    most = -(-ROWS // world)
    window = []
    for first in range(0, most, micro):
        part = mine[first : first + micro] or [(rows[0], lengths[0])]  # trains nothing
        window.append(_batch(part))
    return window, count


def _batch(rows: list[tuple[Tensor, int]]) -> Batch:
    length = max(len(row) for row, _ in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    labels = torch.full_like(ids, IGNORE)
    for index, (row, masked) in enumerate(rows):
        ids[index, : len(row)] = row
        labels[index, masked : len(row)] = row[masked:]
    zeros = torch.zeros(len(rows), dtype=torch.long)
    places = torch.arange(length).expand(len(rows), -1).contiguous()
    lengths = torch.tensor([len(row) for row, _ in rows])
    return Batch(ids, labels, places, lengths, task=zeros, trial=zeros, packed=False)


def run_step(
    engine: Engine,
    check: GradientCheck,
    step: int,
    micro: int,
    lrs: Mapping[str, float],
    poison: bool,
) -> tuple[float, float]:
    """(global mean loss, gradient norm); the order of things is compose.loop.StepRunner's."""
    window, count = batches(step, engine.rank, engine.world, micro)
    total = torch.zeros(1, dtype=torch.float64)
    for index, batch in enumerate(window):
        scale = {"nll": torch.full((batch.rows,), 1.0 / count)}
        rows = engine.forward(batch, scale)
        loss = (rows["nll"] * scale["nll"]).sum()
        total += loss.detach().double()
        if poison and engine.rank == engine.world - 1:
            loss = loss * float("inf")
        engine.backward(loss, last=index == len(window) - 1)
    check.after_backward(step)
    norm = float(engine.step(lrs))
    if math.isfinite(norm):
        check.after_update(step, engine.lrs(), count)
    return float(sum_over_ranks(total, CPU)), norm


class Reader:
    """ShardReader over shards in memory."""

    def __init__(self, shards: list[StateShard]) -> None:
        self._shards, self.world, self.scalars = shards, len(shards), shards[0].scalars

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: piece.shape for shard in self._shards for name, piece in shard.slices.items()}

    def read(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        out = torch.full((stop - start,), float("nan"))
        for shard in self._shards:
            if name not in shard.slices:
                continue
            piece = shard.slices[name]
            tensor = piece.tensors[kind]
            low, high = max(start, piece.start), min(stop, piece.start + tensor.numel())
            if low < high:
                out[low - start : high - start] = tensor[low - piece.start : high - piece.start]
        assert not out.isnan().any(), f"{name} {kind}: elements nobody holds"
        return out

    def whole(self, rank: int) -> dict[str, Tensor]:
        return dict(self._shards[rank].whole) if rank < self.world else {}


def strategy_of(case: Case) -> Strategy:
    """Built for this rank."""
    train = case.train
    return build(
        case.spec, case.optim, train, case.model, micro_batch=train.micro_batch, device=CPU
    )


def run_case(case: Case, folder: Path) -> dict[str, Any]:
    """What one rank measured: losses, norms, lrs, parameters at the end, the shard of `save`."""
    strategy = strategy_of(case)
    bnb.nn.modules.has_avx512bf16 = lambda: case.cpu_reading  # this process runs nothing but cases
    with strategy.loading():
        model = load_base(case.model, case.tied)
    if case.checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    groups = groups_of(model, case.method)
    broken(model, groups, case.broken)
    module = Step(model, case.head)
    engine = strategy.prepare(module, groups)
    check = GradientCheck(module, groups, engine)
    if case.load:
        engine.load(read_shards(folder, case.load))
    factor = schedule(case.optim, STEPS)
    out: dict[str, Any] = {"losses": [], "norms": [], "lrs": [engine.lrs()]}
    for step in range(case.start + 1, case.start + case.steps + 1):
        lrs = group_lrs(groups, case.optim.lr * factor(step))
        before = copy.deepcopy(engine.shard()) if step == case.poison else None
        try:
            loss, norm = run_step(
                engine, check, step, case.train.micro_batch, lrs, poison=step == case.poison
            )
        except DeadGradientError as error:
            return {"dead": str(error), "step": step}
        if before is not None:
            out["kept"] = same(before, engine.shard())
        out["losses"].append(loss)
        out["norms"].append(norm)
        out["lrs"].append(engine.lrs())
        if step == case.save:
            out["shard"] = copy.deepcopy(engine.shard())
    with engine.evaluating():
        window, _ = batches(999, 0, 1, ROWS)
        rows = engine.forward(window[0], {"nll": torch.ones(ROWS)})["nll"]
        out["eval"] = [float(v) for v in rows]
    out["params"] = dict(engine.full())
    return out


def broken(model: nn.Module, groups: list[ParamGroup], how: str) -> None:
    """See Case.broken."""
    if how == "graph":
        layer = model.model.layers[0].self_attn
        layer.register_forward_hook(lambda module, inputs, out: (out[0].detach(), *out[1:]))
    for group in groups:
        for param in group.params if group.name == how else ():
            param.register_hook(torch.zeros_like)


def same(one: StateShard, two: StateShard) -> bool:
    """Every slice bit-equal, and the step counter."""
    return one.scalars == two.scalars and all(
        torch.equal(tensor, two.slices[name].tensors[kind])
        for name, piece in one.slices.items()
        for kind, tensor in piece.tensors.items()
    )


def read_shards(folder: Path, name: str) -> Reader:
    files = sorted(folder.glob(f"{name}.*.pt"))
    return Reader([torch.load(file, weights_only=False)["shard"] for file in files])
