"""Logs and records under damage: every reader gives right numbers, or names what it leaves out."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pyarrow.fs import LocalFileSystem

from rayft.records.ledger import (
    LEDGER,
    LedgerContents,
    LedgerTrial,
    fold,
    is_ledger_row,
    read_ledger,
)
from rayft.records.run_progress import BestEvaluation
from rayft.records.run_record import RunRecord
from rayft.records.series import METRICS, is_series_row, missing_lines, read_series
from rayft.report import build
from rayft.storage.backends import ObjectBackend
from rayft.storage.folder import Storage
from rayft.storage.jsonl import LineAppender, read_jsonl, read_log
from rayft.storage.sealed import BadRecord, read_lines
from rayft.trials.report_replay import missed_reports
from tests.ledgers import write_sweep

FLIPS = 3000
STEPS = range(10, 100, 10)


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def trials_of(data: bytes) -> LedgerContents:
    found = read_lines([data], is_ledger_row)
    return fold(found.rows, LedgerContents(damage=found.damage))


def reports_of(trial: LedgerTrial) -> set[tuple[int, str]]:
    return {(r.step, json.dumps(r.metrics, sort_keys=True)) for r in trial.reports}


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    home = write_sweep(tmp_path_factory.mktemp("sweep"), 12)
    return home.read_bytes(LEDGER)


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    home = Storage.open(str(tmp_path_factory.mktemp("run")))
    write_series(home)
    return home.read_bytes(METRICS)


def write_series(home: Storage, **options: Any) -> None:
    with LineAppender(home, METRICS, **options) as log:
        log.append({"step": 0, "split": "eval", "loss": 6.0, "eval_loss": 6.0})
        for step in STEPS:
            log.append({"step": step, "split": "train", "loss": 5 - step / 50, "tokens": 7 * step})
            log.append({"step": step, "split": "eval", "loss": 4 - step / 50, "eval_loss": 4.0})
            log.flush()


def old(data: bytes) -> bytes:
    """The file as it was before there were checksums."""
    rows = [json.loads(line) for line in data.splitlines()]
    kept = [{k: v for k, v in row.items() if k not in ("line", "crc")} for row in rows]
    return b"".join(json.dumps(row).encode() + b"\n" for row in kept)


def test_no_bit_of_a_ledger_changes_a_number_without_a_word(ledger: bytes) -> None:
    draw, whole, changed, told = random.Random(7), trials_of(ledger), 0, 0
    assert whole.damage == () and len(whole.trials) > 12
    for bit in draw.sample(range(len(ledger) * 8), FLIPS):
        book = trials_of(flipped(ledger, bit))
        if not book.damage:
            assert book == whole, bit
            continue
        assert sum(one.last - one.first + 1 for one in book.damage) <= 2, bit
        named = {name for one in book.damage for name in one.trials}
        for name, trial in whole.trials.items():
            found = book.trials.get(name)
            assert found is None or reports_of(found) <= reports_of(trial), bit
            if found != trial:
                changed, told = changed + 1, told + (name in named)
    assert told > 0.9 * changed > 0.3 * FLIPS  # the others were hit in the very name


def test_no_bit_of_a_series_changes_a_number_without_a_word(series: bytes) -> None:
    draw, whole = random.Random(8), read_lines([series], is_series_row)
    assert len(whole.rows) == 19 and whole.last == 19 and not whole.damage
    for bit in draw.sample(range(len(series) * 8), FLIPS):
        found = read_lines([flipped(series, bit)], is_series_row)
        assert found.damage or found.rows == whole.rows, bit
        assert all(row in whole.rows for row in found.rows), bit


def damages(data: bytes, draw: random.Random) -> list[tuple[str, bytes]]:
    """Larger ones, each with its name."""
    lines, size = data.splitlines(keepends=True), len(data)
    start = draw.randrange(size - 200)
    one, other = sorted(draw.sample(range(1, len(lines) - 1), 2))
    swapped = lines.copy()
    swapped[one], swapped[other] = swapped[other], swapped[one]
    return [
        ("zeroed", data[:start] + b"\0" * 200 + data[start + 200 :]),
        ("cut out", data[:start] + data[start + 200 :]),
        ("a line gone", b"".join(lines[:one] + lines[one + 1 :])),
        ("not utf-8", data[:start] + b"\xff\xfe\xc0" + data[start + 3 :]),
        ("overwritten", data[:start] + data[:200] + data[start + 200 :]),
        ("a line twice", b"".join([*lines, lines[one]])),
        ("all twice", data + data),
        ("two lines swapped", b"".join(swapped)),
    ]


def test_larger_damage_is_told_too_or_does_none(ledger: bytes, series: bytes) -> None:
    draw, whole = random.Random(9), trials_of(ledger)
    rows = read_lines([series]).rows
    for _ in range(60):
        for name, data in damages(ledger, draw):
            book = trials_of(data)
            assert book.damage or name == "two lines swapped" or book == whole, name
            for trial in book.trials.values():
                assert reports_of(trial) <= reports_of(whole.trials[trial.id]), name
        for name, data in damages(series, draw):
            found = read_lines([data], is_series_row)
            assert all(row in rows for row in found.rows), name
            assert found.damage or sorted(map(str, found.rows)) == sorted(map(str, rows)), name


def test_a_torn_end_is_no_damage(ledger: bytes) -> None:
    ends = [index + 1 for index, byte in enumerate(ledger) if byte == 10]
    for cut in random.Random(10).sample(range(ends[3], len(ledger)), 200):
        whole = max(end for end in ends if end <= cut)
        found = trials_of(ledger[:cut])
        complete = ledger[:cut] in (ledger[: end - 1] for end in ends)
        assert found == trials_of(ledger[:cut] + b"\n" if complete else ledger[:whole])
        assert found.damage == ()


def test_a_killed_writer_leaves_nothing_behind_once_the_file_goes_on(tmp_path: Path) -> None:
    run, file = Storage.open(str(tmp_path)), tmp_path / METRICS
    write_series(run)
    whole, rows = file.read_bytes(), read_jsonl(run, METRICS)
    last = whole.rstrip().rfind(b"\n") + 1
    for cut in (last + 1, len(whole) - 30, len(whole) - 2):  # the last: all but "}\n"
        file.write_bytes(whole[:cut])
        with LineAppender(run, METRICS) as log:
            log.append(rows[-1])
        assert file.read_bytes() == whole
    file.write_bytes(whole[:-1])  # only its end is missing
    with LineAppender(run, METRICS) as log:
        log.append({"step": 100, "split": "train", "loss": 1.0})
    assert [json.loads(line)["line"] for line in file.read_bytes().splitlines()] == [*range(1, 21)]
    assert read_log(run, METRICS).damage == ()


def test_damage_before_a_restart_is_still_told_after_it(tmp_path: Path) -> None:
    run, file = Storage.open(str(tmp_path)), tmp_path / METRICS
    write_series(run)
    whole = file.read_bytes()
    for place in (300, len(whole) - 40, len(whole) - 1):  # in the middle, the last line, its end
        file.write_bytes(flipped(whole, 8 * place))
        with LineAppender(run, METRICS) as log:
            log.append({"step": 100, "split": "train", "loss": 1.0})
        found = read_log(run, METRICS)
        assert found.rows[-1]["step"] == 100 and found.last == 20
        assert bool(found.damage) == (place < len(whole) - 1)


@pytest.mark.parametrize("far", [False, True], ids=["folder", "object store"])
def test_an_old_file_is_read_and_continued(far: bool, tmp_path: Path, series: bytes) -> None:
    root = str(tmp_path)
    run = Storage(ObjectBackend(LocalFileSystem()), root, f"objects://{root}") if far else None
    run = run or Storage.open(root)
    run.write_bytes(METRICS, old(series))
    rows = read_jsonl(run, METRICS)
    assert rows == list(read_lines([series]).rows)
    with LineAppender(run, METRICS) as log:
        assert log.lines == len(rows)
        log.append({"step": 100, "split": "train", "loss": 1.0})
    found = read_log(run, METRICS)
    assert found.damage == () and found.last == 20 and len(found.rows) == 20


def test_an_old_line_behind_new_ones_is_damage_not_history(series: bytes) -> None:
    lines = series.splitlines(keepends=True)
    without = old(lines[5])
    assert read_lines([b"".join([*lines[:5], without, *lines[6:]])]).damage[0].first == 6
    first = lines[0].replace(b'"crc"', b'"crd"')  # its own key: the line is no old one
    assert read_lines([b"".join([first, *lines[1:]])]).damage[0].first == 1
    assert read_lines([first]).damage[0].first == 1


def test_damage_that_checksums_cannot_tell_ends_in_no_keyerror(
    ledger: bytes, series: bytes
) -> None:
    """Lines of before: a flip may change a number unseen, but what is no line is told."""
    draw, bare = random.Random(11), old(ledger)
    for bit in draw.sample(range(len(bare) * 8), 1000):
        trials_of(flipped(bare, bit))
    keyless = bare.replace(b'"status"', b'"statut"', 1)
    assert trials_of(keyless).damage[0].first == 1
    bare = old(series)
    for bit in draw.sample(range(len(bare) * 8), 1000):
        for row in read_lines([flipped(bare, bit)], is_series_row).rows:
            assert isinstance(row["step"], int) and isinstance(row["loss"], int | float)


def test_a_part_that_is_lost_on_an_object_store_is_told(tmp_path: Path) -> None:
    root = str(tmp_path)
    far = Storage(ObjectBackend(LocalFileSystem()), root, f"objects://{root}")
    write_series(far, part_bytes=300)
    parts = sorted(path.name for path in tmp_path.iterdir())
    assert len(parts) > 3 and read_log(far, METRICS).damage == ()
    rows, first = read_jsonl(far, METRICS), parts[-1]  # metrics.jsonl sorts behind its parts
    assert first == METRICS
    (tmp_path / parts[1]).unlink()
    gap = read_log(far, METRICS).damage[0]
    lost = gap.last - gap.first + 1
    assert len(read_jsonl(far, METRICS)) == len(rows) - lost and lost > 0
    with LineAppender(far, METRICS) as log:  # behind all others, not where the lost one was
        log.append({"step": 100, "split": "train", "loss": 1.0})
    assert not (tmp_path / parts[1]).exists() and read_jsonl(far, METRICS)[-1]["step"] == 100


def test_a_second_writer_that_dies_slowly_takes_no_line_of_the_first(tmp_path: Path) -> None:
    run = Storage.open(str(tmp_path))
    slow, new = LineAppender(run, METRICS), LineAppender(run, METRICS)
    for step in range(1, 5):
        slow.append({"step": step, "loss": 1.0, "by": "slow"})
        new.append({"step": step, "loss": 2.0, "by": "new"})
    found = read_log(run, METRICS)
    assert found.damage == () and len(found.rows) == 8
    slow.close()
    new.close()


# --- the readers of a sweep and of a run ---


def test_the_report_names_what_it_leaves_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    home = write_sweep(tmp_path, 8)
    build(home.uri)
    data, table = home.read_bytes(LEDGER), home.read_bytes("trials.csv")
    draw = random.Random(12)
    for bit in draw.sample(range(len(data) * 8), 5):
        home.write_bytes(LEDGER, flipped(data, bit))
        damage = read_ledger(home).damage
        with caplog.at_level(logging.WARNING):
            caplog.clear()
            build(home.uri)
        if home.read_bytes("trials.csv") != table or damage:
            assert f"{LEDGER} is damaged and not used: {damage[0]}" in home.read_text("report.html")
            assert str(damage[0]) in caplog.text


def test_what_is_told_again_is_right_or_missing_with_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    home = Storage.open(str(tmp_path))
    write_series(home)
    record = RunRecord("t1", "running", {}, "h", steps_total=100, base={"eval_loss": 6.0})
    home.write_text("run.json", record.to_json())
    whole, data = missed_reports(home, 0, 90), home.read_bytes(METRICS)
    assert [one.step for one in whole] == list(STEPS)
    for bit in random.Random(13).sample(range(len(data) * 8), 300):
        home.write_bytes(METRICS, flipped(data, bit))
        caplog.clear()
        found = missed_reports(home, 0, 90)
        if found != whole:
            assert "damaged and not used" in caplog.text, bit
            assert {one.step for one in found} <= {one.step for one in whole}


@pytest.mark.parametrize("what", ["cut", "zeroed", "gone"])
def test_metrics_that_lost_their_end_are_told(what: str, tmp_path: Path) -> None:
    home, file = Storage.open(str(tmp_path)), tmp_path / METRICS
    write_series(home)
    whole = file.read_bytes()
    assert missing_lines(home, 19) == []
    left: dict[str, Callable[[], Any]] = {
        "cut": lambda: file.write_bytes(whole[: whole.find(b"\n", 400) + 1]),
        "zeroed": lambda: file.write_bytes(b"\0" * len(whole)),
        "gone": file.unlink,
    }
    left[what]()
    (said,) = missing_lines(home, 19)
    assert "of the 19 lines it had: its curve has a gap" in said
    assert (read_series(home) == []) == (what != "cut")


def test_no_bit_of_a_record_changes_a_value_without_a_word() -> None:
    best = BestEvaluation(40, 3.25, "step-40-1")
    record = RunRecord("r", "done", {"a": {"b": [1]}}, "h" * 16, eval={"eval_loss": 3.2}, best=best)
    data, told = record.to_json().encode(), 0
    for bit in range(len(data) * 8):
        try:
            assert RunRecord.from_json(flipped(data, bit)) == record, bit
        except BadRecord:
            told += 1
    assert told > len(data) * 7
    for other in (b"", b"[]", b"{}", b'{"name": 3}', b"\xff\xfe", b"[" * 10**5, data[:-20]):
        with pytest.raises(BadRecord):
            RunRecord.from_json(other)
    reformatted = json.dumps(json.loads(data), indent=7)
    assert RunRecord.from_json(reformatted) == record
    before = {k: v for k, v in json.loads(data).items() if k != "crc32"}
    assert RunRecord.from_json(json.dumps(before)) == record
