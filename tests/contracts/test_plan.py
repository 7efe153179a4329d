"""Which trials may share a base: every field of the menu has its say."""

import pytest

from rayft.config.load import load
from rayft.config.run import Run
from rayft.trials.plan import default_slots, pack_key, why_not_packed

BASE = {
    "name": "a",
    "model": "builtin:tiny",
    "methods": [{"kind": "lora"}],
    "data": {"train": "builtin:docstrings", "eval": [{"path": "b.jsonl"}], "max_length": 64},
    "train": {"steps": 10, "eval_every": 5},
    "scale": {"gpus": 0},
}
# Another value for every field that may differ in a pack, and for every field that may not.
FREE = {
    "name": "b",
    "seed": 1,
    "storage": "elsewhere",
    "trackers": ["tensorboard"],
    "sweep": {"space": {"optim.lr": {"choice": [1e-3, 1e-4]}}},
    "methods.0.rank": 4,
    "methods.0.alpha": 3,
    "methods.0.dropout": 0.1,
    "methods.0.rslora": True,
    "methods.0.dora": True,
    "methods.0.lr_ratio": 4,
    "data.cache": "cache",
    "optim.lr": 1e-5,
    "optim.betas": [0.8, 0.9],
    "optim.eps": 1e-6,
    "optim.weight_decay": 0.1,
    "optim.schedule": "linear",
    "optim.warmup": 0.2,
    "optim.min_lr_ratio": 0.1,
    "optim.clip": 2.0,
    "train.steps": 20,
    "train.epochs": None,
    "train.global_batch": 8,
    "train.micro_batch": 2,
    "train.eval_every": 2,
    "train.eval_batch": 3,
    "train.save_every": 5,
    "train.keep": 3,
    "train.log_every": 2,
    "scale.cpus": 2,
    "scale.gpus": 1,
    "scale.placement": "SPREAD",
    "scale.resources": {"x": 1},
    "scale.retries": 1,
    "scale.workers": 2,  # alone anyway
}
SHARED = {
    "model.path": "other",
    "model.revision": "main",
    "model.tokenizer": "other",
    "model.chat_template": "{{ messages }}",
    "model.dtype": "bf16",
    "model.quant": "nf4",
    "model.double_quant": False,
    "model.attention": "eager",
    "model.trust_remote_code": True,
    "model.init": "random",
    "methods.0.kind": None,  # one kind packs
    "methods.0.targets": ["q_proj"],
    "objective.kind": "lm",
    "objective.train_on_prompt": True,
    "penalties": None,  # there are none yet
    "data.train": "builtin:pydocs",
    "data.eval": [{"path": "c.jsonl"}],
    "data.max_length": 32,
    "data.packing": True,
    "data.overflow": "drop",
    "data.bad_rows": 0.5,
    "optim.kind": "adamw_8bit",
    "train.gradient_checkpointing": True,
    "train.precision": "fp32",
    "strategy.kind": "zero2",
}


def changed(path, value) -> Run:
    data = load(BASE).resolved()
    *outer, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    holder = data
    for key in outer:
        holder = holder[key]
    holder[last] = value
    return Run.model_validate(load(BASE).resolved()) if value is None else load_free(data)


def load_free(data) -> Run:
    """Validated, but without the rules: they are not what is tested."""
    if isinstance(data["data"]["train"], str):
        data["data"]["train"] = [{"path": data["data"]["train"]}]
    if data["objective"]["kind"] == "lm":
        data["objective"] = {"kind": "lm"}
    if data["strategy"].get("kind") == "zero2":
        data["strategy"] = {"kind": "zero", "stage": 2}
    return Run.model_validate(data)


def test_every_field_of_the_menu_is_listed():
    data, listed = load(BASE).resolved(), {*FREE, *SHARED}
    found = set()
    for name, value in data.items():
        if name in ("methods", "objective", "model", "data", "optim", "train", "scale", "strategy"):
            inner = value[0] if name == "methods" else value
            prefix = f"{name}.0" if name == "methods" else name
            found |= {f"{prefix}.{key}" for key in inner}
        else:
            found.add(name)
    assert found == listed


@pytest.mark.parametrize("path", [path for path in FREE if FREE[path] is not None])
def test_these_may_differ(path):
    assert pack_key(changed(path, FREE[path])) == pack_key(load(BASE))


@pytest.mark.parametrize("path", [path for path in SHARED if SHARED[path] is not None])
def test_these_must_not(path):
    assert pack_key(changed(path, SHARED[path])) != pack_key(load(BASE))


def test_fresh_weights_come_from_the_seed():
    one, two = (load(BASE, ["model.init=random", f"seed={seed}"]) for seed in (1, 2))
    assert pack_key(one) != pack_key(two)


def test_who_runs_alone():
    for path, value, word in (
        ("scale.workers", 2, "workers"),
        ("strategy.kind", "zero2", "zero"),
        ("optim.kind", "adamw_8bit", "8bit"),
        ("model.quant", "int8", "int8"),
    ):
        assert word in why_not_packed(changed(path, value))
    assert why_not_packed(load(BASE)) == ""
    assert "full" in why_not_packed(load(BASE, ["methods=[{kind: full}]"]))
    both = ["train.gradient_checkpointing=true", "methods.0.dropout=0.1"]
    assert why_not_packed(load(BASE, both)) == ""  # numerics/test_packed_equals_solo: recomputed


def test_slots_by_the_size_of_a_step():
    long = {"train.global_batch": 16, "data.max_length": 1024}
    small, large = (
        load(BASE, ["train.global_batch=4"]),
        load(BASE, [f"{k}={v}" for k, v in long.items()]),
    )
    assert default_slots(large, True) > default_slots(small, False) > default_slots(large, False)
