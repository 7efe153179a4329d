"""`make quickstart`: the main job on the embedded default, start to end, on this machine.

1. full fine-tuning of builtin:tiny on builtin:docstrings, two Ray Train workers, ZeRO-3
2. nf4 QLoRA with LoRA+ on the same, ZeRO-2
3. held-out loss and sample completions of base and tuned
4. a sweep of 16 LoRA trials over rank, alpha, lr and lr_ratio on shared bases, and its report

Every command is printed before it runs, so that it can be typed again. Results: runs/quickstart-*.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time

HERE = "experiments/quickstart"  # below the current folder, as typed
RUNS = ("full", "qlora")
SWEEP = "runs/quickstart-sweep"


def call(*arguments: str) -> None:
    """Print a command, run it, stop at the first failure with its exit code."""
    print(f"\n$ rayft {' '.join(arguments)}", flush=True)
    done = subprocess.run([sys.executable, "-m", "rayft", *arguments], check=False)
    if done.returncode:
        sys.exit(done.returncode)


def main() -> None:
    """All of it."""
    began = time.monotonic()
    print(f"the sweep report will be {SWEEP}/report.html (the last of three parts)", flush=True)
    for name in (*RUNS, "sweep"):
        shutil.rmtree(f"runs/quickstart-{name}", ignore_errors=True)  # so that it really runs again
    for name in RUNS:
        call("train", f"{HERE}/{name}.yaml")
        call("eval", f"runs/quickstart-{name}", "--generate", "3")
    call("sweep", f"{HERE}/sweep.yaml")
    print(f"\nquick start done in {time.monotonic() - began:.0f} s")
    for name in RUNS:
        print(f"  {name}: runs/quickstart-{name}/export")
    print(f"  sweep: {SWEEP}/report.html (open it in a browser), {SWEEP}/best")
    print("next: .venv/bin/rayft export runs/quickstart-qlora --merge --to runs/merged")


if __name__ == "__main__":
    main()
