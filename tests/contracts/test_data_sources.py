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
from moto.server import ThreadedMotoServer
from transformers import AutoTokenizer

import rayft
from rayft.config.data import DataSpec, SourceSpec
from rayft.config.objectives import SftSpec
from rayft.core.errors import ConfigError, DataError
from rayft.data.sources import resolve
from rayft.data.tokenise import prepare
from rayft.storage.folder import Storage

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
    with pytest.raises(DataError, match=r"(?s)no such object.*did you mean a.jsonl"):
        resolve(SourceSpec(path=f"{uri}/data/aa.jsonl{query}"))


def damage(entry: Storage) -> None:
    """Flip a bit of its tokens."""
    (name,) = (found.name for found in entry.list() if found.name.startswith("tokens-"))
    data = bytearray(entry.read_bytes(name))
    data[len(data) // 2] ^= 1
    entry.write_bytes(name, bytes(data))


def test_s3_cache(bucket, tmp_path, caplog):
    """A cache without local paths is written and read through streams, not mapped."""
    uri, query = bucket
    cache = Storage.open(f"{uri}/cache{query}")
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    data = DataSpec(train=[{"path": f"{uri}/data{query}"}])
    first = prepare(data, SftSpec(), tokenizer, cache)
    names = [entry.name.split("-")[0] for entry in cache.child(first.digest).list()]
    assert names == ["bad_rows", "meta.json", "tokens"]
    again = prepare(data, SftSpec(), tokenizer, cache, run=lambda shards, how: [])
    damage(cache.child(first.digest))
    with caplog.at_level("WARNING"):
        assert prepare(data, SftSpec(), tokenizer, cache).ids.tolist() == first.ids.tolist()
    assert "checksum does not match" in caplog.text
    assert again.documents == 300
    assert again.ids.tolist() == first.ids.tolist()
    assert again.mask.tolist() == first.mask.tolist()
