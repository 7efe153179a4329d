"""The menu and its loader: round trips, unknown keys at every level, lines, overrides, speed."""

from __future__ import annotations

import difflib
import json
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
import jsonschema
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import AfterValidator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from rayft.config import rules
from rayft.config.base import Spec
from rayft.config.foreign_names import GONE, RENAMED
from rayft.config.load import load
from rayft.config.menu_tree import MenuPlace, every_field, place, under
from rayft.config.parse import dotted, dump, parse
from rayft.config.run import Run
from rayft.config.schema import schema
from rayft.config.sweep import Domain
from rayft.core.errors import ConfigError

ROOT = Path(__file__).parents[2]
SCHEMA = jsonschema.Draft202012Validator(schema())
EXPERIMENTS = sorted(p for p in (ROOT / "experiments").rglob("*.yaml"))

SMALL = """\
name: small
model: {path: builtin:tiny}
methods:
  - kind: lora
    rank: 8
data:
  train: [rows.jsonl]
optim:
  lr: 2e-4
train:
  steps: 10
"""


def specs(at: MenuPlace) -> set[type[Spec]]:
    found = set(at.specs.values()) | (specs(at.item) if at.item else set())
    for spec in at.specs.values():
        for name in spec.model_fields:
            found |= specs(under(spec, name))
    return found


SPECS = sorted(specs(place(Run)), key=lambda spec: spec.__name__)


def write(tmp_path: Path, text: str, name: str = "run.yaml") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


def refusal(source: Any, *overrides: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load(source, overrides)
    assert len(str(caught.value).splitlines()) <= 15
    return caught.value


# --- hypothesis: any Run the menu allows ---------------------------------------------------------


def values(info: FieldInfo) -> st.SearchStrategy[Any]:
    """Values of a field, within its bounds."""
    bounds: dict[str, Any] = {}
    for limit in info.metadata:
        match limit:
            case annotated_types.MinLen():
                bounds["min_length"] = limit.min_length
            case annotated_types.MaxLen():
                bounds["max_length"] = limit.max_length
            case annotated_types.Ge():
                bounds["ge"] = limit.ge
            case annotated_types.Gt():
                bounds["gt"] = limit.gt
            case annotated_types.Le():
                bounds["le"] = limit.le
            case annotated_types.Lt():
                bounds["lt"] = limit.lt
            case AfterValidator():
                pass  # credentials are taken out of an address
            case _:
                bounds |= vars(limit)  # pydantic's own: pattern
    return of_type(info.annotation, bounds)


def of_type(kind: Any, bounds: dict[str, Any]) -> st.SearchStrategy[Any]:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return of_type(arguments[0], bounds)
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin in (Union, types.UnionType):
        return st.one_of(*(of_type(a, bounds) for a in arguments))
    if kind == tuple[()]:
        return st.just(())
    if origin is tuple and arguments[-1] is Ellipsis:
        return st.lists(of_type(arguments[0], {}), min_size=bounds.get("min_length", 0), max_size=3)
    if origin is tuple:
        return st.tuples(*(of_type(a, {}) for a in arguments))
    if origin is dict:
        least = bounds.get("min_length", 0)
        return st.dictionaries(text({}), of_type(arguments[1], {}), min_size=least, max_size=2)
    return scalar(kind, bounds)


def scalar(kind: Any, bounds: dict[str, Any]) -> st.SearchStrategy[Any]:
    if isinstance(kind, type) and issubclass(kind, Spec):
        return instances(kind)
    if kind is int:
        return st.integers(bounds.get("ge", 0), bounds.get("le", 10**6))
    if kind is float:
        low, high = bounds.get("ge", bounds.get("gt", 0)), bounds.get("le", bounds.get("lt", 1e6))
        return st.floats(low, high, exclude_min="gt" in bounds, exclude_max="lt" in bounds)
    if kind in (str, Any):
        return text(bounds)
    return {bool: st.booleans(), type(None): st.none()}[kind]


def text(bounds: dict[str, Any]) -> st.SearchStrategy[str]:
    if bounds.get("pattern"):
        whole = st.from_regex(bounds["pattern"].replace("$", r"\Z"), fullmatch=True)
        return whole.filter(lambda found: len(found) <= bounds["max_length"])
    return st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), max_size=12)


