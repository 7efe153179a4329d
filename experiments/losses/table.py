"""The table of losses: what 20 steps of the embedded model give, and whether they still do.

    python experiments/losses/table.py                           print it, and this CPU; compare
    python experiments/losses/table.py --write [FILE]            renew it, or write another one
    python experiments/losses/table.py --exact [--against FILE]  every bit, on the same machine

Four ways of training builtin:tiny on builtin:arith: full, LoRA, QLoRA (nf4), and LoRA as one of
three trials of a pack; fp32, one thread, one process, no dropout. Before a change that must not
change numbers, write a table of your own machine; afterwards compare with --exact.

Between kinds of CPU there is a tolerance, because they add in other orders. Measured on one machine
(AMD Zen 4, `machine` in losses.json), largest relative difference of the 20 losses and the two
held-out ones to a run without these variables:

                                                             full    lora    qlora   packed
    ATEN_CPU_CAPABILITY=avx2 (also with MKL_ENABLE_...=AVX2) 2.6e-7  4.2e-7  1.9e-7  6.2e-7
    ATEN_CPU_CAPABILITY=default                              2.6e-7  4.9e-7  1.4e-7  8.8e-7
    the same with MKL_CBWR=COMPATIBLE                        3.5e-7  3.8e-7  1.9e-7  2.9e-7
    the same again, and MKL_CBWR=AVX2 or AVX512              0       0       0       0

So 1e-5 for what only adds: ten times the worst, for libraries and CPUs that were not at hand. nf4
rounds weights to 16 values: a weight at a border may fall to the other side elsewhere. One code in
each of the 28 layers moved to its neighbour changed the losses by up to 2.8e-4, hence 1e-3. A base
that passes no gradients on changes them by far more than a tenth.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before any maths library is loaded

import torch

from rayft.compose.data import prepare_data
from rayft.compose.execute import execute
from rayft.compose.job import AttemptJob
from rayft.config.load import load
from rayft.config.run import Run
from rayft.models.quiet import hush
from rayft.records.run_record import RunRecord
from rayft.records.series import read_series
from rayft.storage.folder import Storage
from rayft.trials.pack import Pack

FILE = Path(__file__).parent / "losses.json"
STEPS = 20
CPU = torch.device("cpu")
# Largest relative difference allowed; see above.
TOLERANCE = {"full": 1e-5, "lora": 1e-5, "qlora": 1e-3, "packed": 1e-5}
FLAGS = (
    "avx2",
    "avx512f",
    "avx512_bf16",
    "avx512_vnni",
    "amx_bf16",
    "amx_tile",
    "asimd",
    "sve",
    "bf16",
)
BASE: dict[str, Any] = {
    "model": {"path": "builtin:tiny", "dtype": "fp32"},
    "objective": {"kind": "sft"},
    "data": {
        "train": [{"path": "builtin:arith", "samples": 400}],
        "eval": [{"path": "builtin:arith", "split": "heldout", "samples": 32}],
        "max_length": 64,
    },
    "optim": {"lr": 1e-3, "warmup": 2},
    "train": {"steps": STEPS, "global_batch": 8, "micro_batch": 4},
    "scale": {"workers": 0, "gpus": 0},
}
LORA = {"kind": "lora", "rank": 8, "alpha": 16, "lr_ratio": 4}
WAYS: dict[str, dict[str, Any]] = {
    "full": {"methods": [{"kind": "full"}]},
    "lora": {"methods": [LORA]},
    "qlora": {"methods": [LORA], "model": {**BASE["model"], "quant": "nf4"}},
    "packed": {"methods": [LORA]},
}
NEIGHBOURS = (  # of the packed trial
    {"methods": [LORA | {"rank": 16, "dora": True}], "seed": 1},
    {"methods": [LORA | {"rank": 3, "rslora": True}], "optim": {"lr": 3e-3, "clip": None}},
)


class Quiet:
    """Signals that nobody hears."""

    def stop_requested(self) -> bool:
        return False

    def progress(self, event: dict[str, Any]) -> None:
        pass


def measure(
    ways: Iterable[str] = tuple(WAYS), device: torch.device = CPU, steps: int = STEPS
) -> dict[str, Any]:
    """{"data": hash, "losses": {way: `steps` losses}, "eval": {way: [base, tuned]}}, in nats."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory(prefix="rayft-losses-") as folder:
            return _measured(folder, tuple(ways), device, steps)
    finally:
        torch.set_num_threads(threads)


