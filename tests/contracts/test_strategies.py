"""Every strategy through the same suite: resume, groups, broken updates, slices, sharded birth."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch

from rayft.config.strategies import StrategySpec
from rayft.core.protocols import ParamGroup
from rayft.core.shards import PARAM
from rayft.strategies import IMPLEMENTATIONS
from tests.strategy_lab import printed, results
from tests.strategy_toy import OPTIM, SAVE, STEPS

pytestmark = pytest.mark.timeout(600)  # the first test of a session runs the laboratory
NAMES = ["ddp", "zero0", "zero1", "zero2", "zero3"]


def test_every_spec_of_the_menu_has_its_strategy() -> None:
    union, _ = get_args(StrategySpec)
    assert set(get_args(union)) == set(IMPLEMENTATIONS)


@pytest.mark.parametrize("name", NAMES)
def test_resume_is_bit_exact(name: str) -> None:
    """Save, fresh engines, load: the next five losses and norms are those of the whole run."""
    for whole, again in zip(results(f"full-{name}"), results(f"full-{name}-again"), strict=True):
        assert again["losses"] == whole["losses"][SAVE : SAVE + 5]
        assert again["norms"] == whole["norms"][SAVE : SAVE + 5]


@pytest.mark.parametrize("name", NAMES)
def test_bf16_resume_is_bit_exact(name: str) -> None:
    whole, again = results(f"bf16-{name}")[0], results(f"bf16-{name}-again")[0]
    assert again["losses"] == whole["losses"][3:]
    assert again["eval"] == whole["eval"]


@pytest.mark.parametrize("name", ["offload-zero1", "offload-zero2", "offload-zero3"])
def test_offloaded_resume_is_bit_exact(name: str) -> None:
    whole, again = results(name)[0], results(f"{name}-again")[0]
    assert again["losses"] == whole["losses"][2:]
    assert again["eval"] == whole["eval"]


@pytest.mark.parametrize("name", ["lora-zero3", "nf4-ddp", "nf4-zero2", "nf4-zero3"])
def test_adapter_resume_is_bit_exact(name: str) -> None:
    whole, again = results(name)[0], results(f"{name}-again")[0]
    assert again["losses"] == whole["losses"][3:]
    assert again["eval"] == whole["eval"]


@pytest.mark.parametrize(
    ("name", "world"),
    [
        ("zero3-to-ddp", 2),
        ("zero2-to-zero3", 2),
        ("solo-to-zero3", 2),
        ("solo-to-zero1", 2),
        ("zero3-to-single-zero2", 1),
        ("zero2-to-single-zero3", 1),
        ("zero3-to-single-ddp", 1),
    ],
)
def test_shards_of_any_strategy_and_world_size_continue_the_run(name: str, world: int) -> None:
    expected = results("solo", 1)[0]["losses"][SAVE : SAVE + 5]
    for rank in results(name, world):
        assert rank["losses"] == pytest.approx(expected, rel=2e-7)  # one unit in the last place


def test_lora_shards_of_zero3_continue_under_zero2() -> None:
    expected = results("lora-zero3")[0]["losses"][3:]
    assert results("lora-zero3-to-zero2")[0]["losses"] == pytest.approx(expected, rel=2e-7)


@pytest.mark.parametrize("name", NAMES)
def test_lora_plus_rates_hold_by_name(name: str) -> None:
    """Two groups (no empty "no decay" one), B always at 16 times A, through and after warm-up."""
    for rank in results(f"lora-{name}"):
        for lrs in rank["lrs"]:
            assert list(lrs) == ["lora_A", "lora_B"]
            assert lrs["lora_B"] == 16 * lrs["lora_A"]
        assert rank["lrs"][5]["lora_A"] == OPTIM.lr  # the fifth update: warm-up of 4 is over


@pytest.mark.parametrize("name", ["lora-zero3-again", "lora-zero3-to-zero2"])
def test_lora_plus_rates_hold_after_load(name: str) -> None:
    resumed, whole = results(name)[0]["lrs"], results("lora-zero3")[0]["lrs"]
    assert resumed[1:] == whole[4:]
    assert all(lrs["lora_B"] == 16 * lrs["lora_A"] for lrs in resumed)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["poison", "bf16"])
def test_update_with_infinite_norm_is_not_applied(kind: str, name: str) -> None:
    """One rank's loss is infinite at step 2: parameters, moments and step counter stay, bit for
    bit, on every rank, and the run goes on."""
    for rank in results(f"{kind}-{name}"):
        assert rank["kept"]
        assert not math.isfinite(rank["norms"][1])
        assert all(math.isfinite(norm) for norm in (rank["norms"][0], *rank["norms"][2:]))


@pytest.mark.parametrize("name", [*NAMES, "offload", "solo"])
def test_a_parameter_without_a_gradient_stops_the_run_before_its_first_update(name: str) -> None:
    """The first layer's attention detaches what it computes: its four weights and the norm before
    it are named, on every rank. Every other case here has the check too, and passes it."""
    for rank in results(f"dead-{name}", 1 if name == "solo" else 2):
        assert rank["step"] == 1
        assert "5 of 21 trained parameters got no gradient" in rank["dead"]
        for words in ("decay: ", "layers.0.self_attn", "no_decay: ", "layers.0.input_layernorm"):
            assert words in rank["dead"]


@pytest.mark.parametrize("name", [*NAMES, "offload", "solo"])
def test_a_group_that_stands_still_stops_the_run(name: str) -> None:
    """The gradients of all norms are made zero. The first update of the warm-up is at rate zero,
    so the third step is the second that counts."""
    for rank in results(f"still-{name}", 1 if name == "solo" else 2):
        assert rank["step"] == 3
        assert "parameter group no_decay did not move in two updates" in rank["dead"]


@pytest.mark.parametrize("name", NAMES)
def test_slices_cover_every_element_once(name: str) -> None:
    """No gap, no overlap, no padding, and about half of everything on each of two ranks."""
    shards = [rank["shard"] for rank in results(f"full-{name}")]
    full = results(f"full-{name}")[0]["params"]
    covered = {key: torch.zeros(tensor.numel()) for key, tensor in full.items()}
    for shard in shards:
        assert shard.scalars == {"optimizer_step": float(SAVE)}
        for key, piece in shard.slices.items():
            assert piece.shape == tuple(full[key].shape)
            sizes = {tensor.numel() for tensor in piece.tensors.values()}
            assert len(sizes) == 1 and sizes != {0}
            assert set(piece.tensors) == {PARAM, "exp_avg", "exp_avg_sq"}
            covered[key][piece.start : piece.start + sizes.pop()] += 1
    assert all(bool((count == 1).all()) for count in covered.values())
    total = sum(tensor.numel() for tensor in full.values())
    for shard in shards:
        held = sum(piece.tensors[PARAM].numel() for piece in shard.slices.values())
        assert held == pytest.approx(total / 2, rel=0.01)


def test_evaluation_is_the_same_on_every_rank() -> None:
    for name in NAMES:
        first, second = results(f"full-{name}")
        assert first["eval"] == second["eval"] and len(first["lrs"]) == STEPS + 1


def test_zero3_creates_the_model_sharded() -> None:
    """No rank ever holds the model whole: it ends with half, and resident memory never rose to
    what the whole model takes."""
    whole = results("birth-ddp")[0]
    assert whole["held"] == whole["whole"] > 20_000_000
    for rank in results("birth-zero3"):
        assert rank["whole"] == whole["whole"]
        assert rank["held"] == pytest.approx(whole["whole"] / 2, rel=0.01)
        assert rank["peak"] < 0.75 * 4 * whole["whole"]


def test_deepspeed_is_quiet() -> None:
    results("full-zero3")
    lines = (printed("stdout") + printed("stdout", 1)).splitlines()
    assert all("OVERFLOW! Skipping step." in line for line in lines)  # the poisoned updates
    said = printed("stderr") + printed("stderr", 1)
    assert "[INFO]" not in said and "_tensor` is deprecated" not in said


def test_empty_group_is_an_internal_error() -> None:
    from rayft.strategies.optim import build_optimizer

    weight = torch.nn.Parameter(torch.zeros(3))
    groups = [ParamGroup("lora_A", (weight,)), ParamGroup("no_decay", (), decay=False)]
    with pytest.raises(RuntimeError, match="'no_decay' is empty"):
        build_optimizer(groups, OPTIM)
