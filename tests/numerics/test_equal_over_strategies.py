"""One worker == DDP == ZeRO 0/1/2/3, whatever the micro-batches: parameters after 20 AdamW steps.

Tolerance: 1e-5 of the largest update of any element, and one unit in the last place of the
parameter. Sums of fp32 gradients in another order differ by about 1e-7 relative; AdamW divides by
the gradient's own size, so that error reaches the parameter as the same share of its update, a
little amplified where gradients nearly cancel. And a weight near 1, such as a norm's, cannot be
stored more finely than 1.2e-7: whether a rounding falls one way or the other depends on the CPU.
"""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor
from transformers import get_scheduler

from rayft.config.run import ModelSpec
from tests.strategy_lab import distance, results, start_params
from tests.strategy_toy import OPTIM, ROWS, STEPS, Step, batches, groups_of, load_base

pytestmark = pytest.mark.timeout(600)  # the first test of a session runs the laboratory
EQUAL = 1e-5
LAST_PLACE = 2.0**-23  # of fp32, relative


def update_size(tied: bool = False) -> float:
    return distance(start_params(tied), results("solo-tied" if tied else "solo", 1)[0]["params"])


def agree(one: Mapping[str, Tensor], two: Mapping[str, Tensor], size: float) -> bool:
    """Parameters whose largest update was `size`; see the head of this file."""
    assert one.keys() == two.keys()
    return all(
        torch.allclose(one[name].detach(), two[name].detach(), LAST_PLACE, EQUAL * size)
        for name in one
    )


def test_the_tolerance_notices_two_last_places_and_small_differences() -> None:
    ones = {"norm": torch.ones(3), "weight": torch.zeros(3)}
    size = 4e-3
    assert agree(ones | {"norm": torch.ones(3) + LAST_PLACE}, ones, size)
    assert not agree(ones | {"norm": torch.ones(3) + 2 * LAST_PLACE}, ones, size)
    assert not agree(ones | {"weight": torch.full((3,), 2 * EQUAL * size)}, ones, size)


@pytest.mark.parametrize(
    "name", ["ddp", "zero0", "zero1", "zero2", "zero3"], ids=lambda name: f"2x{name}"
)
def test_two_ranks_equal_one(name: str) -> None:
    solo = results("solo", 1)[0]["params"]
    size = update_size()
    assert size > 0.01  # there is something to compare
    for rank in results(f"full-{name}"):
        assert agree(rank["params"], solo, size)


@pytest.mark.parametrize("name", ["ddp", "zero1", "zero2", "zero3"])
def test_micro_batches_of_one_row_equal_whole_batches(name: str) -> None:
    solo = results("solo", 1)[0]["params"]
    for rank in results(f"split-{name}"):
        assert agree(rank["params"], solo, update_size())


def test_accumulation_in_one_process_changes_nothing() -> None:
    split, whole = results("solo-split", 1)[0], results("solo", 1)[0]
    assert agree(split["params"], whole["params"], update_size())
    assert split["losses"] == pytest.approx(whole["losses"], rel=1e-6)


def test_zero_with_one_rank_equals_no_strategy_at_all() -> None:
    single, solo = results("single-zero2", 1)[0], results("solo", 1)[0]
    assert agree(single["params"], solo["params"], update_size())


def test_gradients_are_summed_not_averaged() -> None:
    """Norms before clipping are those of the global mean, on every rank."""
    norms = results("solo", 1)[0]["norms"]
    assert min(norms) > OPTIM.clip  # clipping was at work in all of these comparisons
    for name in ("ddp", "zero0", "zero1", "zero2", "zero3"):
        for rank in results(f"full-{name}"):
            assert rank["norms"] == pytest.approx(norms, rel=1e-5)


def test_lora_equal_over_strategies() -> None:
    reference = results("lora-ddp")[0]
    zeros = {k: torch.zeros_like(v) for k, v in reference["params"].items() if "lora_B" in k}
    size = distance({k: reference["params"][k] for k in zeros}, zeros)  # B starts at zero
    for name in ("zero0", "zero1", "zero2", "zero3"):
        for rank in results(f"lora-{name}"):
            assert agree(rank["params"], reference["params"], size)


def test_nf4_base_equal_over_strategies() -> None:
    reference = results("nf4-ddp")[0]
    for name in ("zero2", "zero3"):
        for rank in results(f"nf4-{name}"):
            assert rank["losses"] == pytest.approx(reference["losses"], rel=1e-6)
            assert distance(rank["params"], reference["params"]) <= 1e-6


