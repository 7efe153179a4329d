"""Files that are missing, damaged, or hold rows that cannot be read."""

from __future__ import annotations

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayft.config.data import SourceSpec
from rayft.core.errors import ConfigError, DataError
from rayft.data.files import DataFile
from rayft.data.readers import read
from rayft.data.sources import resolve


def rows_of(path):
    source = resolve(SourceSpec(path=str(path)))
    return [raw.row for block in source.blocks(1 << 30) for _, raw in source.read(block)]


def test_missing_file_names_the_nearest(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(b"{}")
    with pytest.raises(DataError, match=r"(?s)no such file.*did you mean .*train\.jsonl") as info:
        resolve(SourceSpec(path=str(tmp_path / "trian.jsonl")))
    assert info.value.exit_code == 3
    assert info.value.where == str(tmp_path / "trian.jsonl")
    with pytest.raises(DataError, match="no file matches"):
        resolve(SourceSpec(path=str(tmp_path / "*.csv")))
    with pytest.raises(DataError, match="no such file"):
        resolve(SourceSpec(path="one", dataset_info=str(tmp_path / "dataset_info.json")))
    with pytest.raises(ConfigError, match="cannot read https://"):
        resolve(SourceSpec(path="https://example.org/a.jsonl"))


def test_files_that_cannot_be_read_are_data_errors(tmp_path):
    """The system's reason, not its exception."""
    (tmp_path / "a.jsonl").write_bytes(b"{}")
    with pytest.raises(DataError, match=r"(?s)cannot read .*cause: File name too long") as info:
        resolve(SourceSpec(path=f"{tmp_path}/{'n' * 300}.jsonl"))
    assert info.value.exit_code == 3
    found = resolve(SourceSpec(path=str(tmp_path / "a.jsonl")))
    (tmp_path / "a.jsonl").unlink()  # gone between the listing and the reading
    with pytest.raises(DataError, match=r"(?s)cannot read .*a\.jsonl.*No such file"):
        found.rows.digests()
    with pytest.raises(DataError, match="cannot read"):
        found.blocks(1)


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "1", '{"one": 1}', "{"])
def test_a_dataset_info_that_is_none(tmp_path, text):
    (tmp_path / "dataset_info.json").write_text(text)
    with pytest.raises(DataError, match=r"dataset_info.json is no"):
        resolve(SourceSpec(path="one", dataset_info=str(tmp_path)))


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


@settings(deadline=None)  # machines under load
@given(st.binary(max_size=400), st.sampled_from([".jsonl", ".json", ".csv", ".tsv", ".txt"]))
def test_no_bytes_crash_a_reader(tmp_path_factory, data, suffix):
    path = tmp_path_factory.mktemp("fuzz") / f"a{suffix}"
    path.write_bytes(data)
    for raw in read(DataFile(str(path), len(data))):
        assert (raw.row is None) == bool(raw.reason)
