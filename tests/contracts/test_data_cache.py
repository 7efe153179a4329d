"""Tokenised once: the same table however the work is split, cached by content; bad rows counted."""

from __future__ import annotations

import json
import random
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

import rayft
from rayft.compose.data import open_corpus, prepare_data, what_changed
from rayft.config.data import DataSpec
from rayft.config.load import load
from rayft.config.objectives import LmSpec, SftSpec
from rayft.core.errors import ConfigError, DataError
from rayft.data.preview import pieces
from rayft.data.stream import EvalSet
from rayft.data.table import TokenTable
from rayft.data.tokenise import prepare
from rayft.data.work import (
    merge,
    recipe,
    sources_of,
    split_work,
    task_names,
    tokenise_shard,
)
from rayft.storage.folder import Storage

TINY = Path(rayft.__file__).parent / "models" / "tiny"
GOOD = [{"prompt": f"question {i}", "completion": f"answer {i}" * (i % 7 + 1)} for i in range(200)]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY)


@pytest.fixture
def cache(tmp_path):
    return Storage.open(str(tmp_path / "cache"))


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def spec(*paths, **options) -> DataSpec:
    return DataSpec(train=[{"path": path} for path in paths], **options)


def never(shards, how):
    raise AssertionError("tokenised again")


def same(one: TokenTable, other: TokenTable) -> None:
    for field in fields(TokenTable):
        mine, theirs = one.__dict__[field.name], other.__dict__[field.name]
        if isinstance(mine, np.ndarray):
            assert mine.dtype == theirs.dtype
            assert mine.tolist() == theirs.tolist(), field.name
        else:
            assert mine == theirs, field.name


@pytest.mark.parametrize("size", [100, 3000])
def test_the_split_changes_nothing(tokenizer, tmp_path, size):
    rows = [*GOOD, {"prompt": "no answer", "completion": ""}]
    paths = write(tmp_path / "a.jsonl", rows), write(tmp_path / "b.jsonl", rows[100:])
    data, how = spec(*paths), recipe(spec(*paths), SftSpec())
    sources = sources_of(data)
    tables = []
    for bytes_ in (size, 1 << 30):
        shards = split_work(sources, tokenizer, how, bytes_)
        parts = [tokenise_shard(shard, tokenizer, how) for shard in shards]
        tables.append(merge(paths, shards, parts))
    assert len(shards) == 2
    same(*tables)
    assert [(bad.row, bad.line) for bad in tables[0].bad] == [(200, 201), (100, 101)]
    assert tables[0].total.rows == 302
    assert tables[0].total.documents == 300
    assert tables[0].total.trained == int(tables[0].mask.sum())


def test_cached_by_content(tokenizer, tmp_path, cache):
    path = tmp_path / "a.jsonl"
    data = spec(write(path, GOOD), max_length=64)
    first = prepare(data, SftSpec(), tokenizer, cache)
    again = prepare(data, SftSpec(), tokenizer, cache, run=never)
    same(first, again)
    meta = json.loads(cache.child(first.digest).read_bytes("meta.json"))
    assert meta["hash"] == first.digest
    assert str(path) in meta["fingerprint"]["sources"][0]["content"]

    moved = path.rename(tmp_path / "moved.jsonl")
    tagged = DataSpec(train=[{"path": str(moved), "task": "t", "weight": 2}], max_length=64)
    assert prepare(tagged, SftSpec(), tokenizer, cache, run=never).ids.tolist() == (
        first.ids.tolist()
    )


