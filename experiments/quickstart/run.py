"""`make quickstart`: the main job on the embedded default, start to end, on this machine.

1. full fine-tuning of builtin:tiny on builtin:docstrings, two Ray Train workers, ZeRO-3
2. nf4 QLoRA with LoRA+ on the same, ZeRO-2
3. held-out loss and sample completions of base and tuned
4. a sweep of 16 LoRA trials over rank, alpha, lr and lr_ratio on shared bases, and its report

Every command is printed before it runs, so that it can be typed again. Results: runs/quickstart-*.
It exits with 1 where a tuned model does not clearly beat its base.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = "experiments/quickstart"  # below the current folder, as typed
RUNS = ("full", "qlora")
SWEEP = "runs/quickstart-sweep"
# Of the base model's held-out loss. All three end at 0.62 to 0.65 of it (experiments/README.md);
# with adapters that got no gradients through the base, QLoRA ended at 0.95. This is between.
CLEARLY = 0.8


def call(*arguments: str) -> None:
    """Print a command, run it, stop at the first failure with its exit code."""
    print(f"\n$ rayft {' '.join(arguments)}", flush=True)
    done = subprocess.run([sys.executable, "-m", "rayft", *arguments], check=False)
    if done.returncode:
        sys.exit(done.returncode)


def judge(folder: str, base: float, tuned: float) -> None:
    """One line; exit 1 where the tuned model is not clearly better on held-out rows."""
    share = tuned / base
    print(f"{folder}: held-out loss {base:.3f} -> {tuned:.3f}", flush=True)
    if not share < CLEARLY:  # NaN is not either
        sys.exit(
            f"error: {folder} did not learn: its held-out loss is {share:.2f} of the base model's, "
            f"a working installation comes to 0.65 (limit: {CLEARLY})\n"
            "  cause: something on this machine computes wrongly; the files of the run are kept\n"
            "  next: .venv/bin/python experiments/losses/table.py, and report what it prints"
        )


def recorded(folder: str) -> tuple[float, float]:
    """(base, tuned) held-out loss of a finished run or sweep."""
    file = Path(folder) / "run.json"
    if file.exists():
        run = json.loads(file.read_text())
        return run["base"]["eval_loss"], run["eval"]["eval_loss"]
    sweep = json.loads((Path(folder) / "sweep.json").read_text())
    return sweep["base"]["eval_loss"], sweep["best"]["metric"]


def main() -> None:
    """All of it."""
    began = time.monotonic()
    print(f"the sweep report will be {SWEEP}/report.html (the last of three parts)", flush=True)
    for name in (*RUNS, "sweep"):
        shutil.rmtree(f"runs/quickstart-{name}", ignore_errors=True)  # so that it really runs again
    for name in RUNS:
        call("train", f"{HERE}/{name}.yaml")
        call("eval", f"runs/quickstart-{name}", "--generate", "3")
        judge(f"runs/quickstart-{name}", *recorded(f"runs/quickstart-{name}"))
    call("sweep", f"{HERE}/sweep.yaml")
    judge(SWEEP, *recorded(SWEEP))
    print(f"\nquick start done in {time.monotonic() - began:.0f} s")
    for name in RUNS:
        print(f"  {name}: runs/quickstart-{name}/export")
    print(f"  sweep: {SWEEP}/report.html (open it in a browser), {SWEEP}/best")
    print("next: .venv/bin/rayft export runs/quickstart-qlora --merge --to runs/merged")


if __name__ == "__main__":
    main()
