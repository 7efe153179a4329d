"""row_nll against F.cross_entropy on whole logits, and against TRL's sft loss."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn import functional
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaForCausalLM,
)

from rayft.core.batch import IGNORE
from rayft.core.errors import ConfigError
from rayft.models.chunked import chunk_size
from rayft.models.policy import CausalPolicy
from tests.small import VOCAB, batch, llama

SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}


def plain_rows(model, rows) -> torch.Tensor:
    """(B,) sums from whole logits."""
    logits = model(input_ids=rows.input_ids, use_cache=False).logits[:, :-1].float()
    nll = functional.cross_entropy(
        logits.transpose(1, 2), rows.targets(), ignore_index=IGNORE, reduction="none"
    )
    return nll.sum(dim=1)


def gradients(model, loss) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def compare(model, rows, scale, *, rtol: float) -> None:
    policy = CausalPolicy(model)
    plain = plain_rows(model, rows)
    ours = policy.row_nll(rows, scale)
    assert torch.allclose(ours, plain, rtol=rtol, atol=rtol)
    expected = gradients(model, (plain * scale).sum())
    got = gradients(model, (ours * scale).sum())
    assert expected.keys() == got.keys()
    for name, grad in expected.items():
        gap = (got[name].float() - grad.float()).norm() / grad.float().norm()
        assert gap <= rtol, f"{name}: {gap}"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("scale", [[0.1, 0.1, 0.1], [0.2, 0.0, 0.05]])
def test_fp32_equals_cross_entropy(tied, scale):
    compare(llama(tied=tied), batch(), torch.tensor(scale), rtol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_bf16_within_rounding(tied):
    compare(llama(tied=tied).bfloat16(), batch(), torch.full((3,), 0.05), rtol=3e-2)


def test_frozen_head_takes_any_row_weights():
    model = llama()
    model.lm_head.requires_grad_(False)
    rows, weights = batch(), torch.tensor([1.0, -2.0, 0.5])
    expected = gradients(model, (plain_rows(model, rows) * weights).sum())
    got = gradients(model, (CausalPolicy(model).row_nll(rows, torch.ones(3)) * weights).sum())
    assert "lm_head.weight" not in got
    for name, grad in expected.items():
        assert torch.allclose(got[name], grad, rtol=1e-4, atol=1e-6)


def test_training_head_refuses_other_row_weights():
    rows = CausalPolicy(llama()).row_nll(batch(), torch.ones(3))
    with pytest.raises(RuntimeError, match="head's gradient"):
        (rows * torch.tensor([1.0, 2.0, 1.0])).sum().backward()


@pytest.mark.parametrize(
    "model",
    [
        lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, **HEADS, head_dim=8)),
        lambda: CohereForCausalLM(CohereConfig(**SIZES, **HEADS, logit_scale=0.3)),
        lambda: GraniteForCausalLM(GraniteConfig(**SIZES, **HEADS, logits_scaling=4.0)),
        lambda: GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4)),
    ],
    ids=["gemma2-softcap", "cohere-scale", "granite-scale", "gpt2"],
)
def test_families_that_change_their_logits(model):
    torch.manual_seed(0)
    compare(model().eval(), batch(), torch.full((3,), 0.1), rtol=1e-4)


class DoubledLogits(LlamaForCausalLM):
    """A family whose rule rayft does not know."""

    def forward(self, **inputs):
        out = super().forward(**inputs)
        out.logits = 2 * out.logits
        return out


def test_unknown_logit_rule_is_refused():
    with pytest.raises(ConfigError, match="changes its logits"):
        CausalPolicy(DoubledLogits(llama().config))


def test_wrapped_head_falls_back_to_the_module():
    from peft import LoraConfig, inject_adapter_in_model

    model = llama()
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["lm_head"]), model)
    torch.nn.init.normal_(model.lm_head.lora_B["default"].weight)
    compare(model, batch(), torch.full((3,), 0.1), rtol=1e-5)


def test_rows_without_targets_give_zero_and_zero_gradients():
    model = llama()
    rows = batch()
    rows = dataclasses.replace(rows, labels=torch.full_like(rows.labels, IGNORE))
    ours = CausalPolicy(model).row_nll(rows, torch.zeros(3))
    assert torch.equal(ours, torch.zeros(3))
    got = gradients(model, ours.sum())
    assert set(got) == {name for name, _ in model.named_parameters()}
    assert all(not grad.any() for grad in got.values())


def test_no_grad_gives_the_same_loss():
    policy, rows = CausalPolicy(llama()), batch()
    with torch.no_grad():
        quiet = policy.row_nll(rows, torch.ones(3))
    assert not quiet.requires_grad
    assert torch.equal(quiet, policy.row_nll(rows, torch.ones(3)).detach())


def test_autocast_computes_in_bf16_and_returns_fp32_gradients():
    model, rows, scale = llama(), batch(), torch.full((3,), 0.1)
    policy = CausalPolicy(model)
    exact = gradients(model, (policy.row_nll(rows, scale) * scale).sum())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = policy.row_nll(rows, scale)
    got = gradients(model, (loss * scale).sum())
    for name, grad in exact.items():
        assert got[name].dtype == torch.float32
        assert (got[name] - grad).norm() < 0.1 * grad.norm()


@pytest.mark.parametrize(("positions", "trained"), [(8192, 8192), (64, 7), (4, 4), (8192, 100)])
def test_chunk_logits_are_an_eighth_at_most(positions, trained):
    size = chunk_size(positions, trained)
    assert 1 <= size <= max(1, positions // 8)


def test_whole_logits_never_exist():
    """The largest tensor that the head and the loss allocate is a chunk."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            transposed_weight = func is torch.ops.aten.t.default
            if not transposed_weight and torch.is_tensor(out) and out.shape[-1:] == (VOCAB,):
                self.elements = max(self.elements, out.numel())
            return out

    model, rows = llama(), batch(rows=4, length=32, trained=1.0)
    policy = CausalPolicy(model)
    with Largest() as seen:
        policy.row_nll(rows, torch.full((4,), 0.1)).sum().mul(0.1).backward()
    assert 0 < seen.elements <= 4 * 32 * VOCAB // 8