@pytest.mark.parametrize("name", ["ddp", "zero2", "zero3"])
def test_nf4_base_is_the_same_on_either_kind_of_cpu(name: str) -> None:
    """With AVX512-BF16 as bitsandbytes sees it (every other case here), and without."""
    with_bf16, without = results(f"nf4-{name}")[0], results(f"nf4-{name}-other-cpu")[0]
    assert with_bf16["losses"] == without["losses"] and with_bf16["eval"] == without["eval"]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_cpu_offload_equals_no_offload(stage: int) -> None:
    offloaded, plain = results(f"offload-zero{stage}")[0], results(f"split-zero{stage}")[0]
    assert offloaded["losses"] == pytest.approx(plain["losses"][:4], rel=1e-6)


@pytest.mark.parametrize("name", ["zero3-tied", "zero3-tied-module", "zero3-tied-fused"])
def test_head_weight_used_outside_its_module_when_tied(name: str) -> None:
    solo = results("solo-tied", 1)[0]["params"]
    for rank in results(name):
        assert agree(rank["params"], solo, update_size(tied=True))


def test_head_weight_used_outside_its_module_equals_the_module() -> None:
    """full-zero3 reads lm_head.weight in chunks; zero3-module calls lm_head."""
    chunked, module = results("full-zero3")[0], results("zero3-module")[0]
    assert chunked["losses"][:4] == pytest.approx(module["losses"], rel=1e-6)
    assert results("solo", 1)[0]["losses"][:4] == pytest.approx(module["losses"], rel=1e-6)


@pytest.mark.parametrize(
    "name", ["zero3-fused", "zero2-fused", "ddp-fused", "zero3-recompute", "ddp-recompute"]
)
def test_gradients_formed_in_forward_and_recomputed_activations(name: str) -> None:
    """A loss that forms its own gradients, and gradient checkpointing, change nothing."""
    solo = results("solo-module", 1)[0]
    for rank in results(name):
        assert rank["losses"] == pytest.approx(solo["losses"], rel=1e-6)
        assert agree(rank["params"], solo["params"], update_size())


def test_recomputed_activations_under_lora_and_zero3() -> None:
    recomputed, plain = results("zero3-lora-recompute")[0], results("lora-zero3")[0]
    assert recomputed["losses"] == pytest.approx(plain["losses"][:4], rel=1e-6)


@pytest.mark.parametrize("name", ["ddp", "zero2", "zero3"])
def test_nf4_base_in_bf16_follows_fp32(name: str) -> None:
    for rank in results(f"nf4-bf16-{name}"):
        assert rank["losses"] == pytest.approx(results("nf4-ddp")[0]["losses"][:3], rel=2**-7)


@pytest.mark.parametrize("name", ["ddp", "zero0", "zero1", "zero2", "zero3"])
def test_bf16_follows_fp32(name: str) -> None:
    """bf16 keeps 8 bits of mantissa: losses agree to 2^-8 relative."""
    bf16, fp32 = results(f"bf16-{name}")[0]["losses"], results(f"poison-{name}")[0]["losses"]
    assert bf16[:3] == pytest.approx(fp32, rel=2**-8)


def test_torch_adamw_and_transformers_schedule_give_the_same_parameters() -> None:
    """The solo run again, written with torch's and transformers' own parts."""
    start_params()  # the toy model exists
    torch.set_num_threads(1)
    step = Step(load_base(ModelSpec(path="toy"), tied=False), "module")
    decay, no_decay = groups_of(step.model, "full")
    optimizer = torch.optim.AdamW(
        [
            {"params": decay.params, "weight_decay": OPTIM.weight_decay},
            {"params": no_decay.params, "weight_decay": 0.0},
        ],
        lr=OPTIM.lr,
        betas=OPTIM.betas,
        eps=OPTIM.eps,
    )
    scheduler = get_scheduler("cosine", optimizer, int(OPTIM.warmup), STEPS)
    for number in range(1, STEPS + 1):
        [batch], count = batches(number, 0, 1, ROWS)
        loss = step(batch.inputs(), {})["nll"].sum() / count
        loss.backward()
        torch.nn.utils.clip_grad_norm_(step.parameters(), OPTIM.clip)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    solo = results("solo", 1)[0]["params"]
    assert agree(dict(step.named_parameters()), solo, update_size())