def test_a_changed_byte_or_option_changes_the_hash(tokenizer, tmp_path, cache):
    path = tmp_path / "a.jsonl"
    data = spec(write(path, GOOD), max_length=64)
    hashes = {prepare(data, SftSpec(), tokenizer, cache).digest}
    hashes.add(prepare(data, SftSpec(train_on_prompt=True), tokenizer, cache).digest)
    hashes.add(
        prepare(data, LmSpec(), tokenizer, cache, chat_template="{{ messages[0].content }}").digest
    )
    hashes.add(prepare(spec(str(path), max_length=63), SftSpec(), tokenizer, cache).digest)
    other = AutoTokenizer.from_pretrained(TINY)
    other.chat_template = other.chat_template.replace("<|end|>", "<|eos|>")
    hashes.add(prepare(data, SftSpec(), other, cache).digest)
    content = bytearray(path.read_bytes())
    content[content.index(b"answer 7")] ^= 1
    path.write_bytes(content)
    hashes.add(prepare(data, SftSpec(), tokenizer, cache).digest)
    assert len(hashes) == 6


def entry_of(cache, table):
    """Its folder, and the name of each of its files."""
    folder = cache.child(table.digest)
    meta = json.loads(folder.read_bytes("meta.json"))
    names = {kind: meta[f"{kind}_file"]["name"] for kind in ("tokens", "bad_rows")}
    return folder, names | {"meta": "meta.json"}


def flip(data, bit):
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


DAMAGE = {
    "one bit": lambda data, draw: flip(data, draw.randrange(len(data) * 8)),
    "truncated": lambda data, draw: data[: draw.randrange(len(data))],
    "zeroed": lambda data, draw: bytes(len(data)),
    "longer": lambda data, draw: data + b"\0",
    "empty": lambda data, draw: b"",
    "gone": None,
}


@pytest.mark.parametrize("what", DAMAGE)
@pytest.mark.parametrize("kind", ["tokens", "bad_rows", "meta"])
def test_a_damaged_cache_is_made_anew_with_a_word(tokenizer, tmp_path, cache, what, kind, caplog):
    draw = random.Random(f"{what} {kind}")
    rows = [*GOOD[:40], {"prompt": "no answer", "completion": ""}]
    data = spec(write(tmp_path / "a.jsonl", rows), bad_rows=1.0)
    first = prepare(data, SftSpec(), tokenizer, cache)
    for _ in range(12 if what == "one bit" else 1):
        folder, names = entry_of(cache, first)
        whole = folder.read_bytes(names[kind])
        if DAMAGE[what] is None:
            folder.delete(names[kind])
        else:
            folder.write_bytes(names[kind], DAMAGE[what](whole, draw))
        caplog.clear()
        made = []

        def run(shards, how, made=made):
            made.append(len(shards))
            return [tokenise_shard(shard, tokenizer, how) for shard in shards]

        same(first, prepare(data, SftSpec(), tokenizer, cache, run=run))
        # A flip may hit white space of meta.json, and says nothing; meta.json gone is a new entry.
        assert made or (what, kind) == ("one bit", "meta")
        told = names[kind] in caplog.text and "made anew" in caplog.text
        assert told == (bool(made) and (what, kind) != ("gone", "meta"))
        same(first, prepare(data, SftSpec(), tokenizer, cache, run=never))


