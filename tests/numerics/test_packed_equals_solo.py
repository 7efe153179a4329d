"""Packed = solo: every trial of a mixed pack has the losses of the run it would have been alone.

The solo run is compose.execute.execute, as `rayft train` calls it."""

from __future__ import annotations

import pytest
import torch

from rayft.compose.assemble import assemble
from rayft.compose.data import open_corpus
from rayft.compose.execute import stepper_of
from rayft.models.load import load_model
from rayft.strategies.optim import param_groups
from rayft.trials.step import step_trials
from tests.packs import CPU, Lab, finish, losses

LORA, DORA, DROP = "methods.0.rank", "methods.0.dora=true", "methods.0.dropout"
MIX: dict[str, tuple[str, ...]] = {
    "plain": (),
    "rank1": (f"{LORA}=1", "seed=1", "optim.clip=null"),
    "rank64": (f"{LORA}=64", "methods.0.alpha=16.0", "seed=2", "optim.clip=0.05"),
    "lora-plus": ("methods.0.lr_ratio=16", "seed=3", "optim.schedule=constant"),
    "rslora": (f"{LORA}=16", "methods.0.rslora=true", "optim.schedule=linear", "optim.lr=5e-3"),
    "decay": (f"{LORA}=7", "optim.weight_decay=0.1", "optim.betas=[0.8, 0.95]", "optim.eps=1e-6"),
    "accumulates": ("train.global_batch=7", "train.micro_batch=2", "seed=5"),
    "rows": ("data.packing=true", "train.global_batch=3", "train.micro_batch=2"),
    "rows-dora": ("data.packing=true", DORA, "train.global_batch=2", "train.micro_batch=2"),
    "dropout": (f"{DROP}=0.2", "train.micro_batch=3", "seed=8"),
    "dora": (DORA, "seed=10", "optim.weight_decay=0.1"),
    "dora-plus": (DORA, f"{LORA}=20", "methods.0.rslora=true", "methods.0.lr_ratio=4"),
    "dora-dropout": (DORA, f"{DROP}=0.1", f"{LORA}=2", "train.micro_batch=2", "seed=12"),
}
TARGETS = "methods.0.targets=[q_proj, down_proj]"
FEW = ("rank64", "accumulates", "dropout", "dora", "dora-dropout")
BASES = {  # changes, steps, bound of the relative difference
    "fp32": (("data.packing=true",), 50, 1e-5),
    "nf4": (("model.quant=nf4",), 10, 1e-5),
    "recomputed": (("train.gradient_checkpointing=true",), 10, 1e-5),
    "targets": ((TARGETS,), 10, 1e-5),
    "bf16": (
        ("model.dtype=bf16", "train.precision=bf16"),
        6,
        5e-3,
    ),  # other batch shapes, other roundings
}


def gap(ours: list[float], theirs: list[float]) -> float:
    """Largest relative difference."""
    assert len(ours) == len(theirs) > 0
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    ("base", "cpu_reading"),
    [*((base, None) for base in BASES if base != "nf4"), ("nf4", 0), ("nf4", 1)],
    indirect=["cpu_reading"],
)
def test_a_trial_has_the_losses_of_its_own_run(base, cpu_reading, tmp_path):
    changes, steps, bound = BASES[base]
    names = MIX if base == "fp32" else FEW
    lab = Lab(tmp_path, *changes, steps=steps)
    unpacked = ("data.packing=false",)  # but for those of the mix that say otherwise
    packed = [lab.run(name, *unpacked, *MIX[name], where="packed") for name in names]
    alone = [lab.run(name, *unpacked, *MIX[name], where="alone") for name in names]
    finish(lab.pack(lab.run("first"), *packed))
    for ours, theirs in zip(packed, alone, strict=True):
        lab.solo(theirs)
        assert gap(losses(ours), losses(theirs)) < bound, ours.name
        assert gap(losses(ours, "eval"), losses(theirs, "eval")) < bound, ours.name


def sgd(groups, optim):
    """Plain gradient descent, whose errors do not grow."""
    return torch.optim.SGD(param_groups(groups, optim), lr=optim.lr)


def test_in_float64_with_sgd_nothing_differs(tmp_path, monkeypatch):
    def double(*args, **more):
        return load_model(*args, **more).double()

    monkeypatch.setattr("rayft.compose.assemble.load_model", double)
    monkeypatch.setattr("rayft.trials.pack.load_model", double)
    monkeypatch.setattr("rayft.strategies.ddp.build_optimizer", sgd)
    lab = Lab(tmp_path, "data.packing=true", "optim.lr=0.02")
    runs = [lab.run(name, "data.packing=false", *changes) for name, changes in MIX.items()]
    pack = lab.pack(lab.run("first"), *runs, optimizer=sgd)
    corpus = open_corpus(runs[0], lab.ready.uri, lab.ready.hash)
    parts = [assemble(run, corpus, CPU) for run in runs]
    steppers = [stepper_of(part) for part in parts]
    slots = [pack._table.all[run.name] for run in runs]
    # the solo runs share this process: each gets its own generator state back for its step
    states = [slot.generators.cpu.get_state() for slot in slots]
    for step in range(1, 51):
        found = step_trials(pack._model, slots)
        for index, slot in enumerate(slots):
            torch.set_rng_state(states[index])
            solo, _ = steppers[index].run(step, lambda: False, more=True)
            states[index] = torch.get_rng_state()
            slot.session.progress.step = step
            assert found[slot].loss == pytest.approx(solo.loss, rel=1e-12), (slot.trial, step)
            assert found[slot].norm == pytest.approx(solo.grad_norm, rel=1e-10)
