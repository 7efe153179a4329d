"""The report of a sweep, from ledgers that a fixed rule makes: the page, the table, the study."""

from __future__ import annotations

import base64
import csv
import gzip
import io
import json
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import plotly.graph_objects as go
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from rayft import cli
from rayft.records.ledger import Ledger
from rayft.records.run_record import SweepRecord
from rayft.report import build, write_report
from rayft.report.facts import read_facts
from rayft.report.page import page
from rayft.storage.folder import Storage
from tests.ledgers import BASE, write_sweep
from tests.webpage import Reader

EVIL = '</script><img src=x onerror="alert(1)">&amp;@ink'


def read(home: Storage) -> Reader:
    write_report(home)
    return Reader(home.read_text("report.html"))


def test_the_page_says_what_won_and_by_how_much(tmp_path: Path) -> None:
    home = write_sweep(tmp_path, 40, lost=0.95)
    page, facts = read(home), read_facts(home)
    assert facts.best is not None and facts.best.value is not None and facts.spread is not None
    lead = f"The best trial, {facts.best.trial.id}, brings eval_loss from {BASE:.3f} (base model)"
    assert f"{lead} to {facts.best.value:.3f} ." in page.text
    assert facts.median is not None and f"at {facts.median:.3f}, counting" in page.text
    # two repetitions, 0.012 and 0.024 above the winner: mean + 0.018, sample deviation 0.0085
    assert facts.spread.mean == pytest.approx(facts.best.value + 0.018)
    assert facts.spread.deviation == pytest.approx(0.012 / 2**0.5)
    assert "Repeated with 2 other seeds" in page.text
    for status, said in (("done", "ran to the end"), ("stopped", "stopped early")):
        assert f"{facts.count(status)} {said}" in page.text
    best = f"{home.shown()}/best"
    for line in (
        f"rayft export {best} --merge", f"rayft eval {best} --generate 64",
        f"rayft train {best}/config.yaml",
    ):  # fmt: skip
        assert line in page.text
    assert "OutOfMemoryError: 2 GiB asked for, 1 GiB there" in page.text
    assert "Traceback" not in page.text, "the first line only"


def test_every_part_is_there(tmp_path: Path) -> None:
    page = read(write_sweep(tmp_path, 40, lost=0.95))
    ids = [figure["id"] for figure in page.figures]
    assert ids == [
        "strip", "importance", "parallel", "slice-0", "slice-1", "slice-2", "slice-3",
        "surface-0", "surface-1", "surface-2", "curves",
        "cost-seconds", "cost-memory", "cost-params_trainable",
    ]  # fmt: skip
    places = [a for _, a in page.tags if a.get("class") == "chart"]
    assert [place["id"] for place in places] == ids
    assert all(place["role"] == "img" and place["aria-label"] for place in places)
    named = {figure["id"]: figure["figure"] for figure in page.figures}
    axes = named["surface-0"]["layout"]
    assert axes["annotations"][0]["text"] == "lr" and axes["xaxis"]["type"] == "log"
    assert axes["yaxis"]["title"]["text"] == "rank"
    assert named["surface-1"]["layout"]["yaxis"]["title"]["text"] == "lr_ratio"
    assert "contour" in [trace["type"] for trace in named["surface-0"]["data"]]
    heads = ("What mattered", "Learning curves", "How full the packs were", "Every trial")
    assert all(head in page.text for head in heads)
    rows = [a for tag, a in page.tags if tag == "td" and (a.get("data-v") or "").startswith("t00")]
    assert len(rows) == 42, "40 trials and two repetitions"


def test_plotly_accepts_every_figure(tmp_path: Path) -> None:
    colours = {"@scale": "Viridis"}
    for trials in (2, 6, 40):
        for entry in read(write_sweep(tmp_path / str(trials), trials)).figures:
            text = json.dumps(entry["figure"])
            text = re.sub(r'"@[a-z]+[0-9]*"', lambda m: _colour(m[0], colours), text)
            go.Figure(json.loads(text))  # raises at a property or a value that Plotly has not


def _colour(name: str, known: dict[str, str]) -> str:
    return json.dumps(known.get(name.strip('"'), "#123456"))


