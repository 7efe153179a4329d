"""Merging, model cards, the vLLM check, loading and generation, on real files."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rayft.compose.export import check_vllm, merge_run, write_model_card
from rayft.config.methods import LoraSpec
from rayft.config.run import ModelSpec, Run
from rayft.core.errors import ConfigError
from rayft.methods import apply_all, build
from rayft.models.generate import generate
from rayft.models.load import check_vocabulary, load_model
from rayft.models.tokenizer import load_tokenizer
from rayft.records.run_record import RunRecord
from tests.small import VOCAB, llama, saved_llama


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte of ASCII; 0 ends a text."""
    words = {chr(i) if i else "<eos>": i for i in range(128)}
    core = Tokenizer(models.WordLevel(words, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = saved_llama(tmp_path_factory.mktemp("base"))
    tokenizer().save_pretrained(path)
    return path


def trained_adapter(folder, spec: LoraSpec, quant: str, out=None) -> tuple[Run, dict]:
    """A run with a random trained adapter on a (quantised) base, and its trained parameters; also
    exported to `out`."""
    base = ModelSpec(path=str(folder), quant=quant)
    model = load_model(base, device="cpu", seed=0)
    method = build(spec)
    groups = apply_all(model, [method])
    for param in groups[1].params:
        torch.nn.init.normal_(param, std=0.05)
    state = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    if out is not None:
        method.export(model, state, out)
    data = {"train": [{"path": "corpus.jsonl"}]}
    run = Run(name="merge", model=base, methods=(spec,), data=data, train={"steps": 3})
    return run, state


@pytest.mark.parametrize("spec", [LoraSpec(rank=4), LoraSpec(rank=4, dora=True)])
@pytest.mark.parametrize(
    ("quant", "cpu_reading"), [("none", None), ("nf4", 0), ("nf4", 1)], indirect=["cpu_reading"]
)
def test_merge_into_the_unquantised_base(spec, quant, cpu_reading, folder, tmp_path):
    run, state = trained_adapter(folder, spec, quant)
    report = merge_run(run, state, tmp_path / "merged", load_tokenizer(run.model))
    assert report.rounding.max_abs < 1e-4 and abs(report.rounding.kl) < 1e-8
    if quant == "none":
        assert report.trained == report.rounding
    else:
        assert report.trained.max_abs > 1e-2 and report.trained.kl > 0
    merged = load_model(ModelSpec(path=str(tmp_path / "merged")), device="cpu", seed=0)
    assert not any("lora" in name for name, _ in merged.named_parameters())
    before = load_model(ModelSpec(path=str(folder)), device="cpu", seed=0)
    moved = merged.model.layers[0].self_attn.q_proj.weight
    assert not torch.equal(moved, before.model.layers[0].self_attn.q_proj.weight)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("a")["input_ids"] == [97]


def test_merge_keeps_the_dtype_of_the_stored_base(tmp_path):
    llama().bfloat16().save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    run, state = trained_adapter(tmp_path / "base", LoraSpec(rank=4), "none")
    report = merge_run(run, state, tmp_path / "merged", load_tokenizer(run.model))
    assert report.dtype == "bf16"
    assert 0 < report.rounding.kl < 1e-2


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (LoraSpec(rank=16), []),
        (LoraSpec(rank=12), []),
        (LoraSpec(rank=20), ["--max-lora-rank 32"]),
        (LoraSpec(rank=600), ["above vLLM's largest"]),
        (LoraSpec(rank=4, dora=True), ["DoRA", "lora_magnitude_vector"]),
    ],
)
def test_vllm_check(spec, words, folder, tmp_path):
    trained_adapter(folder, spec, "none", tmp_path)
    reasons = check_vllm(tmp_path)
    assert len(reasons) == len(words)
    assert all(word in reason for word, reason in zip(words, reasons, strict=True))


def test_vllm_check_sees_biases_and_saved_modules(folder, tmp_path):
    trained_adapter(folder, LoraSpec(rank=8), "none", tmp_path)
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"bias": "all", "modules_to_save": ["lm_head"]}))
    save_file({"base_model.model.x.bias": torch.ones(2)}, tmp_path / "adapter_model.safetensors")
    assert len(check_vllm(tmp_path)) == 3
    (tmp_path / "adapter_model.safetensors").unlink()
    assert "no adapter_model" in check_vllm(tmp_path)[-1]


