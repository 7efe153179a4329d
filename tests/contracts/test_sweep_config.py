"""The sweep block: trials made of a space, mistakes in it with their lines, and its rules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from rayft.cli import app
from rayft.config import rules
from rayft.config.load import load
from rayft.config.parse import parse
from rayft.config.run import Run
from rayft.config.schema import schema
from rayft.config.space import applied, params_of, perturbable
from rayft.config.sweep import Domain, SweepSpec
from rayft.config.sweep_rules import SWEEP_RULES, metrics
from rayft.core.errors import ConfigError

BASE = """\
name: small
model: {path: builtin:tiny}
methods: [{kind: lora, rank: 8}]
data: {train: [{path: a.jsonl, task: one}], eval: [{path: b.jsonl, task: two}]}
train: {steps: 90, eval_every: 10}
sweep:
  trials: 8
  space:
    methods.0.rank: {choice: [4, 8]}
    optim.lr: {loguniform: [1e-5, 1e-3]}
    pair: {paired: [{methods.0.alpha: 8, optim.clip: null}, {methods.0.alpha: 16, optim.clip: 1}]}
"""


def write(tmp_path: Path, text: str = BASE) -> Path:
    path = tmp_path / "sweep.yaml"
    path.write_text(text)
    return path


def refusal(source: Any, *overrides: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load(source, overrides)
    assert len(str(caught.value).splitlines()) <= 15
    return caught.value


def base(**changes: Any) -> Run:
    """The base, its sections merged with `changes`; no rule is asked."""
    data = parse(BASE, "base").data
    for name, value in changes.items():
        data[name] = data[name] | value if isinstance(value, dict) and name in data else value
    return Run.model_validate(data)


# --- trials --------------------------------------------------------------------------------------


def test_a_trial_is_a_run_with_its_params_and_nothing_else_changed(tmp_path: Path) -> None:
    run = load(write(tmp_path))
    picks = {"methods.0.rank": 4, "optim.lr": 3e-4, "pair": {"methods.0.alpha": 8, "optim.clip": 2}}
    params = params_of(run.sweep.space, picks)
    assert params == {
        "methods.0.rank": 4, "optim.lr": 3e-4, "methods.0.alpha": 8, "optim.clip": 2,
    }  # fmt: skip
    trial = applied(run, params, name="t0001", storage="s3://b/trials")
    expected = run.resolved() | {"name": "t0001", "storage": "s3://b/trials", "sweep": None}
    expected["methods"][0] |= {"rank": 4, "alpha": 8.0}
    expected["optim"] |= {"lr": 3e-4, "clip": 2.0}
    assert trial.resolved() == expected
    assert applied(run, {}).name == "small"
    assert load(trial) == trial


def test_sweep_steps_are_the_trials_and_put_epochs_aside() -> None:
    run = base(train={"steps": None, "epochs": 2.0}, sweep={"steps": 30})
    assert (applied(run, {}).train.steps, applied(run, {}).train.epochs) == (30, None)
    run = base(train={"steps": None, "epochs": 2.0})
    assert (applied(run, {}).train.steps, applied(run, {}).train.epochs) == (None, 2.0)


@pytest.mark.parametrize(
    ("params", "said", "where"),
    [
        ({"methods.0.rank": 0}, "methods.0.rank must be 1 or more, not 0", "methods.0.rank=0"),
        ({"methods.0.rank": True}, "must be a number, not true", "methods.0.rank=True"),
        ({"optim.lrr": 1}, "optim.lrr is not a key; did you mean optim.lr?", "optim.lrr=1"),
        ({"methods.7.rank": 1}, "methods has 1 entry", "methods.7.rank=1"),
        ({"methods": "full", "model.quant": "nf4"}, "full fine-tuning trains", "model.quant=nf4"),
        ({"train.eval_every": 5, "data.eval": []}, "nothing to evaluate", "train.eval_every=5"),
    ],
)
def test_a_sample_that_cannot_be_names_path_and_value(
    params: dict[str, Any], said: str, where: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        applied(base(), params, name="t0007")
    assert said in caught.value.what
    assert caught.value.where == where


def test_short_forms_and_whole_sections_can_be_params() -> None:
    trial = applied(base(), {"methods": ["full"], "strategy": "zero2"})
    assert trial.methods[0].kind == "full"
    assert trial.strategy.model_dump()["stage"] == 2


@pytest.mark.parametrize("more", [{}, {"optim.lr": {"uniform": [0.1, 1]}}])
def test_a_space_without_one_valid_combination_is_refused(more: dict[str, Any]) -> None:
    data = base().resolved()
    data["model"]["quant"] = "nf4"
    data["sweep"]["space"] = more | {"methods": {"choice": ["full", ["full", "lora"]]}}
    said = refusal(data).what
    assert "no combination of sweep.space makes a valid config" in said
    assert "full fine-tuning trains the weights" in said
    data["sweep"]["space"]["methods"]["choice"].append("lora")
    assert load(data).sweep is not None


# --- what is written -----------------------------------------------------------------------------


@pytest.mark.parametrize("with_sweep", [True, False])
def test_a_resolved_config_loads_as_the_same_run(tmp_path: Path, with_sweep: bool) -> None:
    run = load(write(tmp_path), [] if with_sweep else ["sweep=null"])
    assert (run.sweep is not None) == with_sweep
    assert load(run) == run
    assert load(run.resolved()) == run
    again = tmp_path / "again.yaml"
    again.write_text(CliRunner().invoke(app, ["check", str(tmp_path / "sweep.yaml")]).stdout)
    assert load(again, [] if with_sweep else ["sweep=null"]) == run


@pytest.mark.parametrize(
    ("override", "name", "domain"),
    [
        ("sweep.space.optim.lr={uniform: [1e-4, 1]}", "optim.lr", {"uniform": [1e-4, 1.0]}),
        ("sweep.space.optim.lr.loguniform.0=1e-6", "optim.lr", {"loguniform": [1e-6, 1e-3]}),
        ("sweep.space.optim.warmup={choice: [0]}", "optim.warmup", {"choice": [0]}),
        ("sweep.space.seed.int=[0, 9]", "seed", {"int": [0, 9]}),
        ("sweep.space.methods.0.rank.choice.1=32", "methods.0.rank", {"choice": [4, 32]}),
    ],
)
def test_overrides_into_the_space(
    tmp_path: Path, override: str, name: str, domain: dict[str, Any]
) -> None:
    run = load(write(tmp_path), [override])
    assert run.resolved()["sweep"]["space"][name] == domain


def test_overrides_of_the_rest_of_the_block(tmp_path: Path) -> None:
    options = ["sweep.trials=5", "sweep.scheduler=none", "sweep.search=random", "sweep.pack=off"]
    sweep = load(write(tmp_path), options).sweep
    assert (sweep.trials, sweep.scheduler.kind, sweep.search.kind) == (5, "none", "random")
    assert sweep.pack == "off"
    bare = BASE[: BASE.index("sweep:")]
    sweep = load(write(tmp_path, bare), ["sweep.space.optim.lr={uniform: [1, 2]}"]).sweep
    assert sweep.paths() == ("optim.lr",)
    synonym = BASE.replace("trials: 8", "max_trials: 6")
    assert load(write(tmp_path, synonym)).sweep.trials == 6


RANK, LR = "{choice: [4, 8]}", "{loguniform: [1e-5, 1e-3]}"


@pytest.mark.parametrize(
    ("old", "new", "line", "said"),
    [
        (LR, "{logunifrom: [1, 2]}", 10, "there is no logunifrom (there are: choice, grid, uni"),
        (LR, "{logunifrom: [1, 2]}", 10, "did you mean loguniform?"),
        (LR, "{loguniform: [1, 2], choice: [1]}", 10, "exactly one of choice, grid, uniform, logu"),
        (LR, "{uniform: [2, 1]}", 10, "the low end must be below the high end, got [2.0, 1.0]"),
        (LR, "{loguniform: [0, 1]}", 10, "loguniform needs a low end above 0"),
        (LR, "{uniform: 3}", 10, "uniform takes two numbers, uniform: [low, high], not 3"),
        (LR, "{uniform: [1, 2, 3]}", 10, "uniform takes two numbers"),
        (LR, "{uniform: [a, 2]}", 10, "sweep.space.optim.lr.uniform.0 must be a number, not 'a'"),
        (LR, "{int: [1.5, 2]}", 10, "sweep.space.optim.lr.int.0 must be a whole number, not 1.5"),
        (LR, "{choice: small}", 10, "choice takes a list of values: choice: [small]"),
        (LR, "{choice: []}", 10, "must be a list of 1 or more"),
        (LR, "[1e-5, 1e-4]", 10, "{choice: [...]}"),
        (LR, "3e-4", 10, "a field that is not searched is set in the config itself"),
        (LR, "{}", 10, "give exactly one of choice, grid, uniform, loguniform, int, paired"),
        (RANK, "{choice: [4, 4]}", 9, "4 is listed twice"),
        (RANK, "{choice: [4, 0]}", 9, "methods.0.rank must be 1 or more, not 0"),
        (RANK, "{choice: [true]}", 9, "methods.0.rank must be a number, not true"),
        (RANK, "{choice: [\n      4,\n      big]}", 11, "must be a whole number, not 'big'"),
        (RANK, "{int: [0, 9]}", 9, "methods.0.rank must be 1 or more, not 0"),
        (RANK, "{uniform: [4, 64]}", 9, "methods.0.rank takes no fractions"),
        ("methods.0.rank:", "methods.0.ranks:", 9, "did you mean methods.0.rank?"),
        ("optim.lr:", "lr:", 10, "did you mean optim.lr?"),
        ("optim.lr: " + LR, "optim: {lr: {choice: [1]}}", 10, "named by its whole path"),
        ("optim.lr: " + LR, "scale.workers: {choice: [1, 2]}", 10, "where trials run"),
        ("optim.lr: " + LR, "data.eval.0.samples: {choice: [1, 2]}", 10, "the same held-out rows"),
        ("optim.lr: " + LR, "train.keep: {choice: [2, 3]}", 10, "train.keep cannot be searched"),
        ("optim.lr: " + LR, "methods.0.alpha: {choice: [1]}", 11, "is searched twice"),
        ("optim.lr: " + LR, "methods: {choice: [full]}", 10, "methods.0.rank lies inside methods"),
        ("methods.0.alpha: 16", "methods.0.alphas: 16", 11, "must set the same fields"),
        ("methods.0.alpha: 16", "methods.0.alpha: -1", 11, "methods.0.alpha must be above 0"),
    ],
)
def test_a_mistake_in_the_space_has_its_line_and_a_sentence(
    tmp_path: Path, old: str, new: str, line: int, said: str
) -> None:
    assert old in BASE
    path = write(tmp_path, BASE.replace(old, new))
    error = refusal(path)
    assert said in error.what, str(error)
    assert error.where == f"{path}:{line}" or f"{path}:{line}:" in error.what, str(error)


def test_an_empty_space_says_what_to_write(tmp_path: Path) -> None:
    for empty in ("{}", ""):
        text = BASE[: BASE.index("    methods.0.rank:")].replace("space:", f"space: {empty}")
        error = refusal(write(tmp_path, text))
        assert "name at least one field, e.g. optim.lr: {loguniform" in error.what
        assert error.where.endswith("sweep.yaml:8")


def test_check_prints_what_the_sweep_will_do_and_stays_yaml(tmp_path: Path) -> None:
    def check(*more: str) -> str:
        done = CliRunner().invoke(app, ["check", str(write(tmp_path)), *more])
        assert done.exit_code == 0, done.output
        return done.stdout.splitlines()[-1]

    assert check() == "# sweep: 8 trials of at most 90 steps, optuna, asha"
    assert check("sweep.steps=40") == "# sweep: 8 trials of at most 40 steps, optuna, asha"
    assert check("sweep.trials=1", "train.steps=null", "train.epochs=2", "sweep.search=random") == (
        "# sweep: 1 trial of at most 2 epochs, random, asha"
    )
    assert "sweep" in check("sweep=null") and "# sweep" not in check("sweep=null")


def test_the_schema_says_what_people_write() -> None:
    found = schema()["$defs"]["Domain"]
    assert list(found["properties"]) == ["choice", "grid", "uniform", "loguniform", "int", "paired"]
    assert all(entry["description"] for entry in found["properties"].values())
    sweep = schema()["$defs"]["SweepSpec"]["properties"]
    assert all(entry["description"] for entry in sweep.values())


def test_a_wide_range_of_whole_numbers_is_not_listed() -> None:
    domain = Domain.model_validate({"int": [1, 10**12]})
    assert len(domain.values or ()) == 10**12
    spec = SweepSpec.model_validate({"space": {"seed": domain, "a": {"choice": [1, 2]}}})
    assert spec.combinations == 2 * 10**12


# --- rules ---------------------------------------------------------------------------------------

GRID = {"space": {"methods.0.rank": {"grid": [4, 8]}, "methods.0.alpha": {"choice": [1, 2, 3]}}}
ENDLESS = {"trials": None, "search": {"kind": "grid"}}
PBT = {"scheduler": {"kind": "pbt"}, "search": {"kind": "random"}}
RANKS = {"methods.0.rank": {"choice": [4, 8]}}
NONE = {"kind": "none"}
ONE = {"train": [{"path": "a"}], "eval": [{"path": "b"}]}

# (part of the sentence, what it fires on, neighbours it must not fire on)
CASES: list[tuple[str, dict[str, Any], list[dict[str, Any]]]] = [
    (
        "nothing to evaluate on; name held-out",
        {"data": {"eval": []}, "train": {"eval_every": None}, "sweep": {"scheduler": NONE}},
        [{"train": {"eval_every": None}, "sweep": {"scheduler": NONE}}],
    ),
    (
        "no evaluation of this run logs eval_loss/one",
        {"sweep": {"metric": "eval_loss/one"}},
        [{"sweep": {"metric": "eval_loss/two"}}, {"sweep": {"metric": "eval_ppl"}}],
    ),
    ("logs eval_loss/default", {"data": ONE, "sweep": {"metric": "eval_loss/default"}}, []),
    (
        "asha decides at evaluations",
        {"train": {"eval_every": None}},
        [
            {"train": {"eval_every": None}, "sweep": {"scheduler": {"kind": "none"}}},
            {
                "train": {"eval_every": None},
                "sweep": {"space": {"train.eval_every": {"choice": [5, 9]}}},
            },
        ],
    ),
    (
        "asha would first decide at step 90, and a trial has 90",
        {"train": {"eval_every": 90}},
        [{"train": {"eval_every": 89}}, {"sweep": {"scheduler": {"kind": "asha", "grace": 50}}}],
    ),
    (
        "pbt would first decide at step 40, and a trial has 40; lower sweep.scheduler.every",
        {"sweep": {**PBT, "steps": 40, "scheduler": {"kind": "pbt", "every": 40}}},
        [{"sweep": {**PBT, "steps": 41, "scheduler": {"kind": "pbt", "every": 40}}}],
    ),
    (
        "sweep.scheduler.grace: 5 comes before the first evaluation",
        {"sweep": {"scheduler": {"kind": "median", "grace": 5}}},
        [{"sweep": {"scheduler": {"kind": "median", "grace": 10}}}],
    ),
    (
        "median compares with 8 other trials",
        {"sweep": {"scheduler": {"kind": "median", "least": 8}}},
        [{"sweep": {"scheduler": {"kind": "median", "least": 7}}}],
    ),
    (
        "as methods.0.rank: grid asks",
        {"sweep": GRID | {"trials": 6}},
        [{"sweep": GRID | {"trials": 6, "search": {"kind": "random"}}}],
    ),
    (
        "a grid tries every value, and optim.lr is a range",
        {"sweep": {"search": {"kind": "grid"}}},
        [{"sweep": {"search": {"kind": "grid"}, "space": {"seed": {"int": [1, 9]}}}}],
    ),
    (
        "trials: 7, but the grid has 6 combinations",
        {"sweep": GRID | {"trials": 7, "search": {"kind": "grid"}}},
        [{"sweep": GRID | {"trials": trials, "search": {"kind": "grid"}}} for trials in (6, None)],
    ),
    (
        "a grid of 2,000,000 combinations",
        {"sweep": ENDLESS | {"space": {"seed": {"int": [1, 2_000_000]}}}},
        [{"sweep": ENDLESS | {"space": {"seed": {"int": [1, 1_000_000]}}}}],
    ),
    ("behind optuna's back", {"sweep": PBT | {"search": {"kind": "optuna"}}}, [{"sweep": PBT}]),
    (
        "nothing in sweep.space can change then",
        {"sweep": PBT | {"space": RANKS}},
        [{"sweep": PBT | {"space": RANKS | {"methods.0.dropout": {"uniform": [0, 0.5]}}}}],
    ),
    ("there is one trial", {"sweep": PBT | {"trials": 1}}, [{"sweep": PBT | {"trials": 2}}]),
    (
        "sets the length of every trial",
        {"sweep": {"steps": 50, "space": {"train.steps": {"choice": [60, 70]}}}},
        [{"sweep": {"space": {"train.steps": {"choice": [60, 70]}}}}],
    ),
    (
        "50 steps would never end within sweep.steps: 50",
        {"optim": {"warmup": 50}, "sweep": {"steps": 50}},
        [{"optim": {"warmup": 50}}, {"optim": {"warmup": 0.5}, "sweep": {"steps": 50}}],
    ),
    (
        "refit trains the winner for train.steps: 90",
        {"sweep": {"refit": True, "steps": 91}},
        [{"sweep": {"refit": True, "steps": 90}}, {"sweep": {"steps": 91}}],
    ),
    (
        "the space varies seed",
        {"sweep": {"seeds": 3, "space": {"seed": {"int": [0, 9]}}}},
        [{"sweep": {"seeds": 3}}, {"sweep": {"space": {"seed": {"int": [0, 9]}}}}],
    ),
    (
        "sweep.pack: off makes none",
        {"sweep": {"pack": "off", "packs": 2}},
        [{"sweep": {"pack": "off"}}, {"sweep": {"packs": 2, "slots": 3}}],
    ),
    ("a sweep runs on Ray", {"scale": {"workers": 0}}, [{"scale": {"workers": 1}}]),
]


@pytest.mark.parametrize(("said", "wrong", "fine"), CASES, ids=[case[0][:40] for case in CASES])
def test_a_rule_fires_on_its_example_and_not_beside_it(
    said: str, wrong: dict[str, Any], fine: list[dict[str, Any]]
) -> None:
    found = rules.fired(base(**wrong))
    assert len([sentence for sentence in found if said in sentence]) == 1, found
    assert all(len(sentence) <= 200 and ";" in sentence for sentence in found), found
    for neighbour in fine:
        assert rules.fired(base(**neighbour)) == []


def test_every_rule_has_an_example_and_is_seen_by_load_and_refuse(tmp_path: Path) -> None:
    fired = {rule for _, wrong, _ in CASES for rule in rules.matching(base(**wrong))}
    assert fired == set(SWEEP_RULES)
    error = refusal(write(tmp_path), "scale.workers=0")
    assert error.where == "override scale.workers=0"
    assert refusal(write(tmp_path), "train.eval_every=null").where == f"{tmp_path}/sweep.yaml:6"
    with pytest.raises(ConfigError, match="a sweep runs on Ray"):
        rules.refuse(base(scale={"workers": 0}))
    assert rules.fired(base(scale={"workers": 0}, sweep=None)) == []


def test_names_of_metrics_and_of_what_may_change_on_the_way() -> None:
    assert metrics(base()) == ("eval_loss", "eval_ppl", "eval_loss/two", "eval_ppl/two")
    assert metrics(base(data=ONE)) == ("eval_loss", "eval_ppl")
    assert [perturbable(path) for path in ("optim.lr", "methods.2.alpha")] == [True, True]
    wrong = ("methods.0.rank", "optim.betas", "methods.alpha", "optim.lr.0", "alpha")
    assert not any(map(perturbable, wrong))


@pytest.mark.parametrize(
    ("changes", "digest"),
    [
        ({}, "1f70ccea0f5ac9f4"),
        ({"scheduler": {"kind": "asha", "grace": 20}}, "ebfed69725f4e5c0"),
        ({"scheduler": "pbt", "search": "random"}, "34c7cfe64de12d7b"),
    ],
)
def test_a_sweep_begun_before_a_field_existed_can_be_continued(changes, digest) -> None:
    """The digests of the last commit without search.prior and scheduler.promote."""
    given = {
        "name": "a",
        "model": "builtin:tiny",
        "methods": [{"kind": "lora"}],
        "data": {"train": "a.jsonl", "eval": ["b.jsonl"]},
        "train": {"steps": 100, "eval_every": 10},
        "sweep": {"trials": 4, "space": {"optim.lr": {"choice": [1e-3, 1e-4]}}, **changes},
    }
    assert load(given).sweep_digest() == digest
    if changes.get("scheduler") != "pbt":
        asha = {"kind": "asha", "promote": True}
        given["sweep"] |= {"scheduler": asha}
        assert load(given).sweep_digest() != digest