def test_nothing_is_loaded_from_elsewhere(tmp_path: Path) -> None:
    home = write_sweep(tmp_path, 12)
    page = read(home)
    loading = ("src", "href", "srcset", "action", "poster", "data", "background")
    assert [(t, a) for t, a in page.tags if set(loading) & set(a)] == []
    assert not {"link", "iframe", "object", "embed", "base"} & {tag for tag, _ in page.tags}
    css, script = page.scripts["style"], page.scripts["script"]
    assert "url(" not in css and "@import" not in css
    assert not re.search(r"fetch\(|XMLHttpRequest|import\(|https?:", script)
    rest = home.read_text("report.html").replace(page.scripts["plotly"], "")
    assert "http://" not in rest and "https://" not in rest
    policy = next(a["content"] for t, a in page.tags if t == "meta" and "http-equiv" in a)
    assert policy is not None and policy.startswith("default-src 'none';")
    library = gzip.decompress(base64.b64decode(page.scripts["plotly"]))
    assert library.decode().lstrip().startswith("/**\n* plotly.js")


def test_what_users_write_stays_text(tmp_path: Path) -> None:
    space = {
        "model.revision": {"choice": [EVIL, "@ink"]},
        "optim.lr": {"loguniform": [1e-5, 1e-2]},
        "methods.0.rank": {"choice": [4, 8]},
    }
    home = write_sweep(tmp_path, 15, space=space)
    book = Ledger(home)
    for number, text in enumerate((EVIL, "@ink", EVIL)):
        params = {"model.revision": text, "optim.lr": 1e-3, "methods.0.rank": 4}
        metrics = {"eval_loss": 3.0 + number}
        book.add(
            f"t9{number}{EVIL}", "failed" if number else "done", 10, params, metrics, error=EVIL
        )
    book.close()
    record = SweepRecord.from_json(home.read_text("sweep.json"))
    record = replace(record, name=EVIL, status="failed", error=EVIL)
    home.write_text("sweep.json", record.to_json())
    page = read(home)
    assert "img" not in [tag for tag, _ in page.tags]
    assert [a for _, a in page.tags if any(name.startswith("on") for name in a)] == []
    assert EVIL in page.text
    told = page.scripts["figures"]
    assert "<" not in told, "no tag can end the script"
    shown = re.findall(r'[^"]*revision [^"]*', told)
    assert shown and all("<img" not in text and "\\u003cimg" not in text for text in shown)
    axes = [figure["figure"]["layout"].get("xaxis", {}) for figure in page.figures]
    texts = [text for axis in axes for text in axis.get("ticktext", ())]
    assert "&#64;ink" in texts and not [t for t in texts if t.startswith("@") or "<" in t]


def test_the_table_comes_back_as_it_was_and_starts_no_formula(tmp_path: Path) -> None:
    home = write_sweep(tmp_path, 20)
    book = Ledger(home)
    book.add(
        "t9999", "failed", 3, {"optim.lr": 0.5, "methods.0.rank": 4}, error="=cmd|' /C calc'!A0"
    )
    book.close()
    write_report(home)
    rows = list(csv.DictReader(io.StringIO(home.read_text("trials.csv"))))
    facts = read_facts(home)
    assert [row["trial"] for row in rows] == [r.trial.id for r in (*facts.rows, *facts.repeats)]
    for row, known in zip(rows, (*facts.rows, *facts.repeats), strict=True):
        assert float(row["optim.lr"]) == known.trial.params["optim.lr"]
        assert row["status"] == known.trial.status and int(row["last_step"]) == known.trial.step
        assert (float(row["eval_loss"]) if row["eval_loss"] else None) == known.value
    evil = next(row for row in rows if row["trial"] == "t9999")
    assert evil["error"] == "'=cmd|' /C calc'!A0" and evil["methods.0.alpha"] == ""
    assert rows[-1]["repeats"] == rows[-2]["repeats"] != ""


@pytest.mark.parametrize("mode", ["min", "max"])
def test_the_study_opens_in_optuna_and_agrees(mode: str, tmp_path: Path) -> None:
    home = write_sweep(tmp_path, 40, mode=mode, seeds=1, lost=0.95)
    write_report(home)
    backend = JournalFileBackend(str(home.local_path("optuna-journal.log")))
    study = optuna.load_study(study_name=None, storage=JournalStorage(backend))
    facts = read_facts(home)
    done = [row for row in facts.ranked() if row.trial.status == "done"]
    assert study.best_trial.user_attrs["trial"] == done[0].trial.id
    assert study.best_value == done[0].value and len(study.trials) == 40
    states = {"done": TrialState.COMPLETE, "stopped": TrialState.PRUNED}
    for trial, row in zip(study.trials, facts.rows, strict=True):
        assert trial.params == row.trial.params
        assert trial.state == states.get(row.trial.status, TrialState.FAIL)
        told = {report.step: report.metrics["eval_loss"] for report in row.trial.reports}
        assert trial.intermediate_values == told
    assert study.trials[0].distributions["optim.lr"].log is True


