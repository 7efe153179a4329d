"""The training benchmark runs; what it measures at this size means nothing."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "experiments" / "bench" / "train.py"


def test_the_plain_loop_and_rayft_are_compared_and_agree() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "plain", "--quick", "--workers", "1", "--device", "cpu"],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    found = dict(re.findall(r"rayft / (\w+) +time (\d+\.\d+) \(", done.stdout))
    assert set(found) == {"plain", "plain_chunk"}
    assert all(float(ratio) > 0 for ratio in found.values())
    assert "losses after 7 steps: the same" in done.stdout


def bench(*arguments: str) -> str:
    """Output of a benchmark that ran to its end."""
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=SCRIPT.parent,
        env=os.environ | {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_packed_trials_are_compared() -> None:
    text = bench("packing.py", "--quick", "--device", "cpu", "--trials", "2", "--memory")
    line = next(line for line in text.splitlines() if line.startswith("64 "))
    numbers = [float(number) for number in re.findall(r"\d+\.\d+", line)]
    assert len(numbers) == 1 + 3 * 3 and all(numbers)  # ms; three ratios, least and most of each
    assert re.search(r"peak memory \d+\.\d+ GiB", text)


def test_the_placement_is_simulated_in_seconds() -> None:
    text = bench("packing.py", "planner")
    rows = re.findall(
        r"(longest first|as drawn) +\d+ +(\d) +(\d\.\d+) +(\d\.\d+) +(\d+\.\d+) s", text
    )
    assert len(rows) == 12
    assert all(float(row[2]) >= 1 and 0 < float(row[3]) <= 1 for row in rows)
    assert all(float(seconds) < 5 for *_, seconds in rows)


def test_both_sides_of_the_sweep_get_the_same_trials(monkeypatch, tmp_path) -> None:
    """And rayft takes the config that the benchmark writes."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import sweep

    from rayft.config.load import load

    args = argparse.Namespace(trials=32, steps=90, quality=False)
    run = load(sweep.config(args, tmp_path, "auto"))
    assert list(run.sweep.space["trial"].paired) == sweep.trials(32)
    assert run.sweep.count == 32 and run.train.steps == 90
    assert len({json.dumps(trial) for trial in sweep.trials(32)}) == 32


def test_time_to_quality_is_what_it_says(capsys, monkeypatch) -> None:
    """By hand: the best of both is 2.0, so the goal is 2.02; one side may never come there."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import sweep
    import sweep_quality

    ours, theirs = [(5.0, 3.0), (9.0, 2.01), (20.0, 2.0)], [(8.0, 2.5), (36.0, 2.02), (40.0, 2.1)]
    assert sweep_quality.compare(0, {"rayft": ours, "peer": theirs}) == (4.0, 4.0)
    never = sweep_quality.compare(1, {"rayft": ours, "peer": theirs[:1] + theirs[2:]})
    assert never == (float("inf"), 40.0 / 9.0)
    sweep_quality.summary([(4.0, 4.0), never])
    assert "4.00, bound 4.44; median 4.22" in capsys.readouterr().out
    parts = sweep._start({"ray": 3.0, "data": 5.0, "first step": 9.0}, begun=6.5)
    assert parts == {
        "until config": 1.5, "until ray": 4.5, "until data": 6.5, "until first step": 10.5
    }  # fmt: skip
