"""Configs that nobody should write: any text ends soon in a Run or a ConfigError."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from rayft.config import addresses
from rayft.config.load import load
from rayft.config.menu_tree import every_field
from rayft.config.parse import dotted, dump
from rayft.config.run import Run
from rayft.core.errors import MAX_LINES, ConfigError

ROOT = Path(__file__).parents[2]
GOOD = {
    "name": "small",
    "model": "builtin:tiny",
    "data": {"train": "rows.jsonl", "eval": "held.jsonl"},
    "train": {"steps": 90, "eval_every": 10},
}
SPACE = {"optim.lr": {"loguniform": [1e-5, 1e-3]}}
TEXT = dump(GOOD)


def bomb(level: str, first: str, count: int) -> str:
    """Anchors a0, a1, ... each made of two of the one before."""
    lines = [f"a0: &a0 {first}"]
    lines += [f"a{n}: &a{n} " + level.format(f"*a{n - 1}") for n in range(1, count)]
    return "\n".join(lines)


HOSTILE = {
    "laughs": bomb("[{0}, {0}]", "[x]", 60),
    "laughs in mappings": bomb("{{x: {0}, y: {0}}}", "{x: 1}", 60),
    "merged laughs": bomb("{{<<: [{0}, {0}]}}", "{x: 1}", 60),
    "merged laughs and a key": bomb("{{<<: [{0}, {0}], y: 1}}", "{x: 1}", 60),
    "a chain of aliases": bomb("[{0}]", "[x]", 2000),
    "itself": "a: &a [*a]",
    "itself in a mapping": "a: &a {b: {c: *a}}",
    "itself merged": "a: &a {<<: *a}",
    "deep list": "[" * 100_000,
    "deep list, closed": "a: " + "[" * 100_000 + "]" * 100_000,
    "deep mapping": '{"a":' * 40_000 + "1" + "}" * 40_000,
    "deep block": "\n".join(" " * n + "a:" for n in range(600)),
    "deep dashes": "- " * 50_000 + "x",
    "many keys": TEXT + "".join(f"k{n}: 1\n" for n in range(9_000)),
    "many wrong entries": dump(GOOD | {"data": {"train": [{"x": 1}] * 4_000}}),
    "many values": TEXT + "a: [" + "1," * 100_000 + "]",
    "no text": "\0" * 100_000,
    "a long key": TEXT + "k" * 200_000 + ": 1",
    "a long file": "# x\n" * 500_000,
    "5,000 digits": dump(GOOD).replace("90", "9" * 5_000),
    "5,000 digits in a float": TEXT + "optim: {lr: " + "9" * 5_000 + "}",
    "5,000 digits, negative": dump(GOOD).replace("90", "-" + "9" * 5_000),
    "half a character": '{"name": "\\ud800"}',
    "half a character as a key": '{"\\udfff": 1}',
    "no character": 'name: "\\UFFFFFFFF"',
    "a tag that does not fit": "name: !!bool maybe",
    "a tag of another language": "name: !!python/object/apply:os.system [true]",
    "a date": "name: !!timestamp 2001-13-45",
}


@pytest.mark.parametrize("text", [pytest.param(text, id=name) for name, text in HOSTILE.items()])
@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_hostile_text_is_refused_in_seconds(tmp_path: Path, text: str, suffix: str) -> None:
    path = tmp_path / f"run.{suffix}"
    path.write_text(text)
    began = time.process_time()
    with pytest.raises(ConfigError) as caught:
        load(path)
    # half a second of an idle core at most; a busy one that shares its caches has taken 1.04. What
    # is to be found here, an exponential or a square, takes minutes or for ever.
    assert time.process_time() - began < 8.0
    said = str(caught.value)
    assert len(said.splitlines()) <= MAX_LINES and max(map(len, said.splitlines())) < 4200


@pytest.mark.parametrize("name", ["laughs", "merged laughs", "deep list, closed", "many keys"])
def test_the_command_exits_2_in_little_memory(tmp_path: Path, name: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(HOSTILE[name])
    most = 400 * 2**20  # bytes; an interpreter with pydantic and typer has 60 of its own

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))

    done = subprocess.run(
        [sys.executable, "-m", "rayft", "check", str(path)], preexec_fn=limit, timeout=20,
        capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr


def test_aliases_people_write_still_work(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "train: &b {steps: 5}\nname: a\nmodel: &m builtin:tiny\n"
        "data: {train: &t [{path: a, weight: 2}], eval: *t}\n"
        "optim: {lr: !!float 1, kind: !!str adamw}\n"
    )
    with pytest.raises(ConfigError, match="rows that are trained on"):  # read as it was meant
        load(path)
    run = load(path, ["data.eval=other"])
    assert (run.train.steps, run.data.train[0].weight, run.optim.lr) == (5, 2.0, 1.0)


COUNTS = [
    "train.steps", "train.epochs", "train.global_batch", "train.micro_batch", "train.eval_every",
    "train.eval_batch", "train.save_every", "train.keep", "train.log_every", "scale.workers",
    "scale.gpus", "scale.cpus", "scale.retries", "scale.resources.x", "data.max_length",
    "data.train.0.weight", "methods.0.rank", "optim.warmup", "sweep.trials", "sweep.seeds",
    "sweep.slots", "sweep.packs", "sweep.steps", "sweep.max_seconds", "sweep.search.startup",
    "sweep.scheduler.grace", "sweep.scheduler.factor",
]  # fmt: skip


@pytest.mark.parametrize("key", COUNTS)
@pytest.mark.parametrize(
    "value", ["1e12", "1000000000001", "-1", ".nan", ".inf", "-.inf", "1" + "0" * 39, "9" * 5000]
)
def test_counts_no_machine_has_are_refused_by_their_name(key: str, value: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(GOOD | {"sweep": {"space": SPACE}}, [f"{key}={value}"])
    assert key.removesuffix(".x") in str(caught.value)


def test_a_space_of_endless_whole_numbers_is_refused() -> None:
    for ends in ([1, 10**30], [-(10**18), 10**18]):
        with pytest.raises(ConfigError, match="spans at most"):
            load(GOOD | {"sweep": {"space": {"optim.clip": {"int": ends}}}})
    wide = {f"data.train.{n}.weight": {"choice": [1.0 + i for i in range(100)]} for n in range(11)}
    with pytest.raises(ConfigError, match="lists 1,100 values, of 1,000 at most"):
        load(GOOD | {"data": {"train": ["a"] * 11, "eval": "b"}, "sweep": {"space": wide}})


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("n" * 201, "at most 200 characters"),
        ("ä" * 10, "a letter or digit"),
        ("a/b", "a letter or digit"),
        ("..", "a letter or digit"),
        ("-rf", "a letter or digit"),
        (".hidden", "a letter or digit"),
        ("a\nb", "a letter or digit"),
        ("a\n", "a letter or digit"),
        ("[/bold]", "a letter or digit"),
        ("", "a letter or digit"),
        ("a?b", "a letter or digit"),
        ("a b", "a letter or digit"),
    ],
)
def test_names_that_no_file_system_or_store_takes_everywhere(name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load(GOOD | {"name": name})
    assert load(GOOD | {"name": "n" * 200}).name == "n" * 200


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("ftp://host/x", "ftp:// is not known; (there are:"),
        ("s4://bucket/x", "did you mean s3://?"),
        ("s3a://bucket/x", "did you mean s3://?"),
        ("http://host/x", "http:// is not known"),
        ("s3:/x/y", "did you mean s3://x/y?"),
        ("s3:x", "did you mean s3://x?"),
        ("gs//x", "did you mean gs://x?"),
        ("file:/x", "did you mean file:///x?"),
        ("C:/Users/x", "C:/ is not known; a local path of that name is ./C:/Users/x"),
        ("", "is empty"),
        ("  ", "is empty"),
        ("a\0b", "cannot be printed"),
        ("a\x1b[31mb", "cannot be printed"),
        ("a\nb", "cannot be printed"),
        ("ab\u202etxt.exe", "cannot be printed"),
        ("~nobody-has-this-name/x", "there is no user nobody-has-this-name"),
        ("x/" + "ä" * 128 + "/y", "a name of 256 bytes; file systems take 255"),
        ("s3://bucket/" + "k" * 256, "a name of 256 bytes"),
        ("/".join("d" * 100 for _ in range(8)), "a path of 807 bytes"),
    ],
)
def test_addresses_that_mean_nothing_are_refused_with_their_line(
    tmp_path: Path, address: str, said: str
) -> None:
    path = tmp_path / "run.yaml"
    for key, data in (
        ("storage", GOOD | {"storage": address}),
        ("data.cache", GOOD | {"data": GOOD["data"] | {"cache": address}}),
        ("data.train.1.path", GOOD | {"data": {"train": ["a", address], "eval": "b"}}),
        ("data.eval.0.path", GOOD | {"data": {"train": ["a"], "eval": [{"path": address}]}}),
    ):
        path.write_text(json.dumps(data, indent=1))
        with pytest.raises(ConfigError) as caught:
            load(path)
        assert f"{key}: " in caught.value.what and said in caught.value.what
        line = int(caught.value.where.rpartition(":")[2])
        assert json.dumps(address) in path.read_text().splitlines()[line - 1]


@pytest.mark.parametrize(
    "address",
    [
        "runs", "./a:b", "/x/s3:/y", "~/x", "..", "gs", "s3/x", "file:///x", "s3://b", "S3://b/x",
        "s3://b/x?endpoint_override=h:9000&scheme=http", "gs://b/x", "gcs://b/x", "a#b", "ä/ö",
        "a\u0308", "[/bold]", "-x", "ä" * 127, "org/name", "builtin:docstrings", "*.jsonl",
    ],
)  # fmt: skip
def test_addresses_that_mean_something(address: str) -> None:
    assert addresses.wrong(address) == ""
    assert load(GOOD | {"storage": address}).storage == address  # no normal form: as typed


# --- any text at all ------------------------------------------------------------------------------

FUZZ = settings(
    max_examples=300,
    deadline=2000,  # milliseconds for one, on a busy machine
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
PIECES = st.sampled_from(
    [
        "name", "model", "data", "train", "sweep", "space", "optim", "kind", "lora", "zero3", "a",
        ": ", ":", "- ", "\n", "\n  ", "  ", "[", "]", "{", "}", ",", "&a ", "*a", "<<: ", "<<",
        "!!int ", "!!float ", "!!set ", "! ", "|", ">-", "'", '"', "\\", "\\ud83d", "\\ude00", "#",
        "---", "...", "%YAML 1.1", "? ", "~", "null", "true", "1", "-1", "1e9", ".inf", ".nan",
        "0" * 50, "\t", "\r", "\0", "\x85", "\u2028", "\ufeff", "😀", "²", "=",
    ]
)  # fmt: skip
ANYTHING = st.one_of(st.text(max_size=80), st.lists(PIECES, max_size=30).map("".join))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | PIECES,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4)
    ),
    max_leaves=12,
)
FIELDS = st.sampled_from(sorted({dotted(keys) for keys in every_field()}))
PATHS = st.one_of(
    FIELDS,
    st.lists(FIELDS | st.sampled_from(["0", "1", "²", "-1", "9" * 20, "", "x"]), max_size=4).map(
        ".".join
    ),
    st.text(max_size=12),
)


def loads(source: Any, *overrides: str) -> None:
    """It is a Run that can be written down again, or a ConfigError of few lines."""
    try:
        run = load(source, overrides)
    except ConfigError as error:
        text = str(error)
        assert text.isprintable() or "\n" in text
        assert error.exit_code == 2 and len(text.splitlines()) <= MAX_LINES
        text.encode()  # no halves of characters are left
    else:
        assert isinstance(run, Run) and run.digest() and dump(run.resolved())


@FUZZ
@given(ANYTHING, st.sampled_from(["yaml", "json"]))
@example('name: "\\UFFFFFFFF"', "yaml")
def test_any_text_is_a_run_or_a_config_error(tmp_path: Path, text: str, suffix: str) -> None:
    path = tmp_path / f"run.{suffix}"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    loads(path)


@FUZZ
@given(st.binary(max_size=60))
def test_any_bytes_are_a_run_or_a_config_error(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(data)
    loads(path)


@FUZZ
@given(PATHS, VALUES)
def test_any_value_anywhere_is_a_run_or_a_config_error(
    tmp_path: Path, where: str, value: Any
) -> None:
    """Put into a good config: as an override, in the file, and in a mapping from Python."""
    loads(GOOD, f"{where}={json.dumps(value)}")
    head, *tail = [part for part in where.split(".") if part] or ["name"]
    for key in reversed(tail):
        value = {key: value} if not key.isdigit() else [value]
    path = tmp_path / "run.json"
    path.write_text(json.dumps(GOOD | {head: value}))
    loads(path)
    loads(GOOD | {head: value})


@FUZZ
@given(st.lists(ANYTHING | st.builds("{}={}".format, PATHS, ANYTHING), min_size=1, max_size=3))
@example(["sweep.space.=1"])
@example(["methods.².rank=1"])
@example([".".join(["a"] * 30_000) + "=1"])
def test_any_override_is_a_run_or_a_config_error(texts: list[str]) -> None:
    loads(GOOD, *texts)


@FUZZ
@given(
    st.dictionaries(PATHS, VALUES | st.fixed_dictionaries({"choice": st.lists(VALUES)}), max_size=3)
)
def test_any_space_is_a_run_or_a_config_error(space: dict[str, Any]) -> None:
    loads(GOOD | {"sweep": {"space": space}})