def test_values_outside_the_space_and_paired_ones(tmp_path: Path) -> None:
    pair = [{"optim.lr": 1e-4, "methods.0.rank": 4}, {"methods.0.rank": 8, "optim.lr": 1e-3}]
    space = {"size": {"paired": pair}, "optim.weight_decay": {"uniform": [0.0, 0.1]}}
    home = write_sweep(tmp_path, 0, space=space)
    book = Ledger(home)
    for number, decay in enumerate((0.05, 0.3)):  # population-based training may leave the space
        params = pair[number] | {"optim.weight_decay": decay}
        book.add(f"t{number}", "done", 90, params, {"eval_loss": 3.0 + number})
    book.close()
    page, facts = read(home), read_facts(home)
    by_label = {axis.label: axis for axis in facts.axes}
    assert set(by_label) == {"lr", "rank", "weight_decay"}  # a paired dimension is its fields
    assert by_label["weight_decay"].high == 0.3
    assert by_label["rank"].levels == ("4", "8") and "4, 8" in page.text
    backend = JournalFileBackend(str(home.local_path("optuna-journal.log")))
    trials = optuna.load_study(study_name=None, storage=JournalStorage(backend)).trials
    assert (trials[1].params["methods.0.rank"], trials[1].params["optim.lr"]) == (8, 1e-3)


@pytest.mark.parametrize(
    ("trials", "options", "said"),
    [
        (0, {"status": "running"}, "No trial has started."),
        (1, {"seeds": 1}, "The best trial, t0001,"),
        (8, {"status": "diverged", "lost": -1.0}, "Every trial diverged, so there is no winner."),
        (20, {"status": "running"}, "The sweep is still running: 18 of 20 trials are over."),
        (20, {"status": "interrupted", "best": False}, "best/ is written when the sweep ends"),
        (6, {"status": "failed"}, "The sweep failed: RayftError: out of patience"),
        (6, {}, "Importance needs at least 12 trials with a result; there are 5."),
        (20, {"packs": 0}, "no trial was packed"),
        (20, {"pbt": True, "search": "random", "scheduler": "pbt"}, "Weights were taken over"),
    ],
)  # fmt: skip
def test_a_sweep_in_any_state_gives_a_useful_page(
    trials: int, options: dict[str, Any], said: str, tmp_path: Path
) -> None:
    page = read(write_sweep(tmp_path, trials, **options))
    assert said in page.text
    assert "NaN" not in page.scripts["figures"] and "None" not in page.text


def test_a_thousand_trials_are_a_page_of_a_few_megabytes(tmp_path: Path) -> None:
    home = write_sweep(tmp_path, 1000, lost=0.95)
    began = time.perf_counter()
    write_report(home)
    assert time.perf_counter() - began < 20, "about 3 s on an idle core"
    assert len(home.read_bytes("report.html")) < 5_000_000


def test_the_command_names_its_files_or_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = write_sweep(tmp_path, 3)
    assert cli.main(["report", home.uri]) == 0
    written = capsys.readouterr().out.splitlines()
    assert [Path(path).name for path in written] == [
        "trials.csv", "optuna-journal.log", "report.html",
    ]  # fmt: skip
    assert all(Path(path).stat().st_size for path in written)
    assert build(home.uri) == written
    assert cli.main(["report", str(tmp_path)]) == 2
    assert f"next: rayft report {home.uri}" in capsys.readouterr().err
    (tmp_path / "run.json").write_text("{}")
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "is a single run" in capsys.readouterr().err
    home.write_text("sweep.json", '{"name": "torn')
    assert cli.main(["report", home.uri]) == 6
    assert "sweep.json is damaged" in capsys.readouterr().err


def test_commands_for_a_sweep_in_a_bucket_can_be_pasted(tmp_path: Path) -> None:
    place = "s3://bucket/my sweep?endpoint_override=10.0.0.1:9000&scheme=http"
    text = Reader(page(read_facts(write_sweep(tmp_path, 3)), place)).text
    options = "?endpoint_override=10.0.0.1:9000&scheme=http"
    assert f"rayft export 's3://bucket/my sweep/best{options}' --merge" in text
    assert f"rayft train 's3://bucket/my sweep/best/config.yaml{options}'" in text


def test_a_report_loads_neither_torch_nor_ray(tmp_path: Path) -> None:
    home = write_sweep(tmp_path, 15)
    code = (
        f"import sys; from rayft.report import build; build({home.uri!r}); "
        "print(sorted({'torch', 'ray', 'transformers', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n", done.stderr
