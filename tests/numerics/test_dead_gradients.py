"""Dead gradients are an error: broken on purpose in one process and in packs.

The same under every strategy with two ranks: tests/contracts/test_strategies.py."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes.functional import has_avx512bf16
from torch import nn
from torch.library import Library

from rayft.compose.gradient_check import ENOUGH, GradientCheck, GroupMovement
from rayft.core.errors import DeadGradientError
from rayft.core.protocols import ParamGroup
from rayft.models.load import load_model
from rayft.strategies.optim import build_optimizer
from rayft.training.attempts import EndedAttempt, GiveUp, decide
from rayft.training.failure import caught
from tests.packs import CPU, Lab, Silent, finish, home_of, losses, record

ATTENTION = "model.layers.0.self_attn"


def detached(model: nn.Module) -> None:
    """What the first layer's attention computes is cut off from the graph."""
    layer = model.get_submodule(ATTENTION)
    layer.register_forward_hook(lambda module, inputs, out: (out[0].detach(), *out[1:]))


def inference_only(model: nn.Module) -> None:
    """The first layer's attention passes through an operator that nobody wrote a backward for."""
    layer = model.get_submodule(ATTENTION)
    layer.register_forward_hook(
        lambda module, inputs, out: (torch.ops.rayft_tests.no_backward(out[0]), *out[1:])
    )


@pytest.fixture(scope="module", autouse=True)
def operator():
    library = Library("rayft_tests", "DEF")
    library.define("no_backward(Tensor x) -> Tensor")
    library.impl("no_backward", torch.clone, "CPU")
    yield
    library._destroy()


@pytest.fixture
def breaking(monkeypatch):
    """Breaks every model that is loaded, solo and in packs."""

    def install(how) -> None:
        def load_broken(*args, **more):
            model = load_model(*args, **more)
            how(model)
            return model

        monkeypatch.setattr("rayft.compose.assemble.load_model", load_broken)
        monkeypatch.setattr("rayft.trials.pack.load_model", load_broken)

    return install


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_run_whose_graph_is_broken_stops_at_its_first_step(method, breaking, tmp_path):
    breaking(detached)
    lab = Lab(tmp_path, steps=6)
    run = lab.run("one", *(["methods=[{kind: full}]"] if method == "full" else []))
    with pytest.raises(DeadGradientError) as error:
        lab.solo(run)
    text = str(error.value)
    count = "8 of 28" if method == "lora" else "5 of 21"
    assert f"{count} trained parameters got no gradient" in text
    assert f"{ATTENTION}.q_proj" in text or f"{ATTENTION}.k_proj" in text
    assert "rank 0, step 1" in text and len(text.splitlines()) <= 15
    assert losses(run) == []  # nothing was trained


def test_a_pack_whose_graph_is_broken_fails_its_trials_and_says_why(breaking, tmp_path):
    breaking(detached)
    lab = Lab(tmp_path, steps=6)
    runs = [lab.run("one"), lab.run("two", "methods.0.rank=16")]
    told = finish(lab.pack(*runs))
    assert {one.trial: one.status for one in told} == {"one": "failed", "two": "failed"}
    for one, run in zip(sorted(told, key=lambda one: one.trial), runs, strict=True):
        assert "8 of 28 trained parameters got no gradient" in one.error
        assert f"{ATTENTION}.k_proj.lora_A" in one.error and f"{one.trial}, step 1" in one.error
        kept = record(run)
        assert kept.status == "failed" and kept.error == one.error and kept.steps == 0


@pytest.mark.parametrize("where", ["solo", "pack"])
def test_an_operator_without_a_backward_pass_is_an_error(where, breaking, tmp_path):
    """torch warns and drops the gradient; every adapter still has one, by another path."""
    breaking(inference_only)
    lab = Lab(tmp_path, steps=6)
    with pytest.raises(DeadGradientError, match="rayft_tests::no_backward, which has none"):
        lab.solo(lab.run("one")) if where == "solo" else lab.pack(lab.run("one"))


@pytest.mark.skipif(not has_avx512bf16(), reason="the kernel needs a CPU with AVX512-BF16")
def test_the_repacking_of_nf4_bases_would_be_found(monkeypatch, tmp_path):
    """Every trained parameter has a gradient there, and every group moves. (In a pack autograd
    itself raises.)"""
    monkeypatch.setattr("rayft.models.load.keep_nf4_as_loaded", lambda model: None)
    lab = Lab(tmp_path, "model.quant=nf4", steps=6)
    with pytest.raises(DeadGradientError, match="bitsandbytes::gemv_4bit"):
        lab.solo(lab.run("one"))


