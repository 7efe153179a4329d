"""Addresses with options (MinIO, Ceph, R2): every path below them is right, and every command that
is printed can be pasted into a shell. The store is moto's server on a port of its own."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys

import pytest

from rayft import cli
from rayft.checkpoint.reader import find_commit
from rayft.cluster.interrupt import Interrupt
from rayft.config.run import Run
from rayft.core.address import above, below, clean, redact, shown
from rayft.core.errors import ConfigError
from rayft.records.run_record import SweepWinner
from rayft.records.series import read_series
from rayft.storage.folder import Storage
from rayft.sweeps.best import write_config
from rayft.training.driver import RunContext, train
from rayft.training.progress import view
from tests.contracts.s3 import s3_server
from tests.ledgers import write_sweep

OPTIONS = "endpoint_override=10.0.0.1:9000&scheme=http"


@pytest.fixture(scope="module")
def s3():
    with s3_server() as template:
        yield template


def config(s3: str, name: str, **changes) -> dict:
    return {
        "name": name,
        "storage": s3.format("runs"),
        "model": {"path": "builtin:tiny"},
        "methods": [{"kind": "lora", "rank": 2}],
        "data": {
            "train": [{"path": s3.format("corpus/data/*.jsonl")}],
            "eval": [{"path": s3.format("corpus/held/b.jsonl")}],
            "max_length": 64,
        },
        "train": {"steps": 4, "save_every": 2, "global_batch": 2, "micro_batch": 2},
        "scale": {"workers": 0, "gpus": 0},
    } | changes


@pytest.fixture(scope="module")
def rows(s3):
    for first, name in ((0, "data/a.jsonl"), (100, "held/b.jsonl")):
        lines = [{"prompt": f"{n}?", "completion": f"{n} it is"} for n in range(first, first + 16)]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        Storage.open(s3.format("corpus")).write_text(name, text)


def paste(command: str) -> str:
    """What a shell makes of a command as it was printed; its output."""
    rayft = f'rayft() {{ {shlex.quote(sys.executable)} -m rayft "$@"; }}; '
    done = subprocess.run(
        ["bash", "-c", rayft + command], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_train_eval_export_through_an_endpoint(s3, rows, tmp_path, capsys):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config(s3, "r")))
    assert cli.main(["train", str(file)]) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    home = Storage.open(s3.format("runs/r"))
    assert f"export: {home.child('export').uri}" in out
    assert home.exists("export/adapter_config.json")
    assert find_commit(home).step == 4
    assert Storage.open(s3.format("runs")).list(".cache"), "the cache is beside the runs"
    command = out.split("next: ")[1].strip()
    assert command.startswith("rayft eval 's3://bucket/runs/r?")
    assert "tuned" in paste(command.replace("--generate 64", "--generate 2"))
    assert cli.main(["export", home.uri, "--merge"]) == 0
    assert home.child("export-merged").uri in capsys.readouterr().out
    assert home.exists("export-merged/model.safetensors")


def test_a_clone_finds_its_donor_below_an_endpoint(s3, rows, capsys):
    train(Run.model_validate(config(s3, "donor")))
    commit = find_commit(Storage.open(s3.format("runs/donor")))
    longer = config(s3, "r")["train"] | {"steps": 6}
    run = Run.model_validate(config(s3, "copy", train=longer))
    context = RunContext(view(), Interrupt(), source=commit.storage.uri)
    assert train(run, context=context).steps == 6
    first = read_series(Storage.open(s3.format("runs/copy")))[0]
    assert first["step"] == 5, "it went on where its donor was"


def test_commands_of_a_sweep_below_an_endpoint(s3, rows, capsys):
    home = write_sweep(s3.format("sweeps"), 3)
    run = Run.model_validate(config(s3, "best"))
    write_config(home, run, SweepWinner("t1", 4, 1.0, {}), "eval_loss")
    assert cli.main(["report", home.uri]) == 0
    assert home.child("report.html").uri in capsys.readouterr().out.splitlines()
    page = home.read_text("report.html").replace("&#x27;", "'").replace("&amp;", "&")
    best = home.child("best", "config.yaml").uri
    assert f"rayft train '{best}'" in page
    head = home.read_text("best/config.yaml").splitlines()[1]
    command = head.removeprefix("# ").split("    ")[0]
    assert command == f"rayft train '{best}'"
    assert "best-best: done" in paste(command)
    assert cli.main(["report", s3.format("sweeps")]) == 2
    command = capsys.readouterr().err.split("next: ")[1].strip()
    assert home.child("report.html").uri in paste(command)
    with pytest.raises(ConfigError, match="there is no config file s3://bucket/none.yaml"):
        cli.rayft.load(s3.format("none.yaml"))


def test_a_command_to_continue_can_be_pasted():
    words = ["storage=s3://b/my runs?a=1&b=2", "name=x"]
    assert shlex.split(cli._typed("train", "c.yaml", words)) == ["rayft", "train", "c.yaml", *words]


def test_below_and_above():
    folder = f"s3://b/runs/?{OPTIONS}"
    assert below(folder, "r", "export") == f"s3://b/runs/r/export?{OPTIONS}"
    assert above(below(folder, "r", "x")) == (f"s3://b/runs/r?{OPTIONS}", "x")
    assert below("/a?b", "c") == "/a?b/c" and above("/a?b/c") == ("/a?b", "c")
    assert clean("/a:b@c?secret_key=d") == "/a:b@c?secret_key=d"
    assert below("s3://b", "c") == "s3://b/c" and shown(folder) == "s3://b/runs/"


@pytest.mark.parametrize(
    ("typed", "kept"),
    [
        ("s3://KEY:se/cr+et=@b/x?region=y", "s3://b/x?region=y"),
        ("s3://KEY:p@ssword@b/x", "s3://b/x"),
        ("s3://KEY:S@b/user@host/x", "s3://b/user@host/x"),
        ("s3://b/a:b@c", "s3://b/a:b@c"),
        ("s3://b/x?access_key=K&region=y&secret_key=S", "s3://b/x?region=y"),
        ("s3://b/x?secret_key=S&session_token=T", "s3://b/x"),
        ("https://token@host/x", "https://host/x"),
        ("gs://anonymous@b/x", "gs://anonymous@b/x"),
    ],
)
def test_what_an_address_keeps(typed, kept):
    assert clean(typed) == kept
    assert redact(f"cannot read '{typed}': no") == f"cannot read '{kept}': no"
