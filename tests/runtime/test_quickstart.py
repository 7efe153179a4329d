"""What the README promises: the quick start runs to its end, and every command it shows exists."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rayft.config.load import load
from rayft.records.run_record import RunRecord, SweepRecord

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    """Fenced code blocks of one language."""
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_config_in_the_readme_is_valid():
    assert load(yaml.safe_load(blocks("yaml")[0])).strategy.stage == 2


def test_the_sweep_in_the_readme_is_valid():
    config, block = (yaml.safe_load(text) for text in blocks("yaml"))
    config["scale"]["workers"] = 1
    assert load(config | block).sweep.count == 32


def test_every_command_in_the_readme_exists():
    """Each option of each `rayft` line is one that the command's help names."""
    lines = [line.split("#")[0] for block in blocks("sh") for line in block.splitlines()]
    calls = [shlex.split(line.split(">")[0]) for line in lines if re.match(r"\s*rayft ", line)]
    assert {call[1] for call in calls} == {"check", "train", "sweep", "report", "eval", "export"}
    for command in {call[1] for call in calls}:
        done = subprocess.run(
            [sys.executable, "-m", "rayft", command, "--help"],
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT,
        )
        used = {word for call in calls if call[1] == command for word in call if word[:2] == "--"}
        assert all(option in done.stdout for option in used), (command, used)


def test_the_files_that_the_readme_names_are_there():
    named = re.findall(r"`((?:rayft|tests|experiments)/[\w/.]+)`|\]\(([\w/.]+)\)", README)
    for path in {first or second for first, second in named}:
        assert (ROOT / path).exists(), path


@pytest.fixture
def script(tmp_path, monkeypatch):
    """The quick start as a module; its commands only leave results behind."""
    spec = importlib.util.spec_from_file_location("quick", ROOT / "experiments/quickstart/run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.chdir(tmp_path)

    def install(**tuned: float) -> None:
        def call(command: str, where: str, *rest: str) -> None:
            name = Path(where).stem
            folder = tmp_path / f"runs/quickstart-{name}"
            if command == "eval":
                return
            folder.mkdir(parents=True)
            base = {"eval_loss": 5.8}
            if command == "train":
                record = {"base": base, "eval": {"eval_loss": tuned[name]}}
                (folder / "run.json").write_text(json.dumps(record))
            else:
                record = {"base": base, "best": {"metric": tuned[name]}}
                (folder / "sweep.json").write_text(json.dumps(record))

        monkeypatch.setattr(module, "call", call)

    module.install = install
    return module


@pytest.mark.parametrize("weak", ["full", "qlora", "sweep"])
@pytest.mark.parametrize("loss", [5.55, math.nan])
def test_the_quick_start_fails_where_a_model_did_not_learn(weak, loss, script, capsys):
    """5.55: what QLoRA came to while its base gave no gradients."""
    script.install(**({"full": 3.66, "qlora": 3.72, "sweep": 3.76} | {weak: loss}))
    with pytest.raises(SystemExit) as exit_:
        script.main()
    assert f"error: runs/quickstart-{weak} did not learn" in exit_.value.code  # printed, exit 1
    assert f"runs/quickstart-{weak}: held-out loss 5.800 ->" in capsys.readouterr().out


def test_the_quick_start_says_what_was_learned(script, capsys):
    script.install(full=3.66, qlora=3.72, sweep=3.76)
    script.main()
    assert capsys.readouterr().out.count("held-out loss 5.800 ->") == 3


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_the_quick_start(tmp_path, quiet):
    """The script behind `make quickstart`, from a folder of its own."""
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    done = subprocess.run(
        [sys.executable, str(tmp_path / "experiments/quickstart/run.py")],
        env=os.environ | {"PYTHONPATH": str(ROOT), "RAYFT_DASHBOARD": "1"},
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("full", "qlora"):
        folder = tmp_path / f"runs/quickstart-{name}"
        record = RunRecord.from_json((folder / "run.json").read_text())
        assert record.status == "done" and record.eval["eval_loss"] < 0.9 * record.base["eval_loss"]
        assert (folder / "export/README.md").exists()
        assert json.loads((folder / "export/config.json").read_text()) if name == "full" else True
    assert done.stdout.count("sample 3") == 2 and "next:" in done.stdout
    assert "runs/quickstart-sweep/report.html" in done.stdout.splitlines()[0]
    folder = tmp_path / "runs/quickstart-sweep"
    found = SweepRecord.from_json((folder / "sweep.json").read_text())
    trials = (folder / "trials.csv").read_text().splitlines()
    assert found.status == "done" and len(trials) >= 17
    assert found.best.metric < 0.9 * found.base["eval_loss"]
    assert (folder / "report.html").exists() and (folder / "best/export/README.md").exists()