def instances(spec: type[Spec]) -> st.SearchStrategy[dict[str, Any]]:
    """Mappings that `spec` accepts; its own validators included."""
    if spec is Domain:
        return domains()
    fields = {
        name: st.just(info.default)
        if get_origin(info.annotation) is Literal and len(get_args(info.annotation)) == 1
        else values(info)
        for name, info in spec.model_fields.items()
    }
    fixed = {
        "betas": st.tuples(st.floats(0, 0.99), st.floats(0, 0.99)),
        "workers": st.one_of(st.integers(0, 9), st.tuples(st.integers(1, 3), st.integers(3, 9))),
    }
    fields |= {name: fixed[name] for name in fields if name in fixed}
    whole = st.fixed_dictionaries(fields)
    if "epochs" in fields:
        one = st.sampled_from([{"steps": None, "epochs": 1.5}, {"steps": 7, "epochs": None}])
        return st.builds(lambda a, b: a | b, whole, one)
    return whole


def domains() -> st.SearchStrategy[dict[str, Any]]:
    """One dimension of a sweep's space."""
    ends = st.tuples(st.floats(1e-6, 1.0), st.floats(2.0, 1e6))
    plain = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(-9, 9), text({}))
    listed = st.lists(plain | st.lists(plain, max_size=2), min_size=1, max_size=3, unique_by=repr)
    pairs = st.lists(
        st.fixed_dictionaries({"a": plain, "b.0": plain}), min_size=1, max_size=3, unique_by=repr
    )
    kinds = {"choice": listed, "grid": listed, "uniform": ends, "loguniform": ends, "paired": pairs}
    kinds["int"] = st.tuples(st.integers(-9, 3), st.integers(4, 10**12))
    return st.one_of(*(st.fixed_dictionaries({kind: each}) for kind, each in kinds.items()))


RELAXED = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None
)


@RELAXED
@given(instances(Run))
def test_any_run_survives_the_way_through_yaml(data: dict[str, Any]) -> None:
    run = Run.model_validate(data)
    again = Run.model_validate(parse(dump(run.resolved()), "run.yaml").data)
    assert again == run
    assert again.digest() == run.digest()
    as_json = parse(json.dumps(run.resolved(), indent="\t"), "run.json").data
    assert Run.model_validate(as_json) == run
    assert Run.model_validate(run.resolved()) == run


@RELAXED
@given(instances(Run))
def test_what_load_accepts_the_schema_accepts(data: dict[str, Any]) -> None:
    resolved = Run.model_validate(data).resolved()
    SCHEMA.validate(resolved)


