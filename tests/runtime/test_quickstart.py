"""What the README promises: the quick start runs to its end, and every command it shows exists."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rayft.config.load import load
from rayft.core.record import RunRecord, SweepRecord

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
    assert found.best["metric"] < 0.9 * found.base["eval_loss"]
    assert (folder / "report.html").exists() and (folder / "best/export/README.md").exists()
