"""A toy step, toy data and real process groups for the tests of strategies.

One spawn of two ranks (gloo, one thread each) runs every case of a test session; the cases write
what they measured to a folder, the tests read it.
"""

from __future__ import annotations

import atexit
import copy
import functools
import os
import shutil
import tempfile
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from rayft.config.run import ModelSpec, OptimSpec, TrainSpec
from rayft.config.strategies import DdpSpec, ZeroSpec
from rayft.core.batch import IGNORE, Batch
from rayft.core.protocols import Engine, Group, Strategy
from rayft.core.reduce import sum_over_ranks
from rayft.core.shards import Shard
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

    def forward(
        self, tensors: Mapping[str, Tensor], packed: bool, scale: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        hidden = self.model.model(
            input_ids=tensors["input_ids"], position_ids=tensors["position_ids"], use_cache=False
        ).last_hidden_state[:, :-1]  # (B, T - 1, H)
        labels = tensors["labels"][:, 1:]
        if self.head == "module":
            logits = self.model.lm_head(hidden)
            return {"nll": _rows(logits, labels)}
        total = torch.zeros(len(labels))
        for start in range(0, hidden.shape[1], 3):  # the weight itself, in chunks of T
            part = slice(start, start + 3)
            logits = nn.functional.linear(hidden[:, part], self.model.lm_head.weight)
            total = total + _rows(logits, labels[:, part])
        return {"nll": total}


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
    head: str = "weight"  # weight | module
    tied: bool = False
    model: ModelSpec = field(default_factory=lambda: ModelSpec(path="toy"))
    train: TrainSpec = TRAIN
    optim: OptimSpec = OPTIM
    start: int = 0  # steps already done
    steps: int = STEPS
    load: str = ""  # case whose shards (of step SAVE) are loaded first
    save: int = SAVE
    poison: int = 0  # a step whose loss is made infinite
    birth: bool = False  # measure the creation of a larger model, and nothing else


def groups_of(model: nn.Module, method: str) -> list[Group]:
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
        return [Group("lora_A", a), Group("lora_B", b, lr_ratio=16.0)]
    named = dict(model.named_parameters())
    for param in named.values():
        param.requires_grad_(True)
    norms = tuple(p for name, p in named.items() if "norm" in name)
    rest = tuple(p for name, p in named.items() if "norm" not in name)
    return [Group("decay", rest), Group("no_decay", norms, decay=False)]


def load_base(model: ModelSpec, tied: bool) -> nn.Module:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype = torch.bfloat16 if model.dtype == "bf16" else torch.float32
    quant = None
    if model.quant == "nf4":
        quant = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    return AutoModelForCausalLM.from_pretrained(
        base_folder(tied), dtype=dtype, quantization_config=quant
    )


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
    engine: Engine, step: int, micro: int, lrs: Mapping[str, float], poison: bool
) -> tuple[float, float]:
    """(global mean loss, gradient norm)."""
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
    norm = engine.step(lrs)
    return float(sum_over_ranks(total, CPU)), norm


class Reader:
    """ShardReader over shards in memory."""

    def __init__(self, shards: list[Shard]) -> None:
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


def run_case(case: Case, folder: Path) -> dict[str, Any]:
    """What one rank measured: losses, norms, lrs, parameters at the end, the shard of `save`."""
    strategy = build(
        case.spec,
        case.optim,
        case.train,
        case.model,
        micro_batch=case.train.micro_batch,
        device=CPU,
    )
    if case.birth:
        return birth(strategy)
    with strategy.loading():
        model = load_base(case.model, case.tied)
    groups = groups_of(model, case.method)
    engine = strategy.prepare(Step(model, case.head), groups)
    if case.load:
        engine.load(read_shards(folder, case.load))
    factor = schedule(case.optim, STEPS)
    out: dict[str, Any] = {"losses": [], "norms": [], "lrs": [engine.lrs()]}
    for step in range(case.start + 1, case.start + case.steps + 1):
        lrs = group_lrs(groups, case.optim.lr * factor(step))
        before = copy.deepcopy(engine.shard()) if step == case.poison else None
        loss, norm = run_step(engine, step, case.train.micro_batch, lrs, poison=step == case.poison)
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