def test_a_base_that_dies_later_ends_the_trials_not_the_pack(tmp_path):
    """As it would by an evaluation in the middle of training."""
    lab = Lab(tmp_path, steps=6)
    pack = lab.pack(lab.run("one"))
    pack.step()
    inference_only(pack._model.step.policy.model)
    [told] = pack.step()
    assert told.status == "failed" and "no_backward" in told.error and pack.trials == ()


def test_a_trial_that_stands_still_fails_alone(tmp_path):
    """Its optimizer holds copies of its parameters; its neighbour trains as it would alone."""

    def optimizer(groups, optim):
        made = build_optimizer(groups, optim)
        if optim.betas[0] == 0.5:
            for group in made.param_groups:
                group["params"] = [param.detach().clone() for param in group["params"]]
        return made

    lab = Lab(tmp_path, steps=6)
    still = lab.run("still", "optim.betas=[0.5, 0.9]")
    fine, alone = (lab.run("fine", where=where) for where in ("runs", "alone"))
    told = {one.trial: one for one in finish(lab.pack(still, fine, optimizer=optimizer))}
    assert told["still"].status == "failed" and told["fine"].status == "done"
    assert "parameter group lora_A and lora_B did not move" in told["still"].error
    assert "step 3" in told["still"].error  # the first update of the warm-up is at rate zero
    lab.solo(alone)
    assert losses(fine) == pytest.approx(losses(alone), rel=1e-5)


def looked(*updates: tuple[torch.Tensor, float, int]) -> GroupMovement:
    """A GroupMovement that has seen these (parameter, learning rate, trained tokens)."""
    movement = GroupMovement({"w": "group"}, CPU)
    for step, (tensor, lr, tokens) in enumerate(updates, 1):
        if movement.looking:
            movement.look(step, {"group": lr}, tokens, lambda tensor=tensor: {"w": tensor})
    return movement


def test_updates_that_cannot_move_anything_do_not_count():
    still, moved = torch.ones(100), torch.full((100,), 1.001)
    with pytest.raises(DeadGradientError, match="group did not move"):
        looked((still, 1e-3, 8), (still, 1e-3, 8))
    assert looked((still, 0.0, 8), (still, 0.0, 8)).looking  # warm-up
    assert looked((still, 1e-3, 0), (still, 1e-3, 0)).looking  # nothing trained
    assert not looked((still, 1e-3, 8), (moved, 1e-3, 8), (moved, 1e-3, 8)).looking
    # one of a hundred elements is enough
    one = still.clone()
    one[50] = 2.0
    looked((still, 1e-3, 8), (one, 1e-3, 8))


def test_updates_that_float32_cannot_hold_are_not_held_against_a_run():
    """1 - 1e-9 is 1: norms at the end of a schedule stand still and are right to."""
    ones = torch.ones(100)
    assert not looked((ones, 1e-9, 8), (ones, 1e-9, 8)).looking
    with pytest.raises(DeadGradientError):  # but zeros could have moved
        looked((torch.zeros(100), 1e-9, 8), (torch.zeros(100), 1e-9, 8))
    few = torch.zeros(ENOUGH - 1)
    assert not looked((few, 1e-3, 8), (few, 1e-3, 8)).looking


def test_hooks_are_gone_after_the_first_step(tmp_path):
    weight = nn.Linear(2, 2)

    class OneRank:
        rank, device = 0, CPU

    check = GradientCheck(weight, [ParamGroup("all", tuple(weight.parameters()))], OneRank())
    weight(torch.ones(1, 2)).sum().backward()
    check.after_backward(1)
    assert not weight.weight._post_accumulate_grad_hooks


def test_another_attempt_is_not_made():
    """It could not change anything."""
    error = DeadGradientError("2 of 4 trained parameters got no gradient")
    assert isinstance(decide([EndedAttempt(caught(error, rank=0, step=1), 0)], retries=3), GiveUp)


def test_a_continued_run_is_looked_at_again(breaking, tmp_path):
    """The second attempt meets a model that the first did not have."""
    lab = Lab(tmp_path, "train.save_every=2", steps=6)
    run = lab.run("one")
    lab.solo(run, signals=Silent(stop_at=4))
    assert len(losses(run)) == 4
    breaking(detached)
    with pytest.raises(DeadGradientError, match="rank 0, step 5"):
        lab.solo(run, attempt=2)
    assert home_of(run).exists("checkpoints")
