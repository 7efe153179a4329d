"""Real process groups for the tests of strategies.

One spawn of two ranks (gloo, one thread each), one of a single rank and one without a process group
run every case of a test session; the cases write what they measured to a folder, the tests read it.
"""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import tempfile
import traceback
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from rayft.config.run import ModelSpec, TrainSpec
from rayft.config.strategies import DdpSpec, ZeroSpec
from tests.strategy_toy import ROWS, SAVE, STEPS, Case, Step, base, load_base, run_case, strategy_of


def birth(case: Case) -> dict[str, Any]:
    """Create 23 M random parameters: the whole, what this rank then holds, and how far resident
    memory rose meanwhile (bytes)."""
    strategy = strategy_of(case)  # before transformers, which may import DeepSpeed
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


def worker(rank: int, world: int, cases: list[Case], folder: Path, store: str) -> None:
    """Run every case on this rank; a failed one leaves its traceback instead of numbers."""
    torch.set_num_threads(1)
    for stream, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / f"{name}.{world}.{rank}", os.O_WRONLY | os.O_CREAT), stream)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    for case in cases:
        try:
            result = birth(case) if case.birth else run_case(case, folder)
        except Exception:  # the test that reads this case fails with the text
            result = {"error": traceback.format_exc()}
        torch.save(result, folder / f"{case.name}.{rank}.pt")
        if world > 1:
            dist.barrier()
    if dist.is_initialized():
        dist.destroy_process_group()


NF4 = ModelSpec(path="toy", quant="nf4")
NF4_BF16 = ModelSpec(path="toy", quant="nf4", dtype="bf16")
BF16 = ModelSpec(path="toy", dtype="bf16")
SPECS: dict[str, DdpSpec | ZeroSpec] = {"ddp": DdpSpec()}
SPECS |= {f"zero{stage}": ZeroSpec(stage=stage) for stage in (0, 1, 2, 3)}


def micro(rows: int) -> TrainSpec:
    return TrainSpec(steps=STEPS, global_batch=ROWS, micro_batch=rows)


def solo_cases() -> list[Case]:
    """One process, no process group."""
    return [
        Case("dead-solo", DdpSpec(), broken="graph", steps=3),
        Case("still-solo", DdpSpec(), broken="no_decay", steps=4),
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
        Case("zero3-fused", SPECS["zero3"], head="fused", steps=4),
        Case("zero2-fused", SPECS["zero2"], head="fused", steps=4),
        Case("ddp-fused", SPECS["ddp"], head="fused", steps=4),
        Case("zero3-tied-fused", SPECS["zero3"], tied=True, head="fused", steps=4),
        Case("zero3-recompute", SPECS["zero3"], head="fused", checkpointing=True, steps=4),
        Case("ddp-recompute", SPECS["ddp"], checkpointing=True, steps=4),
        Case("zero3-lora-recompute", SPECS["zero3"], method="lora", checkpointing=True, steps=4),
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
    for name, spec in SPECS.items():
        cases.append(Case(f"dead-{name}", spec, broken="graph", steps=3))
        cases.append(Case(f"still-{name}", spec, broken="no_decay", steps=4))
    cases.append(Case("dead-offload", ZeroSpec(stage=3, offload="cpu"), broken="graph", steps=3))
    cases.append(
        Case("still-offload", ZeroSpec(stage=2, offload="cpu"), broken="no_decay", steps=4)
    )
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
        cases.append(replace(quantised, name=f"nf4-bf16-{name}", model=NF4_BF16, steps=3))
        cases.append(replace(quantised, name=f"nf4-{name}-other-cpu", cpu_reading=0))
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


def printed(stream: str, world: int = 2) -> str:
    """What all ranks wrote to "stdout" or "stderr"."""
    folder = laboratory()
    return "".join((folder / f"{stream}.{world}.{rank}").read_text() for rank in range(world))


def start_params(tied: bool = False) -> dict[str, Tensor]:
    """Parameters of the toy before the first step, by name in the step module."""
    laboratory()
    return dict(Step(load_base(ModelSpec(path="toy"), tied), "module").named_parameters())


def distance(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> float:
    """Largest absolute difference of any element."""
    assert one.keys() == two.keys()
    return max(float((one[name].detach() - two[name].detach()).abs().max()) for name in one)