def test_whoever_opens_a_cache_checks_it(tokenizer, tmp_path):
    """Ranks, packs and `rayft eval` go through open_corpus."""
    path = write(tmp_path / "a.jsonl", GOOD)
    base = {"name": "r", "model": "builtin:tiny", "data": {"train": path}, "train": {"steps": 1}}
    run = load(base | {"storage": str(tmp_path)})
    ready = prepare_data(run, lambda function, items: [function(item) for item in items])
    whole = open_corpus(run, ready.uri, ready.hash).train
    folder, names = entry_of(Storage.open(ready.uri), whole)
    for name in names.values():
        data = folder.read_bytes(name)
        folder.write_bytes(name, flip(data, 8 * (len(data) // 2)) if data else b"?")
        with pytest.raises(DataError, match="is damaged") as caught:
            open_corpus(run, ready.uri, ready.hash)
        assert name in caught.value.what and "made anew" in caught.value.fix
        folder.write_bytes(name, data)
        same(whole, open_corpus(run, ready.uri, ready.hash).train)
    folder.write_bytes("meta.json", b"{")
    assert what_changed(ready.uri, whole.digest, "0" * 16) == []  # no reason to break off


def test_an_entry_of_before_there_were_checksums_is_made_anew(tokenizer, tmp_path, cache, caplog):
    data = spec(write(tmp_path / "a.jsonl", GOOD))
    first = prepare(data, SftSpec(), tokenizer, cache)
    folder, names = entry_of(cache, first)
    meta = {"hash": first.digest, "file": names["tokens"], "documents": first.documents}
    folder.write_text("meta.json", json.dumps(meta))
    same(first, prepare(data, SftSpec(), tokenizer, cache))
    assert "without checksums" in caplog.text


def test_builders_of_one_entry_do_not_collide(tokenizer, tmp_path, cache):
    """Both are past the look into the cache, under different names of the same file."""
    rows = [*GOOD[:40], {"prompt": "no answer", "completion": ""}]
    one, other = (
        spec(write(tmp_path / name, rows), bad_rows=1.0) for name in ("a.jsonl", "b.jsonl")
    )
    later = []

    def run(shards, how):
        if not later:
            later.append(None)
            later[0] = prepare(other, SftSpec(), tokenizer, cache)  # built while the other builds
        return [tokenise_shard(shard, tokenizer, how) for shard in shards]

    first = prepare(one, SftSpec(), tokenizer, cache, run=run)
    assert first.ids.tolist() == later[0].ids.tolist()
    names = [found.name.split("-")[0] for found in cache.child(first.digest).list()]
    assert names == ["bad_rows", "bad_rows", "meta.json", "tokens", "tokens"]
    found = prepare(other, SftSpec(), tokenizer, cache, run=never)
    assert found.ids.tolist() == first.ids.tolist() and found.bad == first.bad
    assert later[0].ids.tolist() == first.ids.tolist()  # still mapped, still its own


@pytest.mark.parametrize("overflow", ["cut", "drop"])
def test_overflow(tokenizer, tmp_path, cache, overflow):
    rows = [*GOOD[:50], {"prompt": "short", "completion": "word " * 100}]
    data = spec(write(tmp_path / "a.jsonl", rows), max_length=64, overflow=overflow)
    total = prepare(data, SftSpec(), tokenizer, cache).total
    assert (total.cut, total.dropped) == ((1, 0) if overflow == "cut" else (0, 1))
    assert total.rows == total.documents + total.dropped == 51
    long_prompt = [{"prompt": "word " * 100, "completion": "cut off"}]
    data = spec(write(tmp_path / "b.jsonl", [*rows, *long_prompt]), max_length=64, bad_rows=1)
    [bad] = prepare(data, SftSpec(), tokenizer, cache).bad
    assert bad.reason == "nothing to train on after cutting to max_length 64"


def test_bad_rows_are_listed_and_too_many_stop_the_run(tokenizer, tmp_path, cache):
    path = tmp_path / "a.jsonl"
    lines = [json.dumps(row).encode() for row in GOOD]
    lines[3], lines[5] = b'{"prompt": "\xff"}', b'{"prompt": "a", "completion": ""}'
    path.write_bytes(b"\n".join(lines))
    table = prepare(spec(str(path)), SftSpec(), tokenizer, cache)
    listed = [json.loads(line) for line in table.bad_rows_jsonl().splitlines()]
    assert [set(item) for item in listed] == [
        {"source", "row", "file", "line", "reason", "preview"}
    ] * 2
    assert [(item["row"], item["line"], item["reason"]) for item in listed] == [
        (3, 4, "invalid UTF-8 at byte 12"),
        (5, 6, "empty completion"),
    ]
    with pytest.raises(DataError, match=r"(?s)2 of 200 rows are bad.*a\.jsonl:4: invalid") as info:
        prepare(spec(str(path), bad_rows=0.009), SftSpec(), tokenizer, cache)
    assert info.value.exit_code == 3
    assert len(str(info.value).splitlines()) <= 15


def test_what_is_empty_or_unknown_is_refused(tokenizer, tmp_path, cache):
    (tmp_path / "empty.jsonl").write_bytes(b"\n")
    with pytest.raises(DataError, match=r"empty\.jsonl gives no document"):
        prepare(spec(str(tmp_path / "empty.jsonl")), SftSpec(), tokenizer, cache)
    unknown = write(tmp_path / "unknown.jsonl", [{"q": "a", "b": "c"}] * 3)
    with pytest.raises(DataError, match=r"(?s)columns found: b, q.*known shapes: messages") as info:
        prepare(spec(unknown), SftSpec(), tokenizer, cache)
    assert "columns: {prompt: question" in str(info.value)
    text = write(tmp_path / "text.jsonl", [{"text": "a"}])
    with pytest.raises(ConfigError, match=r"(?s)plain text have none.*text\.jsonl"):
        prepare(spec(text), SftSpec(), tokenizer, cache)


def test_tasks_and_heldout(tokenizer, tmp_path, cache):
    one, two = write(tmp_path / "1.jsonl", GOOD[:20]), write(tmp_path / "2.jsonl", GOOD[20:50])
    data = DataSpec(
        train=[{"path": one, "task": "b"}, {"path": two, "task": "a"}],
        eval=[{"path": two, "task": "a"}],
    )
    assert task_names(data) == ("a", "b")
    table = prepare(data, SftSpec(), tokenizer, cache)
    assert table.task.tolist() == [1] * 20 + [0] * 30
    held = prepare(data, SftSpec(), tokenizer, cache, heldout=True)
    assert held.documents == 30
    assert EvalSet(held, 8, 0).batches(0, 1)[0].task.unique().tolist() == [0]


def test_pieces_are_the_document(tokenizer, tmp_path, cache):
    table = prepare(spec(write(tmp_path / "a.jsonl", GOOD)), SftSpec(), tokenizer, cache)
    shown = pieces(table, tokenizer, 1)
    assert shown == [
        ("<|bos|><|user|>question 1<|end|><|assistant|>", False),
        ("answer 1answer 1<|end|>", True),
    ]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.text(max_size=8)
    | st.sampled_from(["user", "assistant", "gpt", "\ud800"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(["role", "content", "from", "value", "tool_calls", "loss", "function"]),
        inner,
        max_size=4,
    ),
    max_leaves=12,
)  # fmt: skip
COLUMNS = st.sampled_from(
    ["text", "prompt", "completion", "chosen", "rejected", "messages", "conversations"]
    + ["instruction", "input", "output", "system", "history", "tools", "other"]
)
ROWS = st.lists(
    st.dictionaries(COLUMNS, VALUES, max_size=5).map(lambda row: json.dumps(row).encode())
    | st.binary(max_size=30).map(lambda data: data.replace(b"\n", b"")),
    max_size=12,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(rows=ROWS, lm=st.booleans())
def test_no_row_crashes_and_every_row_is_counted(tokenizer, tmp_path_factory, rows, lm):
    path = tmp_path_factory.mktemp("fuzz") / "a.jsonl"
    good = [json.dumps(row).encode() for row in GOOD[:3]]
    path.write_bytes(b"\n".join([*good, *rows]))
    data = spec(str(path), bad_rows=1)
    how = recipe(data, LmSpec() if lm else SftSpec())
    shards = split_work(sources_of(data), tokenizer, how, 64)
    table = merge([str(path)], shards, [tokenise_shard(s, tokenizer, how) for s in shards])
    total = table.total
    assert total.rows == 3 + sum(bool(row.strip()) for row in rows)
    assert total.rows == total.documents + total.bad
    assert total.bad == len(table.bad)
    assert total.documents >= 3
    assert sorted([*table.row.tolist(), *(bad.row for bad in table.bad)]) == list(range(total.rows))
    for index in range(table.documents):
        assert table.document(index)[1][1:].any()
    json.loads(b"[" + table.bad_rows_jsonl().replace(b"\n", b",").rstrip(b",") + b"]")
