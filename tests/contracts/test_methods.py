"""Every method through the same suite, on every base it can train."""

from __future__ import annotations

import hashlib
from typing import get_args

import pytest
import torch
from peft import PeftModel

from rayft.config.methods import FullSpec, LoraSpec, MethodSpec
from rayft.config.run import ModelSpec
from rayft.core.errors import ConfigError, StorageError
from rayft.methods import IMPLEMENTATIONS, apply_all, build, build_all
from rayft.models.load import load_model, model_facts
from rayft.models.policy import CausalPolicy
from tests.small import batch, llama, saved_llama

BASES = ["fp32", "bf16", "int8", "nf4"]
ROWS = {
    "full": (FullSpec(), ["fp32", "bf16"]),
    "lora": (LoraSpec(rank=4, alpha=8), BASES),
    "lora+": (LoraSpec(rank=4, targets=("q_proj", "v_proj"), lr_ratio=16), BASES),
    "rslora-regex": (LoraSpec(rank=4, targets=r".*\.mlp\..*_proj", rslora=True), BASES),
    "dora": (LoraSpec(rank=4, dora=True), ["fp32", "bf16", "nf4"]),
}
# 4-bit layers are made under either answer to what the CPU can do (see tests/conftest.py)
READINGS = {"nf4": (0, 1)}
CASES = [
    (name, base, reading)
    for name, (_, bases) in ROWS.items()
    for base in bases
    for reading in READINGS.get(base, (None,))
]
on_every_base = pytest.mark.parametrize(
    ("name", "base", "cpu_reading"),
    CASES,
    indirect=["cpu_reading"],
    ids=["-".join(str(part) for part in case if part is not None) for case in CASES],
)


def model_spec(folder, base: str) -> ModelSpec:
    quant = base if base in ("int8", "nf4") else "none"
    return ModelSpec(path=str(folder), quant=quant, dtype="bf16" if base == "bf16" else "fp32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved_llama(tmp_path_factory.mktemp("base"))


def logits(model) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=batch().input_ids, use_cache=False).logits


def step(model, groups, lr: float = 1e-2) -> None:
    """Two AdamW steps: LoRA's A has no gradient while B is zero."""
    policy, rows, scale = CausalPolicy(model), batch(), torch.full((3,), 0.05)
    params = [{"params": group.params, "lr": lr} for group in groups]
    optimizer = torch.optim.AdamW(params, weight_decay=0.0)
    for _ in range(2):
        (policy.row_nll(rows, scale) * scale).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def digest(tensors) -> str:
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def trained(model) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def test_every_spec_of_the_menu_has_its_implementation_and_a_row():
    menu = set(get_args(get_args(MethodSpec)[0]))
    assert menu == set(IMPLEMENTATIONS) == {type(spec) for spec, _ in ROWS.values()}


@on_every_base
def test_only_declared_parameters_move(name, base, cpu_reading, folder):
    method = build(ROWS[name][0])
    model = load_model(model_spec(folder, base), device="cpu", seed=0)
    originals = list(model.parameters())
    before = digest(originals)
    clean = logits(model)
    groups = apply_all(model, [method], seed=3)
    declared = [param for group in groups for param in group.params]
    assert all(group.params for group in groups)
    assert len({id(param) for param in declared}) == len(declared)
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in declared}
    start = [param.detach().clone() for param in declared]
    step(model, groups)
    moved = [not torch.equal(old, new) for old, new in zip(start, declared, strict=True)]
    assert all(moved)
    assert (digest(originals) == before) == ROWS[name][0].keeps_base
    if ROWS[name][0].keeps_base:
        assert not torch.equal(logits(model), clean)
        with method.off(model):
            assert torch.equal(logits(model), clean)
        assert not torch.equal(logits(model), clean)
        assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in declared}
    else:
        with pytest.raises(ConfigError, match="no base"):
            method.off(model)


@on_every_base
def test_export_reopens_to_the_same_logits(name, base, cpu_reading, folder, tmp_path):
    method = build(ROWS[name][0])
    spec = model_spec(folder, base)
    model = load_model(spec, device="cpu", seed=0)
    step(model, apply_all(model, [method], seed=3))
    expected = logits(model)
    method.export(model, trained(model), tmp_path / "export")
    if name == "full":
        again = load_model(
            spec.model_copy(update={"path": str(tmp_path / "export")}), device="cpu", seed=0
        )
        assert torch.equal(logits(again), expected)
        return
    plain = load_model(spec, device="cpu", seed=0)
    by_peft = PeftModel.from_pretrained(plain, str(tmp_path / "export"))
    assert torch.equal(logits(by_peft), expected)


@pytest.mark.parametrize("tied", [True, False])
def test_full_export_knows_tied_weights_and_masters(tied, tmp_path):
    """The state holds float32 masters of a bf16 model, and a tied weight once."""
    method = build(FullSpec())
    base = saved_llama(tmp_path / "base", tied=tied)
    model = load_model(model_spec(base, "bf16"), device="cpu", seed=0)
    step(model, apply_all(model, [method]))
    state = {name: tensor.float() for name, tensor in trained(model).items()}
    assert ("lm_head.weight" in state) != tied
    method.export(model, state, tmp_path / "export")
    spec = model_spec(tmp_path / "export", "bf16")
    again = load_model(spec, device="cpu", seed=0)
    assert torch.equal(logits(again), logits(model))
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("spec", [FullSpec(), LoraSpec(rank=2)], ids=["full", "lora"])
def test_export_refuses_what_was_not_gathered(spec, tmp_path):
    method, model = build(spec), llama()
    apply_all(model, [method])
    whole = trained(model)
    first = sorted(whole)[0]
    with pytest.raises(StorageError):
        method.export(model, whole | {first: torch.empty(0)}, tmp_path / "empty")
    del whole[first]
    with pytest.raises(StorageError, match="has no"):
        method.export(model, whole, tmp_path / "missing")