def _measured(
    folder: str, ways: tuple[str, ...], device: torch.device, steps: int
) -> dict[str, Any]:
    found: dict[str, Any] = {"losses": {}, "eval": {}}
    runs = {way: _run(folder, way, WAYS[way], steps) for way in ways}
    ready = prepare_data(runs[ways[0]], lambda function, items: [function(item) for item in items])
    found["data"] = ready.hash

    def job(run: Run) -> AttemptJob:
        return AttemptJob(run.resolved(), run.digest(), "1", ready.uri, ready.hash, export=False)

    for way, run in runs.items():
        home = Storage.open(run.storage).child(run.name)
        if way == "packed":
            changes = enumerate(NEIGHBOURS)
            others = [_run(folder, f"n{at}", change, steps) for at, change in changes]
            pack = Pack(run, ready.uri, ready.hash, device, slots=3)
            for trial in (others[0], run, others[1]):
                pack.admit(job(trial))
            while pack.trials:
                pack.step()
        else:
            record = RunRecord(run.name, "running", run.resolved(), run.digest())
            home.write_text("run.json", record.to_json())
            execute(job(run), 0, 1, device, Quiet())
        lines = list(read_series(home))
        found["losses"][way] = [line["loss"] for line in lines if line["split"] == "train"]
        found["eval"][way] = [line["loss"] for line in lines if line["split"] == "eval"]
    return found


def _run(folder: str, name: str, change: Mapping[str, Any], steps: int) -> Run:
    merged = {**BASE, **change, "name": name, "storage": folder}
    merged["optim"] = {**BASE["optim"], **change.get("optim", {})}
    merged["train"] = {**BASE["train"], "steps": steps}
    merged["data"] = {**BASE["data"], "cache": f"{folder}/cache"}
    return load(merged)


def machine() -> dict[str, Any]:
    """What the numbers depend on: CPU, its instructions, what torch makes of them, versions."""
    facts = {}
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        key, _, value = line.partition(":")
        facts.setdefault(key.strip(), value.strip())
    has = set((facts.get("flags") or facts.get("Features") or "").split())
    return {
        "cpu": facts.get("model name", platform.processor() or platform.machine()),
        "family": "/".join(facts.get(key, "-") for key in ("cpu family", "model", "stepping")),
        "flags": [flag for flag in FLAGS if flag in has],
        "torch": torch.__version__,
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "blas": "mkl" if torch.backends.mkl.is_available() else "openblas",
        "python": platform.python_version(),
    }


def differences(one: Mapping[str, Any], two: Mapping[str, Any]) -> dict[str, float]:
    """By way: the largest relative difference of any loss; NaN where one of them is."""
    found = {}
    for way in two["losses"]:
        ours, theirs = (
            torch.tensor([*table["losses"][way], *table["eval"][way]], dtype=torch.float64)
            for table in (one, two)
        )
        found[way] = float(((ours - theirs) / theirs).abs().max())
    return found


def show(here: Mapping[str, Any], there: Mapping[str, Any] | None) -> str:
    """The table as text."""
    ways = list(here["losses"])
    lines = [f"{key:8s} {value}" for key, value in machine().items()]
    lines += ["", "step  " + "".join(f"{way:>12s}" for way in ways)]
    for step in range(STEPS):
        row = "".join(f"{here['losses'][way][step]:12.6f}" for way in ways)
        lines.append(f"{step + 1:4d}  {row}")
    for index, name in enumerate(("base", "tuned")):
        row = "".join(f"{here['eval'][way][index]:12.6f}" for way in ways)
        lines.append(f"{name:5s} {row}   held out")
    if there is not None:
        gaps = differences(here, there)
        lines.append("diff  " + "".join(f"{gaps[way]:12.1e}" for way in ways))
        lines.append("limit " + "".join(f"{TOLERANCE[way]:12.1e}" for way in ways))
    return "\n".join(lines)


def main() -> int:
    """0: equal as far as asked; 1: not."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", nargs="?", const=FILE, type=Path, metavar="FILE")
    parser.add_argument("--exact", action="store_true", help="every bit, on this kind of machine")
    parser.add_argument("--against", type=Path, default=FILE, metavar="FILE")
    args = parser.parse_args()
    hush()
    here = measure()
    if args.write is not None:
        args.write.write_text(json.dumps({"machine": machine(), **here}, indent=1) + "\n")
        print(show(here, None), f"\nwritten: {args.write}")
        return 0
    there = json.loads(args.against.read_text())
    print(show(here, there))
    return verdict(here, there, exact=args.exact)


def verdict(here: Mapping[str, Any], there: Mapping[str, Any], *, exact: bool) -> int:
    """Say how the tables compare; the exit code."""
    if here["data"] != there["data"]:
        print("the training data is not what it was: builtin:arith or the tokenizer has changed")
        return 1
    if not exact:
        gaps = differences(here, there)
        wrong = [way for way, gap in gaps.items() if not gap <= TOLERANCE[way]]
        print(f"differs too much: {', '.join(wrong)}" if wrong else "agrees within the limits")
        return int(bool(wrong))
    other = {key: value for key, value in there["machine"].items() if machine()[key] != value}
    if other:
        print(f"written on another kind of machine: {other}; --write FILE here before a change")
        return 1
    same = all(here[kind] == there[kind] for kind in ("losses", "eval"))
    print("every bit is the same" if same else "not the same bits")
    return int(not same)


if __name__ == "__main__":
    sys.exit(main())
