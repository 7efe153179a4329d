"""Every rule fires on its example, and not on the nearest config that is all right."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest

from rayft.config import rules
from rayft.config.load import load
from rayft.config.methods import MethodSpec
from rayft.config.run import Run
from rayft.config.support import kinds, method_table, methods, objective_table
from rayft.config.technique_rules import OBJECTIVE_RULES
from rayft.config.traits import MethodTraits, ObjectiveTraits, Reads, Site
from rayft.core.errors import ConfigError
from rayft.trials.plan import why_not_packed

BASE: dict[str, Any] = {
    "name": "rules",
    "model": {"path": "builtin:tiny"},
    "data": {"train": [{"path": "a.jsonl"}]},
    "train": {"steps": 100, "global_batch": 16},
}

LORA, FULL = {"kind": "lora"}, {"kind": "full"}
FLASH = {"path": "x", "attention": "flash_attention_2"}
HELD = {"train": [{"path": "a"}], "eval": [{"path": "a"}]}


def run(**sections: Any) -> Run:
    """BASE with sections merged into it; no rule is asked."""
    merged = {
        name: BASE[name] | value if isinstance(value, dict) and name in BASE else value
        for name, value in sections.items()
    }
    return Run.model_validate(BASE | merged)


# (part of the sentence, a run it fires on, neighbours it must not fire on)
CASES: list[tuple[str, dict[str, Any], list[dict[str, Any]]]] = [
    (
        "full fine-tuning trains the weights",
        {"methods": [FULL], "model": {"quant": "nf4"}},
        [{"methods": [FULL]}, {"methods": [LORA], "model": {"quant": "nf4"}}],
    ),
    (
        "full trains every weight",
        {"methods": [FULL, LORA]},
        [{"methods": [FULL]}, {"methods": [LORA]}],
    ),
    ("methods lists full twice", {"methods": [FULL, FULL]}, [{"methods": [FULL]}]),
    ("methods lists lora twice", {"methods": [LORA, LORA]}, [{"methods": [LORA]}]),
    (
        "dora cannot see the scales",
        {"methods": [LORA | {"dora": True}], "model": {"quant": "int8"}},
        [
            {"methods": [LORA | {"dora": True}], "model": {"quant": "nf4"}},
            {"methods": [LORA], "model": {"quant": "int8"}},
        ],
    ),
    (
        "are lost when they are read",
        {
            "methods": [LORA | {"dora": True}],
            "model": {"quant": "nf4"},
            "strategy": {"kind": "zero", "stage": 3},
        },
        [
            {
                "methods": [LORA | {"dora": True}],
                "model": {"quant": "nf4"},
                "strategy": {"kind": "zero", "stage": 2},
            },
            {"methods": [LORA | {"dora": True}], "strategy": {"kind": "zero", "stage": 3}},
            {
                "methods": [LORA],
                "model": {"quant": "nf4"},
                "strategy": {"kind": "zero", "stage": 3},
            },
        ],
    ),
    (
        "would freeze that noise",
        {"model": {"init": "random", "quant": "nf4"}},
        [{"model": {"init": "random"}}, {"model": {"quant": "nf4"}}],
    ),
    (
        "int8 weights cannot be sharded",
        {"model": {"quant": "int8"}, "strategy": {"kind": "zero", "stage": 3}},
        [
            {"model": {"quant": "int8"}, "strategy": {"kind": "zero", "stage": 2}},
            {"strategy": {"kind": "zero", "stage": 3}},
        ],
    ),
    (
        "computes in bf16 only",
        {"model": FLASH},
        [{"model": FLASH | {"dtype": "bf16"}}, {"model": FLASH, "train": {"precision": "bf16"}}],
    ),
    (
        "flash_attention_2 needs a GPU",
        {"model": FLASH | {"dtype": "bf16"}, "scale": {"gpus": 0}},
        [{"model": FLASH | {"dtype": "bf16"}, "scale": {"gpus": 1}}],
    ),
    (
        "packed rows one at a time",
        {"model": FLASH | {"dtype": "bf16"}, "data": {"packing": True}},
        [
            {
                "model": FLASH | {"dtype": "bf16"},
                "data": {"packing": True},
                "train": {"micro_batch": 1},
            },
            {"model": FLASH | {"dtype": "bf16"}},
            {"data": {"packing": True}},
        ],
    ),
    (
        "cannot win back",
        {"model": {"dtype": "bf16"}, "train": {"precision": "fp32"}},
        [{"model": {"dtype": "bf16"}}, {"train": {"precision": "bf16"}}],
    ),
    (
        "ZeRO would cut apart",
        {"optim": {"kind": "adamw_8bit"}, "strategy": {"kind": "zero", "stage": 1}},
        [{"optim": {"kind": "adamw_8bit"}}, {"strategy": {"kind": "zero", "stage": 1}}],
    ),
    (
        "both move optimizer state",
        {"optim": {"kind": "paged_adamw_8bit"}, "strategy": {"kind": "zero", "offload": "cpu"}},
        [{"strategy": {"kind": "zero", "offload": "cpu"}}],
    ),
    (
        "pages between GPU and CPU",
        {"optim": {"kind": "paged_adamw_8bit"}, "scale": {"gpus": 0}},
        [{"optim": {"kind": "paged_adamw_8bit"}}, {"scale": {"gpus": 0}}],
    ),
    (
        "would never end",
        {"optim": {"warmup": 100}},
        [{"optim": {"warmup": 99}}, {"optim": {"warmup": 0.5}, "train": {"steps": 1}}],
    ),
    (
        "a constant one does not",
        {"optim": {"schedule": "constant", "min_lr_ratio": 0.1}},
        [
            {"optim": {"schedule": "linear", "min_lr_ratio": 0.1}},
            {"optim": {"schedule": "constant"}},
        ],
    ),
    (
        "stage 0 shards nothing",
        {"strategy": {"kind": "zero", "stage": 0, "offload": "cpu"}},
        [{"strategy": {"kind": "zero", "stage": 1, "offload": "cpu"}}],
    ),
    (
        "belongs to ZeRO stage 3",
        {"strategy": {"kind": "zero", "stage": 2, "offload": "nvme", "nvme_path": "/n"}},
        [{"strategy": {"kind": "zero", "stage": 3, "offload": "nvme", "nvme_path": "/n"}}],
    ),
    (
        "needs strategy.nvme_path",
        {"strategy": {"kind": "zero", "stage": 3, "offload": "nvme"}},
        [{"strategy": {"kind": "zero", "stage": 3, "offload": "nvme", "nvme_path": "/n"}}],
    ),
    (
        "nothing goes there",
        {"strategy": {"kind": "zero", "nvme_path": "/n"}},
        [{"strategy": {"kind": "zero", "stage": 3, "offload": "nvme", "nvme_path": "/n"}}],
    ),
    (
        "not proven with DeepSpeed",
        {"scale": {"workers": [1, 2]}, "strategy": {"kind": "zero"}},
        [{"scale": {"workers": [1, 2]}}, {"scale": {"workers": 2}, "strategy": {"kind": "zero"}}],
    ),
    (
        "without a single row",
        {"train": {"global_batch": 4}, "scale": {"workers": 5}},
        [
            {"train": {"global_batch": 4}, "scale": {"workers": 4}},
            {"train": {"global_batch": 1, "micro_batch": 8}, "scale": {"workers": 0}},
        ],
    ),
    ("leave the rest idle", {"scale": {"gpus": 2}}, [{"scale": {"gpus": 1}}]),
    (
        "NCCL refuses",
        {"scale": {"gpus": 0.5, "workers": 2}},
        [{"scale": {"gpus": 0.5}}, {"scale": {"gpus": 0, "workers": 2}}],
    ),
    (
        "for custom resources",
        {"scale": {"resources": {"gpu": 1}}},
        [{"scale": {"resources": {"accelerator_type:H100": 0.1}}}],
    ),
    (
        "nothing to evaluate on",
        {"train": {"eval_every": 10}},
        [{"train": {"eval_every": 10}, "data": {"eval": [{"path": "b"}]}}],
    ),
    (
        "would mean nothing",
        {"data": HELD},
        [
            {"data": {"train": [{"path": "a"}], "eval": [{"path": "a", "split": "test"}]}},
            {"data": {"train": [{"path": "builtin:arith"}], "eval": [{"path": "builtin:arith"}]}},
        ],
    ),
]


@pytest.mark.parametrize(("said", "wrong", "fine"), CASES, ids=[case[0] for case in CASES])
def test_a_rule_fires_on_its_example_and_not_beside_it(
    said: str, wrong: dict[str, Any], fine: list[dict[str, Any]]
) -> None:
    found = rules.fired(run(**wrong))
    assert len([sentence for sentence in found if said in sentence]) == 1, found
    for neighbour in fine:
        assert rules.fired(run(**neighbour)) == []


class Pairs(ObjectiveTraits):
    """An objective of nobody's, told apart by what it says of itself alone."""

    reads: ClassVar[Reads] = "pair"
    reference: ClassVar[bool] = True
    row_packing: ClassVar[bool] = False
    kind: str = "pairs"