def birth(strategy: Strategy) -> dict[str, Any]:
    """Create 23 M random parameters: the whole, what this rank then holds, and how far resident
    memory rose meanwhile (bytes)."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=6,
        num_attention_heads=8,
    )
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status("VmRSS")
    with strategy.loading():
        model = AutoModelForCausalLM.from_config(config)
    peak = _status("VmHWM") - before
    params = list(model.parameters())
    sharded = [param for param in params if hasattr(param, "ds_tensor")]
    whole = sum(p.ds_numel for p in sharded) or sum(p.numel() for p in params)
    held = sum(p.numel() for p in params) + sum(p.ds_tensor.numel() for p in sharded)
    return {"whole": whole, "held": held, "peak": peak}


def _status(key: str) -> int:
    """Bytes of one line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def same(one: Shard, two: Shard) -> bool:
    """Every slice bit-equal, and the step counter."""
    return one.scalars == two.scalars and all(
        torch.equal(tensor, two.slices[name].tensors[kind])
        for name, piece in one.slices.items()
        for kind, tensor in piece.tensors.items()
    )


def read_shards(folder: Path, name: str) -> Reader:
    files = sorted(folder.glob(f"{name}.*.pt"))
    return Reader([torch.load(file, weights_only=False)["shard"] for file in files])


def worker(rank: int, world: int, cases: list[Case], folder: Path, store: str) -> None:
    """Run every case on this rank; a failed one leaves its traceback instead of numbers."""
    torch.set_num_threads(1)
    os.environ["DS_ACCELERATOR"] = "cpu"
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    for case in cases:
        try:
            result = run_case(case, folder)
        except Exception:  # the test that reads this case fails with the text
            result = {"error": traceback.format_exc()}
        torch.save(result, folder / f"{case.name}.{rank}.pt")
        if world > 1:
            dist.barrier()
    if dist.is_initialized():
        dist.destroy_process_group()


NF4 = ModelSpec(path="toy", quant="nf4")
BF16 = ModelSpec(path="toy", dtype="bf16")
SPECS: dict[str, DdpSpec | ZeroSpec] = {"ddp": DdpSpec()}
SPECS |= {f"zero{stage}": ZeroSpec(stage=stage) for stage in (0, 1, 2, 3)}


def micro(rows: int) -> TrainSpec:
    return TrainSpec(steps=STEPS, global_batch=ROWS, micro_batch=rows)


def solo_cases() -> list[Case]:
    """One process, no process group."""
    return [
        Case("solo", DdpSpec(), train=micro(6)),
        Case("solo-split", DdpSpec(), train=micro(1)),
        Case("solo-module", DdpSpec(), head="module", steps=4),
        Case("solo-tied", DdpSpec(), tied=True, steps=4),
    ]


