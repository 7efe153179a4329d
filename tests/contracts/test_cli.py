"""The command line as a shell sees it: exit codes, stdout, stderr."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import rayft.training.driver
from rayft import cli, unexpected
from rayft.config.load import load
from rayft.config.run import Run
from rayft.core import errors
from rayft.core.errors import ConfigError, RayftError, StorageError
from rayft.records.run_progress import BestEvaluation
from rayft.records.run_record import RunRecord

ROOT = Path(__file__).parents[2]
QLORA = "experiments/quickstart/qlora.yaml"


def shell(*arguments: str, code: int = 0, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "rayft", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == code, done.stderr
    assert len(done.stderr.splitlines()) <= 15
    assert "\x1b" not in done.stdout + done.stderr
    assert not set("─│╭╰") & set(done.stdout + done.stderr)
    return done


def test_check_prints_a_config_that_loads_as_the_same_run(tmp_path: Path) -> None:
    done = shell("check", QLORA, "methods.0.rank=4", "optim.lr=3e-5")
    assert done.stderr == ""
    path = tmp_path / "resolved.yaml"
    path.write_text(done.stdout)
    assert load(path) == load(ROOT / QLORA, ["methods.0.rank=4", "optim.lr=3e-5"])
    assert yaml.safe_load(done.stdout)["optim"]["lr"] == 3e-5
    assert load(path).digest() in done.stdout.splitlines()[0]


def test_check_schema_is_a_schema() -> None:
    schema = json.loads(shell("check", "--schema").stdout)
    assert schema["$schema"].endswith("2020-12/schema")
    assert set(schema["required"]) == {"name", "model", "data", "train"}
    assert schema["additionalProperties"] is False


def test_version_and_help() -> None:
    assert shell("--version").stdout == f"rayft {rayft.__version__}\n"
    for arguments in ((), ("--help",), ("-h",)):
        assert "Commands:" in shell(*arguments).stdout
    assert "a.b=c" in shell("train", "--help").stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("trian", QLORA), "Did you mean 'train'?"),
        (("chekc",), "Did you mean 'check'?"),
        (("check", "--shema"), "--shema"),
        (("train",), "Missing argument 'CONFIG'.\n  next: rayft train --help"),
        (("check",), "no config given"),
        (("eval", "x", "--generate", "many"), "--generate"),
        (("eval", "x", "--limit", "0"), "--limit"),
        (("export", "x", "--check", "tgi"), "--check knows vllm only, not 'tgi'"),
        (("check", "experiments/quickstart/qlra.yaml"), "did you mean " + QLORA),
        (("check", QLORA, "optim.learning_rate=1"), "did you mean optim.lr?"),
        (("train", QLORA, "optim.lrr=1"), "did you mean optim.lr?"),
        (("train", QLORA, "model.quant=int8", "strategy=zero3"), "int8 weights cannot be sharded"),
    ],
)
def test_mistakes_of_the_caller_exit_2_with_one_clear_message(
    arguments: tuple[str, ...], said: str
) -> None:
    done = shell(*arguments, code=2)
    assert said in done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= 3


def test_many_mistakes_fit_on_a_screen(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("".join(f"k{i}: 1\n" for i in range(50)))
    done = shell("check", str(path), code=2)
    assert "54 mistakes" in done.stderr  # and four sections are missing
    assert "... and 46 more" in done.stderr


def raising(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Let training fail: what makes a run fail is not this test's subject."""

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(rayft.training.driver, "train", fail)


@pytest.mark.parametrize(
    "kind",
    [
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and kind is not RayftError and issubclass(kind, RayftError)
    ],
)
def test_every_error_has_its_exit_code(
    kind: type[RayftError], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raising(monkeypatch, kind("what", where="rank 1, step 7", cause="because", fix="do this"))
    assert cli.main(["train", str(ROOT / QLORA)]) == kind.exit_code
    assert capsys.readouterr().err.splitlines() == [
        f"{kind.label}: what",
        "  where: rank 1, step 7",
        "  cause: because",
        "  next: do this",
    ]


def test_an_unexpected_error_leaves_a_log_in_the_runs_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "quickstart-qlora"
    folder.mkdir()
    text = "\n".join(f"line {i}" for i in range(100))
    raising(monkeypatch, ZeroDivisionError(text))
    assert cli.main(["train", str(ROOT / QLORA), f"storage={tmp_path}"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) <= 15
    assert lines[0] == "error: ZeroDivisionError: line 0"
    assert lines[-3] == "  line 99"
    log = Path(lines[-1].removeprefix("  traceback: "))
    assert log.parent == folder
    assert "line 50" in log.read_text() and "Traceback" in log.read_text()


def test_the_log_goes_to_the_temporary_folder_when_there_is_no_run_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(unexpected.tempfile, "tempdir", str(tmp_path))
    raising(monkeypatch, ZeroDivisionError())
    assert cli.main(["train", str(ROOT / QLORA), f"storage={tmp_path}/none"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "error: ZeroDivisionError()"
    assert Path(lines[-1].removeprefix("  traceback: ")).parent == tmp_path


def test_the_cause_of_a_known_error_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(unexpected.tempfile, "tempdir", str(tmp_path))
    error = StorageError("\n".join(str(i) for i in range(30)), fix="look")
    error.__cause__ = OSError("disk on fire")
    raising(monkeypatch, error)
    assert cli.main(["train", str(ROOT / QLORA), f"storage={tmp_path}/none"]) == 6
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 15
    assert "disk on fire" in Path(lines[-1].removeprefix("  traceback: ")).read_text()


def test_train_prints_what_came_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record = RunRecord(
        "a", "done", {}, "h", steps=80, seconds=61.4, best=BestEvaluation(80, 1.5, "step-80-0"),
        params_total=2000, params_trainable=1000,
        eval={"eval_loss": 1.5, "eval_ppl": 4.5, "eval_loss/a": 1.0, "eval_ppl/a": 2.7},
        base={"eval_loss": 2.25, "eval_ppl": 9.5, "eval_loss/a": 2.0, "eval_ppl/a": 7.4},
    )  # fmt: skip
    commands = []

    def train(run: Run, *, again: str, restart: bool) -> RunRecord:
        commands.append((again, restart))
        return record

    monkeypatch.setattr(rayft.training.driver, "train", train)
    assert cli.main(["train", str(ROOT / QLORA), "seed=0"]) == 0
    again = f"rayft train {ROOT / QLORA} seed=0"
    assert commands == [(again, False)]
    assert capsys.readouterr().out.splitlines() == [
        "a: done, 80 steps, 61 s, 1,000 of 2,000 parameters",
        "  held-out loss: base 2.2500 -> tuned 1.5000 (perplexity 9.5 -> 4.5)",
        "  held-out loss, task a: base 2.0000 -> tuned 1.0000 (perplexity 7.4 -> 2.7)",
        "  best: 1.5000 at step 80",
        "  export: runs/quickstart-qlora/export",
        "  next: rayft eval runs/quickstart-qlora --generate 64",
    ]
    assert cli.main(["train", str(ROOT / QLORA), "--restart", "seed=0"]) == 0
    assert commands[1:] == [(again, True)]  # what continues a restarted run restarts it no more


def test_python_has_the_same_doors() -> None:
    assert rayft.load(ROOT / QLORA, ["seed=4"]).seed == 4
    with pytest.raises(ConfigError, match=r"optim\.lr\?"):
        rayft.train(ROOT / QLORA, ["optim.lrr=1"])
    code = "import sys, rayft; print(sorted({'torch', 'ray', 'pydantic'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n"