def of_pairs(**sections: Any) -> Run:
    return run(**sections).model_copy(update={"objective": Pairs()})


def test_an_objective_is_judged_by_its_traits() -> None:
    """No kind of the menu reads pairs yet: the rules for those that will are held by a toy."""
    packed = of_pairs(methods=[LORA], data={"packing": True})
    assert [rule.key for rule in rules.matching(packed)] == ["data.packing"]
    moved = of_pairs(methods=[FULL])
    assert [rule.key for rule in rules.matching(moved)] == ["objective"]
    assert all("pairs" in sentence for one in (packed, moved) for sentence in rules.fired(one))
    assert rules.fired(of_pairs(methods=[LORA])) == []
    assert "needs more than" in why_not_packed(of_pairs(methods=[LORA]))


class Everything(MethodTraits):
    """A method that trains all there is, under another name than full."""

    site: ClassVar[Site] = "weights"
    claims_all: ClassVar[bool] = True
    kind: str = "everything"


def test_a_method_is_judged_by_its_traits() -> None:
    both = run(methods=[LORA])
    both = both.model_copy(update={"methods": (*both.methods, Everything())})
    assert rules.fired(both) == [
        "everything trains every weight, so no method can stand beside it; keep either everything "
        "or the others"
    ]
    alone = both.model_copy(update={"methods": (Everything(),)})
    assert rules.fired(alone) == [] and "everything" in why_not_packed(alone)


