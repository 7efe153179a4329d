"""Every place rows can come from gives the same rows; what is wrong is named."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.feather
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from moto.server import ThreadedMotoServer
from transformers import AutoTokenizer

import rayft
from rayft.config.data import DataSpec, SourceSpec
from rayft.config.objectives import SftSpec
from rayft.core.errors import ConfigError, DataError
from rayft.core.storage import Storage
from rayft.data import prepare
from rayft.data.files import File
from rayft.data.readers import read
from rayft.data.sources import resolve

TINY = Path(rayft.__file__).parent / "models" / "tiny"
ROWS = [{"prompt": f'question {i} é\n"x", y', "completion": f"answer {i}"} for i in range(300)]
TABLE = pa.Table.from_pylist(ROWS)


def rows_of(path, size=1 << 30, **spec):
    source = resolve(SourceSpec(path=str(path), **spec))
    return [raw.row for block in source.blocks(size) for _, raw in source.read(block)]


def lines(rows=ROWS) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def write_jsonl(path):
    path.write_bytes(lines())


def write_json(path):
    path.write_text(json.dumps(ROWS, indent=1))


def write_lines_in_json(path):
    path.write_bytes(lines())


def write_gzip(path):
    path.write_bytes(gzip.compress(lines()))


def write_csv(path):
    pa.csv.write_csv(TABLE, path)


def write_parquet(path):
    pa.parquet.write_table(TABLE, path, row_group_size=40)


def write_ipc(path):
    pa.feather.write_feather(TABLE, path)


def write_stream(path):
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, TABLE.schema) as writer:
        writer.write_table(TABLE, max_chunksize=50)


FORMATS = {
    "a.jsonl": write_jsonl,
    "a.ndjson": write_jsonl,
    "a.json": write_json,
    "lines.json": write_lines_in_json,
    "a.jsonl.gz": write_gzip,
    "a.csv": write_csv,
    "a.parquet": write_parquet,
    "a.arrow": write_ipc,
    "stream.arrow": write_stream,
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats_whole_and_in_pieces(tmp_path, name):
    path = tmp_path / name
    FORMATS[name](path)
    assert rows_of(path) == ROWS
    assert rows_of(path, size=1000) == ROWS
    assert rows_of(path, samples=7) == ROWS[:7]


def test_folder_glob_relative_home(tmp_path, monkeypatch):
    (tmp_path / "data" / "sub").mkdir(parents=True)
    (tmp_path / "data" / "b.jsonl").write_bytes(lines(ROWS[100:200]))
    (tmp_path / "data" / "a.jsonl").write_bytes(lines(ROWS[:100]))
    (tmp_path / "data" / "sub" / "c.jsonl").write_bytes(lines(ROWS[200:]))
    (tmp_path / "data" / ".hidden.jsonl").write_bytes(b"x")
    (tmp_path / "data" / "README.md").write_text("x")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert rows_of("data") == ROWS
    assert rows_of("data/**/*.jsonl") == ROWS
    assert rows_of("data/[ab].jsonl") == ROWS[:200]
    assert rows_of("~/data/a.jsonl") == ROWS[:100]
    assert rows_of(f"file://{tmp_path}/data/a.jsonl") == ROWS[:100]


def test_txt_is_a_document_per_line(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbffirst\r\n\n  second\n")
    assert rows_of(tmp_path / "a.txt") == [{"text": "first"}, {"text": "  second"}]


def test_builtin_splits():
    train = rows_of("builtin:arith", samples=5)
    source = resolve(SourceSpec(path="builtin:arith", samples=5), heldout=True)
    held = [raw.row for _, raw in source.read(source.blocks(1)[0])]
    assert len(train) == len(held) == 5
    assert train != held
    with pytest.raises(ConfigError, match="did you mean 'arith'"):
        resolve(SourceSpec(path="builtin:arit"))


def test_saved_by_datasets(tmp_path):
    import datasets

    made = datasets.Dataset.from_list(ROWS)
    made.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": made, "test": made.select(range(9))}).save_to_disk(
        str(tmp_path / "two")
    )
    assert rows_of(tmp_path / "one") == ROWS
    assert rows_of(tmp_path / "one", size=500) == ROWS
    assert rows_of(tmp_path / "two", split="test") == ROWS[:9]
    with pytest.raises(DataError, match="split 'val'"):
        rows_of(tmp_path / "two", split="val")


def test_hub_id_uses_datasets(tmp_path, monkeypatch):
    """`datasets` reads org/name as a folder too: the hub path without a network."""
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "x").mkdir()
    (tmp_path / "work" / "x" / "train.jsonl").write_bytes(lines())
    monkeypatch.chdir(tmp_path / "work")
    from rayft.data.sources import DatasetRows

    rows = DatasetRows(str(tmp_path / "work" / "x"))
    assert [raw.row for block in rows.blocks(1 << 30) for raw in rows.read(block)] == ROWS
    import datasets
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # read at its import
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="cannot load the hub data set 'nobody/nothing-here'"):
        resolve(SourceSpec(path="nobody/nothing-here")).blocks(1)


@pytest.fixture(scope="module")
def bucket():
    """(uri prefix, query) of an S3 bucket that holds data/a.jsonl, data/b.parquet."""
    keys = {
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    before = {key: os.environ.get(key) for key in keys}
    os.environ.update(keys)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    query = f"?scheme=http&endpoint_override={host}:{port}&region=us-east-1"
    from pyarrow import fs

    system, path = fs.FileSystem.from_uri(f"s3://corpus{query}&allow_bucket_creation=true")
    system.create_dir(path)
    with system.open_output_stream("corpus/data/a.jsonl") as out:
        out.write(lines(ROWS[:100]))
    with system.open_output_stream("corpus/data/b.parquet") as out:
        pa.parquet.write_table(TABLE.slice(100), out)
    yield "s3://corpus", query
    server.stop()
    for key, value in before.items():
        if value is None:
            del os.environ[key]
        else:
            os.environ[key] = value


def test_s3(bucket):
    uri, query = bucket
    assert rows_of(f"{uri}/data/a.jsonl{query}") == ROWS[:100]
    assert rows_of(f"{uri}/data{query}") == ROWS
    assert rows_of(f"{uri}/data/*.parquet{query}") == ROWS[100:]
    found = resolve(SourceSpec(path=f"{uri}/data/a.jsonl{query}"))
    assert list(found.rows.digests()) == ["s3://corpus/data/a.jsonl"]
    with pytest.raises(ConfigError, match=r"(?s)no such object.*did you mean a.jsonl"):
        resolve(SourceSpec(path=f"{uri}/data/aa.jsonl{query}"))


def test_s3_cache(bucket, tmp_path):
    """A cache without local paths is written and read through streams, not mapped."""
    uri, query = bucket
    cache = Storage.open(f"{uri}/cache{query}")
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    data = DataSpec(train=[{"path": f"{uri}/data{query}"}])
    first = prepare(data, SftSpec(), tokenizer, cache)
    names = {entry.name for entry in cache.child(first.digest).list()}
    assert names == {"tokens.arrow", "bad_rows.jsonl", "meta.json"}
    again = prepare(data, SftSpec(), tokenizer, cache, run=lambda shards, how: [])
    assert again.documents == 300
    assert again.ids.tolist() == first.ids.tolist()
    assert again.mask.tolist() == first.mask.tolist()


# --- LLaMA-Factory ---

INFO = {
    "alpaca": {"file_name": "alpaca.json", "num_samples": 1},
    "renamed": {
        "file_name": "renamed.json",
        "columns": {"prompt": "q", "query": "ctx", "response": "a", "system": "sys"},
    },
    "chat": {
        "file_name": "chat.jsonl",
        "formatting": "sharegpt",
        "columns": {"messages": "dialog", "tools": "apis"},
        "tags": {
            "role_tag": "who", "content_tag": "says", "user_tag": "U", "assistant_tag": "A",
            "observation_tag": "O", "function_tag": "F", "system_tag": "S",
        },
    },
    "openai": {"file_name": "openai.jsonl", "formatting": "openai"},
    "pairs": {
        "file_name": "pairs.json",
        "ranking": True,
        "columns": {"prompt": "q", "chosen": "good", "rejected": "poor"},
    },
    "chat_pairs": {
        "file_name": "chat_pairs.json",
        "ranking": True,
        "formatting": "sharegpt",
        "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"},
    },
    "corpus": {"file_name": "corpus.txt", "columns": {"prompt": "text"}},
    "scripted": {"script_url": "load_me"},
    "pictures": {"file_name": "p.json", "columns": {"images": "images"}},
}  # fmt: skip
FILES = {
    "alpaca.json": [{"instruction": "a", "input": "b", "output": "c"}] * 2,
    "renamed.json": [{"q": "a", "ctx": "b", "a": "c", "sys": "d"}],
    "chat.jsonl": {"dialog": [{"who": "U", "says": "a"}, {"who": "A", "says": "c"}], "apis": "[]"},
    "openai.jsonl": {
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "c"}]
    },
    "pairs.json": [{"q": "a", "good": "c", "poor": "d"}],
    "chat_pairs.json": [
        {
            "conversations": [{"from": "human", "value": "a"}],
            "chosen": {"from": "gpt", "value": "c"},
            "rejected": {"from": "gpt", "value": "d"},
        }
    ],
    "corpus.txt": "c",
}


@pytest.fixture
def factory(tmp_path) -> Path:
    for name, content in FILES.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / name).write_text(text)
    (tmp_path / "dataset_info.json").write_text(json.dumps(INFO))
    return tmp_path


def said(example):
    """What is asked (None: nothing) and what is answered."""
    example = getattr(example, "chosen", example)
    if hasattr(example, "messages"):
        asked = [turn["content"] for turn in example.messages if turn["role"] == "user"]
        return asked[-1], example.messages[-1]["content"]
    return getattr(example, "prompt", None), getattr(example, "completion", None) or example.text


@pytest.mark.parametrize("name", [name for name in INFO if name not in ("scripted", "pictures")])
def test_dataset_info_as_it_is(factory, name):
    source = resolve(SourceSpec(path=name, dataset_info=str(factory)))
    raws = [raw for block in source.blocks(1 << 20) for _, raw in source.read(block)]
    assert len(raws) == 1
    asked, answered = said(source.layout.parse(raws[0].row))
    assert answered == "c"
    assert asked in (("a", "a\nb") if name != "corpus" else (None,))


def test_dataset_info_refusals(factory):
    info = str(factory / "dataset_info.json")
    for name, reason in {
        "alpca": "did you mean 'alpaca'",
        "scripted": "loading script",
        "pictures": "does not use the column 'images'",
    }.items():
        with pytest.raises(ConfigError, match=reason):
            resolve(SourceSpec(path=name, dataset_info=info))


# --- what is wrong ---


def test_missing_file_names_the_nearest(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(lines())
    with pytest.raises(ConfigError, match=r"(?s)no such file.*did you mean .*train\.jsonl") as info:
        resolve(SourceSpec(path=str(tmp_path / "trian.jsonl")))
    assert info.value.exit_code == 2
    with pytest.raises(ConfigError, match="no file matches"):
        resolve(SourceSpec(path=str(tmp_path / "*.csv")))
    with pytest.raises(ConfigError, match="cannot read https://"):
        resolve(SourceSpec(path="https://example.org/a.jsonl"))


def test_damaged_tables_name_the_file(tmp_path):
    for name in ("a.parquet", "a.arrow", "a.jsonl.gz"):
        (tmp_path / name).write_bytes(b"nonsense" * 9)
        with pytest.raises(DataError, match=name):
            rows_of(tmp_path / name)


def test_bad_lines_have_their_number(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n\n{"text": "\xff"}\n{"text": \n[1]\n{"text": "b"}\n')
    for size in (1 << 20, 3):
        source = resolve(SourceSpec(path=str(path)))
        found = [raw for block in source.blocks(size) for _, raw in source.read(block)]
        assert [raw.line for raw in found] == [1, 3, 4, 5, 6]
        assert [bool(raw.reason) for raw in found] == [False, True, True, True, False]
        assert "invalid UTF-8" in found[1].reason


def test_csv_rows_of_another_width(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('prompt,completion\n"two\nlines",b\nonly one\nx,y\n')
    source = resolve(SourceSpec(path=str(path)))
    found = [raw for _, raw in source.read(source.blocks(1)[0])]
    assert [raw.line for raw in found] == [2, 4, 5]
    assert found[1].reason == "1 fields where the header has 2"


def test_arrow_strings_that_are_not_utf8(tmp_path):
    raw = pa.array([b"good", b"\xff\xfe"], pa.binary())
    column = pa.Array.from_buffers(pa.string(), 2, raw.buffers())
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink:
        batch = pa.record_batch({"text": column})
        with pa.ipc.new_file(sink, batch.schema) as writer:
            writer.write_batch(batch)
    source = resolve(SourceSpec(path=str(tmp_path / "a.arrow")))
    found = [raw for _, raw in source.read(source.blocks(1)[0])]
    assert [raw.row for raw in found] == [{"text": "good"}, None]


@given(st.binary(max_size=400), st.sampled_from([".jsonl", ".json", ".csv", ".tsv", ".txt"]))
def test_no_bytes_crash_a_reader(tmp_path_factory, data, suffix):
    path = tmp_path_factory.mktemp("fuzz") / f"a{suffix}"
    path.write_bytes(data)
    for raw in read(File(str(path), len(data))):
        assert (raw.row is None) == bool(raw.reason)