def test_model_card_front_matter_and_tokenizer(folder, tmp_path):
    run = Run.model_validate(
        {
            "name": "card",
            "model": {"path": "builtin:tiny"},
            "data": {"train": [{"path": "corpus.jsonl"}]},
            "train": {"steps": 3},
        }
    )
    record = RunRecord(
        name="card",
        status="done",
        config=run.resolved(),
        config_hash=run.digest(),
        steps=3,
        tokens=1234,
        base={"eval_loss": 3.0},
        eval={"eval_loss": 2.5},
        versions={"torch": "2"},
    )
    write_model_card(tmp_path, record, tokenizer())
    text = (tmp_path / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["base_model"] == "builtin:tiny"
    assert front["datasets"] == ["corpus.jsonl"]
    assert front["tags"] == ["rayft", "sft", "lora"]
    assert "| eval_loss | 3 | 2.5 |" in text and "1,234 trained tokens" in text
    assert AutoTokenizer.from_pretrained(tmp_path)("b")["input_ids"] == [98]


def test_pad_falls_back_to_end_of_text_and_template_can_be_given(folder, tmp_path):
    (tmp_path / "own.jinja").write_text("{{ messages[0].content }}!")
    for template in ("{{ messages[0].content }}!", str(tmp_path / "own.jinja")):
        tokens = load_tokenizer(ModelSpec(path=str(folder), chat_template=template))
        assert tokens.pad_token_id == tokens.eos_token_id == 0
        chat = [{"role": "user", "content": "hi"}]
        assert tokens.apply_chat_template(chat, tokenize=False) == "hi!"
    with pytest.raises(ConfigError, match="chat_template"):
        load_tokenizer(ModelSpec(path=str(folder), chat_template="no-such-file.jinja"))


def test_only_safetensors_and_only_what_exists(tmp_path):
    llama().config.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    for path, words in (
        (tmp_path, "only .bin files"),
        (tmp_path / "missing", "no such folder"),
        ("builtin:huge", "builtin:tiny"),
    ):
        with pytest.raises(ConfigError, match=words) as error:
            load_model(ModelSpec(path=str(path)), device="cpu", seed=0)
        assert len(str(error.value).splitlines()) <= 15


def test_random_init_is_the_seed_alone(folder):
    spec = ModelSpec(path=str(folder), init="random")
    one = load_model(spec, device="cpu", seed=1).lm_head.weight
    torch.manual_seed(99)
    state = torch.get_rng_state()
    two = load_model(spec, device="cpu", seed=1).lm_head.weight
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one, two)
    assert not torch.equal(one, load_model(spec, device="cpu", seed=2).lm_head.weight)


def test_loaded_models_are_frozen_and_cacheless(folder):
    model = load_model(
        ModelSpec(path=str(folder)), device="cpu", seed=0, gradient_checkpointing=True
    )
    assert not any(param.requires_grad for param in model.parameters())
    assert model.config.use_cache is False
    assert model.is_gradient_checkpointing


def test_a_tokenizer_larger_than_the_embedding_is_refused():
    tokens = tokenizer()
    check_vocabulary(llama(), tokens)
    tokens.add_tokens([f"<extra{i}>" for i in range(VOCAB)])
    with pytest.raises(ConfigError, match="embeds 160"):
        check_vocabulary(llama(), tokens)


def test_generation_of_a_batch_equals_one_by_one(folder):
    spec = ModelSpec(path=str(folder))
    model, tokens = load_model(spec, device="cpu", seed=0), load_tokenizer(spec)
    model.train()
    prompts = ["hello", "a much longer prompt", "x"]
    together = generate(model, tokens, prompts, max_new_tokens=5)
    alone = [generate(model, tokens, [prompt], max_new_tokens=5)[0] for prompt in prompts]
    assert together == alone
    assert model.training
    assert generate(model, tokens, [], max_new_tokens=5) == []