def test_packed_rows_equal_documents_alone():
    model = llama()
    policy = CausalPolicy(model, packing=True)
    alone = batch(rows=2, length=8, trained=1.0)
    packed = dataclasses.replace(
        alone,
        input_ids=alone.input_ids.view(1, 16),
        labels=alone.labels.view(1, 16),
        position_ids=alone.position_ids.view(1, 16),
        lengths=torch.tensor([16]),
        task=torch.zeros(1, dtype=torch.int64),
        trial=torch.zeros(1, dtype=torch.int64),
        packed=True,
    )
    one, two = policy.row_nll(alone, torch.ones(2)), policy.row_nll(packed, torch.ones(1))
    assert torch.allclose(one.sum(), two.sum(), rtol=1e-6)


def test_packing_is_refused_where_documents_would_mix():
    from transformers import BloomConfig, BloomForCausalLM

    model = BloomForCausalLM(BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=1, n_head=4))
    CausalPolicy(model)
    with pytest.raises(ConfigError, match="packed documents"):
        CausalPolicy(model, packing=True)


def test_equals_trl_sft_loss(tmp_path):
    """TRL's SFTTrainer, evaluated on the same rows, reports our mean over tokens."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    core = Tokenizer(models.WordLevel({str(i): i for i in range(VOCAB)}, unk_token="0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="0", eos_token="1")
    rows = batch(trained=1.0)
    model = llama()
    mask = (rows.labels != IGNORE).int()
    data = Dataset.from_dict(
        {"input_ids": rows.input_ids.tolist(), "completion_mask": mask.tolist()}
    )
    config = SFTConfig(
        output_dir=str(tmp_path),
        per_device_eval_batch_size=3,
        completion_only_loss=True,
        report_to=[],
        use_cpu=True,
        bf16=False,
        max_length=None,
    )
    trainer = SFTTrainer(
        model, args=config, train_dataset=data, eval_dataset=data, processing_class=tokenizer
    )
    theirs = trainer.evaluate()["eval_loss"]
    with torch.no_grad():
        ours = CausalPolicy(model).row_nll(rows, torch.ones(3)).sum() / rows.tokens().sum()
    assert float(ours) == pytest.approx(theirs, rel=1e-5)
