"""The training benchmark runs; what it measures at this size means nothing."""

from __future__ import annotations

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