def pair_cases() -> list[Case]:
    """Two ranks."""
    cases = [Case(f"full-{name}", spec) for name, spec in SPECS.items()]
    for name, spec in SPECS.items():
        again = Case(f"full-{name}-again", spec, start=SAVE, steps=5, load=f"full-{name}")
        lora = Case(f"lora-{name}", spec, method="lora", steps=6, save=3)
        bf16 = Case(f"bf16-{name}", spec, model=BF16, steps=5, save=3, poison=2)
        bf16_again = replace(
            bf16, name=f"bf16-{name}-again", start=3, steps=2, poison=0, load=bf16.name
        )
        poison = Case(f"poison-{name}", spec, steps=3, poison=2, train=micro(1))
        cases += [again, lora, bf16, bf16_again, poison]
    for name in ("ddp", "zero1", "zero2", "zero3"):
        cases.append(Case(f"split-{name}", SPECS[name], train=micro(1)))
    for stage in (1, 2, 3):
        spec = ZeroSpec(stage=stage, offload="cpu")
        part = Case(f"offload-zero{stage}", spec, steps=4, save=2, train=micro(1))
        again = replace(
            part, name=f"offload-zero{stage}-again", start=2, steps=2, load=f"offload-zero{stage}"
        )
        cases += [part, again]
    cases += [
        Case("zero3-module", SPECS["zero3"], head="module", steps=4),
        Case("zero3-tied", SPECS["zero3"], tied=True, steps=4),
        Case("zero3-tied-module", SPECS["zero3"], tied=True, head="module", steps=4),
        Case("zero3-to-ddp", SPECS["ddp"], start=SAVE, steps=5, load="full-zero3"),
        Case("zero2-to-zero3", SPECS["zero3"], start=SAVE, steps=5, load="full-zero2"),
        Case("solo-to-zero3", SPECS["zero3"], start=SAVE, steps=5, load="solo"),
        Case("solo-to-zero1", SPECS["zero1"], start=SAVE, steps=5, load="solo"),
    ]
    lora = replace(cases[0], method="lora", start=3, steps=3)
    cases += [
        replace(lora, name="lora-zero3-again", spec=SPECS["zero3"], load="lora-zero3"),
        replace(lora, name="lora-zero3-to-zero2", spec=SPECS["zero2"], load="lora-zero3"),
    ]
    cases += [
        Case("birth-zero3", SPECS["zero3"], birth=True),
        Case("birth-ddp", SPECS["ddp"], birth=True),
    ]
    for name in ("ddp", "zero2", "zero3"):
        quantised = Case(
            f"nf4-{name}", SPECS[name], method="lora", model=NF4, steps=6, save=3, head="module"
        )
        again = replace(quantised, name=f"nf4-{name}-again", start=3, steps=3, load=f"nf4-{name}")
        cases += [quantised, again]
    return cases


def single_cases() -> list[Case]:
    """One rank of its own: zero makes the process group itself."""
    return [
        Case("single-zero2", SPECS["zero2"], train=micro(4)),
        Case("single-zero3", SPECS["zero3"], steps=5),
        Case("zero3-to-single-zero2", SPECS["zero2"], start=SAVE, steps=5, load="full-zero3"),
        Case("zero2-to-single-zero3", SPECS["zero3"], start=SAVE, steps=5, load="full-zero2"),
        Case("zero3-to-single-ddp", SPECS["ddp"], start=SAVE, steps=5, load="full-zero3"),
    ]


@functools.cache
def laboratory() -> Path:
    """Run everything once per test session; the folder with the results."""
    os.environ["RAYFT_TOY"], os.environ["RAYFT_TOY_TIED"] = base(False), base(True)
    # glibc gives freed memory back at once, so that resident memory tells what lives (see birth).
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "100000"
    folder = Path(tempfile.mkdtemp(prefix="rayft-lab-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for world, cases in ((0, solo_cases()), (2, pair_cases()), (1, single_cases())):
        store = folder / f"store-{world}"
        mp.spawn(worker, (world, cases, folder, str(store)), nprocs=max(1, world), join=True)
    return folder


def results(name: str, world: int = 2) -> list[dict[str, Any]]:
    """What each rank of case `name` measured."""
    folder = laboratory()
    out = [torch.load(folder / f"{name}.{r}.pt", weights_only=False) for r in range(world)]
    for result in out:
        assert "error" not in result, result["error"]
    return out


def start_params(tied: bool = False) -> dict[str, Tensor]:
    """Parameters of the toy before the first step, by name in the step module."""
    laboratory()
    return dict(Step(load_base(ModelSpec(path="toy"), tied), "module").named_parameters())


def distance(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> float:
    """Largest absolute difference of any element."""
    assert one.keys() == two.keys()
    return max(float((one[name].detach() - two[name].detach()).abs().max()) for name in one)