@pytest.mark.parametrize("spec", [LoraSpec(rank=4), LoraSpec(rank=3, alpha=7.5, rslora=True)])
def test_deltas_are_what_the_adapters_add(spec):
    model, method = llama(), build(spec)
    before = {name: param.clone() for name, param in model.named_parameters()}
    groups = apply_all(model, [method])
    for param in groups[1].params:
        torch.nn.init.normal_(param, std=0.05)
    deltas = {delta.name: delta for delta in method.deltas(model)}
    method.merge(model)  # through peft
    after = dict(model.named_parameters())
    assert len(deltas) == 2 * 7 and before.keys() == after.keys()
    for name, delta in deltas.items():
        assert delta.shape == tuple(before[name].shape)
        left, right = delta.factors()
        torch.testing.assert_close(after[name], before[name] + delta.dense())
        torch.testing.assert_close(left @ right, delta.dense())
        torch.testing.assert_close(delta.norm_sq(), delta.dense().square().sum())
    assert list(build(LoraSpec(dora=True)).deltas(llama())) == []
    assert spec.deltas and not LoraSpec(dora=True).deltas


def test_methods_are_applied_by_site():
    kinds = [type(one).__name__ for one in build_all((LoraSpec(), FullSpec()))]
    assert kinds == ["Full", "Lora"]


@pytest.mark.parametrize("name", ROWS)
def test_merging_gives_the_same_logits(name):
    spec = ROWS[name][0]
    model, method = llama(), build(spec)
    step(model, apply_all(model, [method]))
    expected = logits(model)
    if not spec.merges:
        with pytest.raises(ConfigError, match="nothing to merge"):
            method.merge(model)
        return
    method.merge(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    assert not any("lora" in key for key in model.state_dict())


def test_adapters_are_fp32_on_a_bf16_base_and_do_not_depend_on_global_state(folder):
    spec = model_spec(folder, "bf16")
    first, second = (load_model(spec, device="cpu", seed=0) for _ in range(2))
    torch.manual_seed(1)
    apply_all(first, [build(LoraSpec(rank=4))], seed=5)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    apply_all(second, [build(LoraSpec(rank=4))], seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    one, two = trained(first), trained(second)
    assert {tensor.dtype for tensor in one.values()} == {torch.float32}
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (("q_proj", "qproj"), ["'qproj' matches no layer", "down_proj", "v_proj"]),
        (r"nothing\.here", ["matches no layer", "q_proj"]),
        (("self_attn",), ["LlamaAttention", "q_proj"]),
        (("embed_tokens",), ["Embedding"]),
        (("lm_head",), ["embedding", "targets"]),
    ],
)
def test_targets_that_cannot_be_meant_are_refused(targets, words):
    with pytest.raises(ConfigError) as error:
        apply_all(llama(tied=True), [build(LoraSpec(targets=targets))])
    assert all(word in str(error.value) for word in words)


def test_all_linear_is_all_but_the_head():
    model = llama()
    groups = apply_all(model, [build(LoraSpec(rank=2))])
    names = {name for name, param in model.named_parameters() if param.requires_grad}
    assert len(groups[0].params) == len(groups[1].params) == 2 * 7
    assert not any("lm_head" in name for name in names)


def test_full_refuses_a_quantised_base(folder):
    model = load_model(model_spec(folder, "nf4"), device="cpu", seed=0)
    with pytest.raises(ConfigError, match="quantised"):
        apply_all(model, [build(FullSpec())])


def test_dora_refuses_an_int8_base(folder):
    model = load_model(model_spec(folder, "int8"), device="cpu", seed=0)
    with pytest.raises(ConfigError, match="int8"):
        apply_all(model, [build(LoraSpec(dora=True))])


def test_methods_that_claim_the_same_parameters_are_refused():
    with pytest.raises(ConfigError, match="2 times"):
        apply_all(llama(), [build(LoraSpec()), build(LoraSpec())])
    with pytest.raises(ConfigError, match="trained twice"):
        apply_all(llama(), [build(LoraSpec()), build(FullSpec())])


def test_facts_count_quantised_weights_in_full(folder):
    counts = {
        base: model_facts(load_model(model_spec(folder, base), device="cpu", seed=0)).total
        for base in BASES
    }
    expected = sum(param.numel() for param in llama().parameters())
    assert counts == dict.fromkeys(BASES, expected)


def test_full_decays_matrices_only():
    model = llama(attention_bias=True)
    groups = {group.name: group for group in apply_all(model, [build(FullSpec())])}
    names = {id(param): name for name, param in model.named_parameters()}
    held = {key: {names[id(param)] for param in group.params} for key, group in groups.items()}
    assert {key: group.decay for key, group in groups.items()} == {"decay": True, "no_decay": False}
    vectors = {name for name, param in model.named_parameters() if param.ndim < 2}
    assert any("norm" in name for name in vectors) and any("bias" in name for name in vectors)
    assert held == {"decay": set(names.values()) - vectors, "no_decay": vectors}
