"""LoRA against peft: logits, LoRA+ learning rates, published parameter counts."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PretrainedConfig, PreTrainedModel

from rayft.config.methods import FullSpec, LoraSpec
from rayft.methods import apply_all, build
from rayft.models.load import model_facts
from tests.small import batch, llama


@pytest.mark.parametrize(
    "spec",
    [
        LoraSpec(rank=4, alpha=8),
        LoraSpec(rank=4, alpha=8, rslora=True),
        LoraSpec(rank=4, alpha=8, dora=True),
        LoraSpec(rank=4, alpha=8, targets=("q_proj", "down_proj")),
    ],
    ids=["lora", "rslora", "dora", "targets"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_is_bit_equal_to_peft(spec, dtype):
    ours, theirs = llama().to(dtype), llama().to(dtype)
    apply_all(ours, [build(spec)], seed=7)
    torch.manual_seed(7)
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        use_rslora=spec.rslora,
        use_dora=spec.dora,
        target_modules=spec.targets if isinstance(spec.targets, str) else list(spec.targets),
        task_type="CAUSAL_LM",
    )
    theirs = get_peft_model(theirs, config)
    for seed, (name, param) in enumerate(ours.named_parameters()):
        other = theirs.get_parameter("base_model.model." + name)
        assert param.dtype == other.dtype
        assert torch.equal(param, other)
        if ".lora_B." in name:  # zero at the start: give both the same values
            for each in (param, other):
                torch.manual_seed(seed)
                nn.init.normal_(each, std=0.1)
    ids = batch().input_ids
    with torch.no_grad():
        one = ours.eval()(input_ids=ids).logits
        two = theirs.eval()(input_ids=ids).logits
    assert torch.equal(one, two)


def test_lora_plus_learning_rates_equal_pefts_per_parameter():
    ours, lr, ratio = llama(), 1e-4, 16.0
    groups = apply_all(ours, [build(LoraSpec(rank=4, lr_ratio=ratio))])
    mine = {param: lr * group.lr_ratio for group in groups for param in group.params}
    theirs = get_peft_model(llama(), LoraConfig(r=4, target_modules="all-linear"))
    optimizer = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=lr, loraplus_lr_ratio=ratio)
    names = {param: name for name, param in theirs.named_parameters()}
    expected = {
        names[param].removeprefix("base_model.model."): group["lr"]
        for group in optimizer.param_groups
        for param in group["params"]
    }
    got = {name: mine[p] for name, p in ours.named_parameters() if p.requires_grad}
    assert got == pytest.approx(expected)


class Projections(PreTrainedModel):
    """Only the query and value projections of a published model: all that LoRA on q and v sees."""

    config_class = PretrainedConfig

    def __init__(self, layers: int, width: int) -> None:
        super().__init__(PretrainedConfig())
        self.layers = nn.ModuleList(
            nn.ModuleDict({"q_proj": nn.Linear(width, width), "v_proj": nn.Linear(width, width)})
            for _ in range(layers)
        )

    def get_output_embeddings(self) -> None:
        """No head."""


def llama32_3b() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=128256,
            hidden_size=3072,
            intermediate_size=8192,
            num_hidden_layers=28,
            num_attention_heads=24,
            num_key_value_heads=8,
            head_dim=128,
            tie_word_embeddings=True,
        )
    )


QV = ("q_proj", "v_proj")


@pytest.mark.parametrize(
    ("model", "spec", "published"),
    [
        (lambda: Projections(12, 768), LoraSpec(rank=8, targets=QV), 294_912),  # RoBERTa-base
        (lambda: Projections(24, 1024), LoraSpec(rank=8, targets=QV), 786_432),  # RoBERTa-large
        (lambda: Projections(48, 1536), LoraSpec(rank=16, targets=QV), 4_718_592),  # DeBERTa-XXL
        (lambda: Projections(96, 12288), LoraSpec(rank=8, targets=QV), 37_748_736),  # GPT-3
        (lambda: Projections(96, 12288), LoraSpec(rank=1, targets=QV), 4_718_592),
        (llama32_3b, LoraSpec(rank=32, targets=QV), 9_175_040),
        (llama32_3b, LoraSpec(rank=32, targets=QV, dora=True), 9_289_728),
        (llama32_3b, LoraSpec(rank=64, targets=QV, rslora=True), 18_350_080),
        (llama32_3b, FullSpec(), 3_212_749_824),
        (lambda: Projections(32, 4096), LoraSpec(rank=8, targets=QV), 4_194_304),  # Llama 7B
        (lambda: Projections(40, 5120), LoraSpec(rank=8, targets=QV), 6_553_600),  # Llama 13B
        (lambda: Projections(24, 2048), LoraSpec(rank=8, targets=QV), 1_572_864),  # phi-1.5
    ],
)
def test_trainable_counts_equal_the_published_ones(model, spec, published):
    with torch.device("meta"):
        built = model()
        apply_all(built, [build(spec)])
    assert model_facts(built).trainable == published