def test_every_rule_has_an_example_and_a_key_that_exists() -> None:
    fired = {rule for _, wrong, _ in CASES for rule in rules.matching(run(**wrong))}
    assert fired == set(rules.RULES) - set(OBJECTIVE_RULES)  # those have a toy of their own
    base = run(strategy={"kind": "zero"}).resolved()
    for rule in rules.RULES:
        value: Any = base
        for key in rule.key.split("."):
            assert key in value, rule.key
            value = value[key]


def test_the_readme_has_the_tables_that_traits_and_rules_give() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    assert method_table() in readme and objective_table() in readme
    assert {one.kind for one in methods().values()} == {s().kind for s in kinds(MethodSpec)}


def test_sentences_are_short_filled_in_and_say_what_to_do() -> None:
    for _, wrong, _ in CASES:
        for sentence in rules.fired(run(**wrong)):
            assert "{" not in sentence
            assert len(sentence) <= 200
            assert ";" in sentence or "needs" in sentence


@pytest.mark.parametrize(
    "allowed",
    [
        {"methods": [LORA | {"dora": True, "rslora": True}]},
        {"model": {"init": "random"}, "methods": [LORA]},
        {"model": {"attention": "eager"}, "data": {"packing": True}},
        {"scale": {"workers": 0}, "strategy": {"kind": "zero", "stage": 3}},
        {"train": {"global_batch": 2, "micro_batch": 4}},
        {"model": {"quant": "nf4"}, "methods": [LORA], "strategy": {"kind": "zero", "stage": 2}},
        {"methods": [FULL], "strategy": {"kind": "zero", "stage": 3, "offload": "cpu"}},
    ],
)
def test_what_is_unusual_but_fine_is_allowed(allowed: dict[str, Any]) -> None:
    assert rules.fired(run(**allowed)) == []


def test_refuse_lists_all_that_fire() -> None:
    rules.refuse(run())
    one = run(**{"train": {"eval_every": 10}})
    with pytest.raises(ConfigError) as caught:
        rules.refuse(one)
    assert caught.value.where == "train.eval_every"
    two = run(methods=[FULL], model={"quant": "int8"}, strategy={"kind": "zero", "stage": 3})
    with pytest.raises(ConfigError) as caught:
        rules.refuse(two)
    assert str(caught.value).splitlines()[0] == "config error: 2 reasons to refuse"
    assert len(str(caught.value).splitlines()) == 3
    with pytest.raises(ConfigError, match="2 reasons to refuse in config"):
        load(two)
