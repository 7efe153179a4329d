"""Schedules against transformers, groups and rates, AdamW's state as torch makes it, 8-bit."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from transformers import get_scheduler

from rayft.config.run import ModelSpec, OptimSpec, TrainSpec
from rayft.config.strategies import DdpSpec
from rayft.core.batch import Batch
from rayft.core.protocols import ParamGroup
from rayft.strategies import build
from rayft.strategies.optim import (
    adam_state,
    assert_groups,
    build_optimizer,
    clipped_step,
    group_lrs,
    schedule,
    set_lrs,
)
from tests.strategy_toy import CPU, Reader

TOTAL = 37


@pytest.mark.parametrize(
    ("kind", "name", "floor"),
    [
        ("constant", "constant_with_warmup", 0.0),
        ("linear", "linear", 0.0),
        ("cosine", "cosine", 0.0),
        ("cosine", "cosine_with_min_lr", 0.1),
    ],
)
@pytest.mark.parametrize("warmup", [0.0, 0.1, 5.0])
def test_schedule_equals_transformers(kind: str, name: str, floor: float, warmup: float) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    steps = math.ceil(TOTAL * warmup) if warmup < 1 else int(warmup)
    extra = {"min_lr_rate": floor} if floor else None
    scheduler = get_scheduler(name, optimizer, steps, TOTAL, scheduler_specific_kwargs=extra)
    factor = schedule(OptimSpec(schedule=kind, warmup=warmup, min_lr_ratio=floor), TOTAL)
    for step in range(1, TOTAL + 1):
        assert factor(step) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        scheduler.step()


def test_linear_ends_at_its_floor() -> None:
    factor = schedule(OptimSpec(schedule="linear", warmup=0, min_lr_ratio=0.25), 10)
    assert [factor(step) for step in (1, 6, 11, 12)] == [1.0, 0.625, 0.25, 0.25]


def test_group_rates_follow_their_ratio() -> None:
    a, b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    groups = [ParamGroup("lora_A", (a,)), ParamGroup("lora_B", (b,), lr_ratio=16.0, decay=False)]
    optimizer = build_optimizer(groups, OptimSpec(lr=1e-4, weight_decay=0.1))
    assert_groups(optimizer, groups, 1e-4)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.0]
    set_lrs(optimizer, group_lrs(groups, 2e-4))
    assert [g["lr"] for g in optimizer.param_groups] == [2e-4, 16 * 2e-4]
    with pytest.raises(RuntimeError, match="lora_B"):
        set_lrs(optimizer, {"lora_A": 1.0})
    with pytest.raises(RuntimeError, match="declared"):
        assert_groups(optimizer, groups[::-1], 2e-4)


def test_broken_groups_are_internal_errors() -> None:
    weight = nn.Parameter(torch.zeros(2))
    frozen = nn.Parameter(torch.zeros(2), requires_grad=False)
    for groups in (
        [ParamGroup("a", (weight,)), ParamGroup("b", (weight,))],
        [ParamGroup("a", (weight,)), ParamGroup("a", (nn.Parameter(torch.zeros(1)),))],
        [ParamGroup("a", (frozen,))],
        [],
    ):
        with pytest.raises(RuntimeError):
            build_optimizer(groups, OptimSpec())


def test_fresh_adam_state_is_what_torch_makes() -> None:
    weight = nn.Parameter(torch.randn(3, 2))
    optimizer = build_optimizer([ParamGroup("w", (weight,))], OptimSpec())
    made = copy.deepcopy(adam_state(optimizer, weight))
    twin = nn.Parameter(weight.detach().clone())
    other = torch.optim.AdamW([twin], lr=1e-3)
    twin.grad = torch.zeros_like(twin)
    other.step()
    real = other.state[twin]
    assert set(made) == set(real)
    for key, tensor in made.items():
        assert (tensor.dtype, tensor.shape, tensor.device) == (
            real[key].dtype,
            real[key].shape,
            real[key].device,
        )
        assert not tensor.any()


class Wide(nn.Module):
    """nll = sum of squares of a wide layer's outputs: enough elements for real 8-bit blocks."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(128, 128, generator=generator) * 0.1)

    def forward(self, inputs, scale):
        tensors, _ = inputs
        x = torch.nn.functional.one_hot(tensors["input_ids"], 128).float().sum(1)
        return {"nll": (x @ self.weight).square().sum(1)}


def _batch(step: int) -> Batch:
    ids = torch.randint(0, 128, (4, 6), generator=torch.Generator().manual_seed(step % 2))
    zeros = torch.zeros(4, dtype=torch.long)
    places = torch.arange(6).expand(4, 6)
    return Batch(ids, ids, places, zeros + 6, task=zeros, trial=zeros, packed=False)


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_update_with_a_norm_that_is_not_finite_never_was(
    value: float, clip: float | None
) -> None:
    """Parameters, moments and the step counter: the run goes on as one without it, bit for bit."""
    grads = torch.randn(3, 40, generator=torch.Generator().manual_seed(1))
    ends = []
    for poison in (False, True):
        param = nn.Parameter(torch.ones(40))
        optimizer = build_optimizer([ParamGroup("decay", (param,))], OptimSpec(lr=1e-2))
        for number, grad in enumerate(grads):
            if poison and number == 1:
                param.grad = grad.index_fill(0, torch.tensor([7]), value)
                assert not math.isfinite(clipped_step(optimizer, [param], clip))
            param.grad = grad.clone()
            assert math.isfinite(clipped_step(optimizer, [param], clip)) and param.grad is None
        ends.append([param.detach(), *adam_state(optimizer, param).values()])
    assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("kind", ["adamw_8bit", "paged_adamw_8bit"])
def test_8bit_adamw_trains_and_resumes_bit_exact(kind: str) -> None:
    optim = OptimSpec(kind=kind, lr=1e-2)
    train, model = TrainSpec(steps=6), ModelSpec(path="toy")

    def engine():
        step = Wide()
        groups = [ParamGroup("decay", (step.weight,))]
        strategy = build(DdpSpec(), optim, train, model, micro_batch=4, device=CPU)
        return strategy.prepare(step, groups)

    def advance(engine, first: int) -> list[float]:
        losses = []
        for number in range(first, first + 3):
            scale = {"nll": torch.full((4,), 0.25)}
            loss = (engine.forward(_batch(number), scale)["nll"] * 0.25).sum()
            engine.backward(loss, last=True)
            engine.step({"decay": 1e-2})
            losses.append(float(loss.detach()))
        return losses

    whole = engine()
    earlier = advance(whole, 0)
    saved = copy.deepcopy(whole.shard())
    assert {tensor.dtype for tensor in saved.whole.values()} >= {torch.uint8}
    resumed = engine()
    resumed.load(Reader([saved]))
    later = advance(whole, 3)
    assert advance(resumed, 3) == later
    assert later[-1] < 0.9 * earlier[1]  # it learns: the same batch, four updates later