def mappings(data: Any, keys: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Paths of all mappings that are specs (free-form ones have no names to know)."""
    if keys[-1:] in (("columns",), ("resources",), ("deepspeed",)):
        return []
    if isinstance(data, dict):
        inner = [found for key, value in data.items() for found in mappings(value, (*keys, key))]
        return [keys, *inner]
    if isinstance(data, list):
        return [f for i, value in enumerate(data) for f in mappings(value, (*keys, i))]
    return []


def full_config() -> dict[str, Any]:
    return load(
        yaml.safe_load(SMALL) | {"strategy": "zero2", "data": {"train": "a", "eval": "b"}}
    ).resolved()


@RELAXED
@given(st.data())
def test_an_unknown_key_is_refused_at_every_level(draw: st.DataObject) -> None:
    data = full_config()
    keys = draw.draw(st.sampled_from(mappings(data)))
    word = draw.draw(st.from_regex(r"[a-z_]{3,14}", fullmatch=True))
    holder = data
    for key in keys:
        holder = holder[key]
    if word in holder:
        return
    holder[word] = 1
    said = refusal(data).what
    assert said.startswith(f"{dotted((*keys, word))} is not a key")


@RELAXED
@given(st.data())
def test_a_slip_of_the_finger_names_the_right_key(draw: st.DataObject) -> None:
    data = full_config()
    keys = draw.draw(st.sampled_from(mappings(data)))
    holder = data
    for key in keys:
        holder = holder[key]
    right = draw.draw(
        st.sampled_from([name for name in holder if len(name) >= 5] or ["nothing_here"])
    )
    at = draw.draw(st.integers(0, len(right) - 1))
    wrong = right[:at] + right[at + 1 :]  # one letter missing
    rivals = [
        n
        for n in holder
        if n != right
        and difflib.SequenceMatcher(None, wrong, n).ratio()
        >= difflib.SequenceMatcher(None, wrong, right).ratio()
    ]
    known = {keys[-1] for keys in every_field()} | set(RENAMED) | set(GONE)
    if right not in holder or rivals or wrong in known:
        return
    holder[wrong] = holder.pop(right)
    assert f"did you mean {dotted((*keys, right))}?" in str(refusal(data))


# --- lines ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "line", "said"),
    [
        (
            ("lr: 2e-4", "learning_rate: 2e-4"),
            9,
            "optim.learning_rate is not a key; did you mean optim.lr?",
        ),
        (("rank: 8", "lora_r: 8"), 5, "did you mean methods.0.rank?"),
        (("rank: 8", "rank: eight"), 5, "methods.0.rank must be a whole number, not 'eight'"),
        (("rank: 8", "rank: 0"), 5, "methods.0.rank must be 1 or more, not 0"),
        (("rank: 8", "rank: true"), 5, "methods.0.rank must be a number, not true"),
        (("rank: 8", "rank:"), 5, "leave the key out for its default (16)"),
        (("kind: lora", "kind: lroa"), 4, "did you mean lora? (there are: full, lora)"),
        (
            ("kind: lora", "kind: full"),
            5,
            "methods.0.rank is not a key of kind full; kind lora has",
        ),
        (
            ("kind: lora", "alpha: 8"),
            4,
            "methods.0.kind is missing; kinds: full, lora; did you mean kind: lora?",
        ),
        (("{path: builtin:tiny}", "{quant: nf4}"), 2, "model.path is missing: hub id, local"),
        (("{path: builtin:tiny}", "{path: a, quant: nf8}"), 2, "one of none, int8, nf4, not 'nf8'"),
        (("  steps: 10", "  {}"), 10, "say either steps or epochs"),
        (("steps: 10", "steps: 1.5"), 11, "train.steps must be a whole number, not 1.5"),
        (("name: small", "name: a/b"), 1, "name must be a letter or digit"),
        (("lr: 2e-4", "lr: .nan"), 9, "optim.lr must be a finite number"),
        (("lr: 2e-4", "betas: [0.9]"), 9, "optim.betas must be a list of 2, not a list of 1"),
        (("lr: 2e-4", "betas: [0.9, 2]"), 9, "each beta must be in [0, 1)"),
        (("[rows.jsonl]", "[]"), 7, "data.train must be a list of 1 or more"),
        (("steps: 10", "steps: 10\n  stage: 3"), 12, "did you mean strategy.stage?"),
        (("optim:", "penalties: [{kind: ewc}]\noptim:"), 8, "penalties must be an empty list"),
        (("optim:", "scale: {workers: [2, x]}\noptim:"), 8, "scale.workers.1 must be a whole"),
        (("optim:", "scale: {workers: many}\noptim:"), 8, "a whole number or a list, not 'many'"),
        (("optim:", "strategy: zero4\noptim:"), 8, "strategy knows no kind 'zero4'"),
        (("optim:", "gradient_accumulation_steps: 4\noptim:"), 8, "it follows from"),
    ],
)
def test_a_mistake_has_its_line_and_a_sentence(
    tmp_path: Path, change: tuple[str, str], line: int, said: str
) -> None:
    assert change[0] in SMALL
    path = write(tmp_path, SMALL.replace(*change))
    error = refusal(path)
    assert error.where == f"{path}:{line}", str(error)
    assert said in error.what


def test_a_missing_section_points_at_its_parent(tmp_path: Path) -> None:
    path = write(tmp_path, "# a comment\n" + SMALL.replace("train:\n  steps: 10\n", ""))
    error = refusal(path)
    assert error.what.startswith("train is missing: how long")
    assert error.where == f"{path}:2"


@pytest.mark.parametrize(
    ("text", "where", "said"),
    [
        ("name: a\nmodel:\n\tpath: b\n", "3:1", "a tab; YAML is indented with spaces only"),
        ("name: a\nmodel: b: c\n", "2:9", "a second `: ` in one line"),
        ("name: [a\nmodel: b\n", "2:6", "bracket"),
        ("name: a\nmodel\n", "3:1", "neither `key: value`"),
        ("name: 'a\n", "2:1", "a quote is not closed"),
        ("a: 1\n  b: 2\n", "2:4", "a second `: `"),
        ("a: *b\n", "1:4", "has no anchor"),
        ("a: !!python/object:os.system {}\nb: !foo bar\n", "1:4", "tags"),
        ("a: 1\n---\nb: 2\n", "2:1", "second `---` document"),
        ("- a\n", "", "a config is a mapping"),
        ("a: &a [*a]\n", "1", "an alias refers to something that contains it"),
        ("name: a\n{a: b}: 2\n", "2", ""),
    ],
)
def test_broken_yaml_is_one_sentence(tmp_path: Path, text: str, where: str, said: str) -> None:
    path = write(tmp_path, text)
    error = refusal(path)
    assert said in error.what
    assert error.where == (f"{path}:{where}" if where else str(path))
    assert len(str(error).splitlines()) <= 4


def test_a_key_written_twice_names_both_lines(tmp_path: Path) -> None:
    path = write(tmp_path, SMALL + "  micro_batch: 2\n  steps: 20\n")
    error = refusal(path)
    assert error.where == f"{path}:13"
    assert error.what == "train.steps is written twice, first in line 11; keep one of them"


def test_many_mistakes_are_listed_in_the_order_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, SMALL + "".join(f"k{i}: 1\n" for i in range(20)))
    lines = str(refusal(path)).splitlines()
    assert lines[0] == f"config error: 20 mistakes in {path}"
    assert [line.split(":")[1] for line in lines[1:9]] == [str(12 + i) for i in range(8)]
    assert lines[9] == "  ... and 12 more"


def test_files_that_are_not_there_or_no_text(tmp_path: Path) -> None:
    path = write(tmp_path, SMALL, "qlora.yaml")
    assert refusal(tmp_path / "qlra.yaml").fix == f"did you mean {path}?"
    assert "is a folder" in refusal(tmp_path).what
    (tmp_path / "b.yaml").write_bytes(b"name: \xff\xfe")
    assert "not UTF-8" in refusal(tmp_path / "b.yaml").what
    assert "no folder" in refusal(tmp_path / "no" / "b.yaml").fix
    (tmp_path / "empty.yaml").write_text("")
    assert "5 mistakes" not in refusal(tmp_path / "empty.yaml").what


# --- what is understood --------------------------------------------------------------------------


def test_the_short_forms(tmp_path: Path) -> None:
    short = """
name: 2024
model: builtin:tiny
methods: full
objective: lm
data: {train: a.jsonl, eval: [b.jsonl, {path: c.jsonl, subset: 010, split: no}]}
optim:
train: {steps: 1e2, gradient_checkpointing: on}
strategy: {kind: zero3, offload: cpu}
"""
    run = load(write(tmp_path, short))
    assert run.name == "2024"
    assert run.model.path == "builtin:tiny"
    assert [method.kind for method in run.methods] == ["full"]
    assert run.objective.kind == "lm"
    assert [s.path for s in run.data.train + run.data.eval] == ["a.jsonl", "b.jsonl", "c.jsonl"]
    assert (run.data.eval[1].subset, run.data.eval[1].split) == ("010", "no")
    assert (run.train.steps, run.train.gradient_checkpointing) == (100, True)
    assert run.strategy.model_dump()["stage"] == 3
    assert run.strategy.model_dump()["offload"] == "cpu"
    jsonschema.validate(
        parse(
            short.replace("2024", "a")
            .replace("010", "'010'")
            .replace(" on}", " true}")
            .replace("kind: zero3", "kind: zero"),
            "x",
        ).data,
        schema(),
    )


def test_numbers_as_yaml_1_2_writes_them(tmp_path: Path) -> None:
    for text, value in (("2e-4", 2e-4), ("1E-3", 1e-3), (".5", 0.5), ("1.", 1.0), ("3", 3.0)):
        assert load(write(tmp_path, SMALL.replace("2e-4", text))).optim.lr == value


def test_anchors_and_merges(tmp_path: Path) -> None:
    text = SMALL.replace("[rows.jsonl]", "[&a {path: x, task: t}, {<<: *a, path: y}]")
    train = load(write(tmp_path, text)).data.train
    assert [(source.path, source.task) for source in train] == [("x", "t"), ("y", "t")]


def test_json_with_tabs_and_its_lines(tmp_path: Path) -> None:
    data = yaml.safe_load(SMALL) | {"optim": {"lr": 1e-4}}
    path = write(tmp_path, json.dumps(data, indent="\t"), "run.json")
    assert load(path).optim.lr == 1e-4
    data["optim"] = {"lr": "fast"}
    path = write(tmp_path, json.dumps(data, indent="\t"), "run.json")
    line = path.read_text().splitlines().index('\t\t"lr": "fast"') + 1
    assert refusal(path).where == f"{path}:{line}"


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("methods.0.rank=32", "methods.0.rank", 32),
        ("optim.lr=1e-5", "optim.lr", 1e-5),
        ("optim.clip=null", "optim.clip", None),
        ("optim.betas.1=0.95", "optim.betas", [0.9, 0.95]),
        ("data.train=[a, b]", "data.train.1.path", "b"),
        ("data.train=other.jsonl", "data.train.0.path", "other.jsonl"),
        ("data.train.0.weight=2", "data.train.0.weight", 2.0),
        ("data.train.1=more.jsonl", "data.train.1.path", "more.jsonl"),
        ("data.train.0.columns.prompt=q", "data.train.0.columns", {"prompt": "q"}),
        ("objective.train_on_prompt=true", "objective.train_on_prompt", True),
        ("methods.0={kind: full}", "methods.0.kind", "full"),
        ("methods=full", "methods.0.kind", "full"),
        ("strategy=zero3", "strategy.stage", 3),
        ("model.revision=12e5", "model.revision", "12e5"),
        ("storage=s3://bucket/a=b", "storage", "s3://bucket/a=b"),
        ("scale.workers=[1, 4]", "scale.workers", [1, 4]),
        ("penalties=[]", "penalties", []),
    ],
)
def test_overrides(tmp_path: Path, override: str, path: str, value: Any) -> None:
    found: Any = load(write(tmp_path, SMALL), [override]).resolved()
    for key in path.split("."):
        found = found[int(key)] if key.isdigit() else found[key]
    assert found == value


def test_an_override_reaches_defaults_presets_and_earlier_overrides() -> None:
    bare = yaml.safe_load(SMALL)
    del bare["methods"], bare["optim"]
    bare["strategy"] = "zero2"
    run = load(
        bare, ["methods.0.rank=4", "optim.betas.0=0.8", "strategy.stage=1", "methods.0.rank=6"]
    )
    assert run.resolved()["methods"][0]["rank"] == 6
    assert run.optim.betas == (0.8, 0.999)
    assert run.resolved()["strategy"]["stage"] == 1


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optim.lrr=1", "did you mean optim.lr?"),
        ("optimm.lr=1", "did you mean optim?"),
        ("optim.learning_rate=1", "did you mean optim.lr?"),
        ("optim.lr.x=1", "optim.lr is 0.0002 and has nothing inside it"),
        ("methods.0.lora_alpha=3", "did you mean methods.0.alpha?"),
        ("methods.rank=8", "methods is a list: name an entry by its number"),
        ("methods.3.rank=8", "methods has 1 entry, counted from 0"),
        ("strategy.stage=2", "strategy.stage is not a key of kind ddp; kind zero has it"),
        ("trackers=wandb", "must be a list, not 'wandb'; write [wandb]"),
        ("optim.lr", "an override is written a.b=value, not 'optim.lr'"),
        ("=3", "an override is written a.b=value"),
        ("optim.lr={", "a value is missing, or a bracket is not closed"),
    ],
)
def test_a_wrong_override_says_so(tmp_path: Path, override: str, said: str) -> None:
    error = refusal(write(tmp_path, SMALL), override)
    assert said in str(error)
    assert override in str(error)


def test_an_override_puts_a_mistake_right(tmp_path: Path) -> None:
    path = write(tmp_path, SMALL.replace("rank: 8", "rank: true"))
    refusal(path)
    assert load(path, ["methods.0.rank=4"]).resolved()["methods"][0]["rank"] == 4


def test_mappings_runs_and_python_objects_load_alike(tmp_path: Path) -> None:
    from_file = load(write(tmp_path, SMALL))
    plain = yaml.safe_load(SMALL)
    plain["methods"] = (from_file.methods[0],)
    plain["data"] = {"train": Path("rows.jsonl")} | {}
    plain["data"] = {"train": ({"path": Path("rows.jsonl")},)}
    before = repr(plain)
    assert load(plain) == from_file
    assert load(from_file) == from_file
    assert load(from_file, ["seed=3"]).seed == 3
    assert repr(plain) == before


def test_a_rule_that_fires_has_the_line_of_its_key(tmp_path: Path) -> None:
    path = write(tmp_path, SMALL.replace("steps: 10", "steps: 10\n  eval_every: 5"))
    error = refusal(path)
    assert error.where == f"{path}:12"
    assert "nothing to evaluate on" in error.what


# --- the menu ------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.__name__)
def test_every_spec_is_small_described_and_closed(spec: type[Spec]) -> None:
    assert len(spec.model_fields) <= 16
    assert spec.__doc__
    bare = [
        name
        for name, info in spec.model_fields.items()
        # a kind with one value is described by its class
        if not info.description and len(get_args(info.annotation)) != 1
    ]
    assert not bare
    assert spec.model_config["frozen"] and spec.model_config["extra"] == "forbid"
    for name, info in spec.model_fields.items():
        assert info.is_required() or info.default is not PydanticUndefined, name


def test_names_of_other_tools_lead_to_keys_that_exist() -> None:
    known = {dotted(keys) for keys in every_field()}
    assert {theirs: ours for theirs, ours in RENAMED.items() if ours not in known} == {}
    assert not set(RENAMED) & set(GONE)
    assert not {name for name in GONE if name in {keys[-1] for keys in every_field()}}


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_experiment_loads_and_fires_no_rule(path: Path) -> None:
    run = load(path)
    assert rules.fired(run) == []
    SCHEMA.validate(parse(path.read_text(), path.name).data)


def test_there_are_experiments() -> None:
    assert {p.name for p in EXPERIMENTS} >= {"full.yaml", "qlora.yaml", "llama8b_qlora.yaml"}


def test_check_imports_nothing_heavy_and_answers_at_once() -> None:
    code = (
        "import sys; from rayft.cli import main; "
        "code = main(['check', 'experiments/quickstart/qlora.yaml']); "
        "heavy = {'torch', 'ray', 'transformers', 'deepspeed', 'peft', 'bitsandbytes', 'datasets'};"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr); sys.exit(code)"
    )
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
        )
        seconds.append(time.perf_counter() - start)
        assert done.returncode == 0, done.stderr
        assert done.stderr == "[]\n"
    assert min(seconds) < 2.0
