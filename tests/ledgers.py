"""Ledgers of sweeps that never ran: made by a fixed rule, for the tests of what reads them."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

from rayft.config.load import load
from rayft.records.ledger import Ledger
from rayft.records.run_record import SweepRecord
from rayft.storage.folder import Storage

SPACE: dict[str, Any] = {
    "methods.0.rank": {"choice": [4, 8, 16, 32]},
    "methods.0.alpha": {"choice": [8, 16, 32, 64]},
    "methods.0.lr_ratio": {"choice": [1, 4, 16]},
    "optim.lr": {"loguniform": [1e-5, 1e-2]},
}
STEPS, EVERY, BASE = 90, 10, 5.85
START, ALONE = 2.5, 0.16  # seconds, as packs measure them


def config(name: str, storage: Path, **sweep: Any) -> dict[str, Any]:
    """A resolved config with a sweep block."""
    data = {
        "name": name,
        "model": {"path": "builtin:tiny"},
        "methods": [{"kind": "lora", "rank": 8}],
        "data": {"train": ["builtin:docstrings"], "eval": ["builtin:docstrings"]},
        "train": {"steps": STEPS, "eval_every": EVERY},
        "storage": str(storage),
        "sweep": {"space": SPACE, **sweep},
    }
    return load(data).resolved()


def write_sweep(
    storage: Path, trials: int = 40, *, name: str = "made", status: str = "done", seeds: int = 3,
    lost: float = 1.0, mode: str = "min", pbt: bool = False, best: bool = True, packs: int = 4,
    **sweep: Any,
) -> Storage:  # fmt: skip
    """A sweep's folder: record, ledger and a best/ with its names.

    Args:
        lost: the learning rate above which a trial diverges, as a share of the searched range.
        pbt: the last quarter of the trials copies others.
    """
    home = Storage.open(str(storage)).child(name)
    resolved = config(name, storage, mode=mode, seeds=seeds, **{"trials": max(trials, 1)} | sweep)
    draw = random.Random(trials)
    now = [1_795_000_000.0]
    results: dict[str, tuple[float, dict[str, Any]]] = {}
    book = Ledger(home, clock=lambda: now[0])
    for number in range(1, trials + 1):
        trial, params = f"t{number:04d}", _params(draw)
        now[0] += 3.0
        book.add(trial, "running", 0, params)
        share = math.log(params["optim.lr"] / 1e-5) / math.log(1e3)
        end = _end(number, trials, status, share > lost)
        value = _course(book, now, draw, trial, params, end, mode, pbt and number > trials * 0.75)
        if end in ("done", "stopped", "running"):
            results[trial] = value, params
    for pack in range(packs if trials else 0):
        book.pack(f"pack-{pack}.1", _pack(pack, trials / packs))
    winner = min(results, key=lambda t: (1 if mode == "min" else -1) * results[t][0], default=None)
    for seed in range(1, seeds if winner and status == "done" else 1):
        params = results[winner][1] | {"seed": seed}
        value = results[winner][0] + 0.012 * seed
        book.add(f"{winner}-s{seed}", "done", STEPS, params, _metrics(value, STEPS, params),
                 origin=winner)  # fmt: skip
    record = SweepRecord(
        name, status, resolved, "c" * 64, "eval_loss", mode, data_hash="d" * 64,
        base={"eval_loss": BASE, "eval_ppl": math.exp(BASE)}, seconds=312.4, starts=2,
        stopped_by="trials" if status == "done" else "",
        error="RayftError: out of patience\n  next: try again" if status == "failed" else "",
        versions={"rayft": "0.1.0", "torch": "2.13.0"},
    )  # fmt: skip
    home.write_text("sweep.json", record.to_json())
    if best and winner:
        home.write_text("best/config.yaml", "name: made-best\n")
        home.write_text("best/run.json", "{}")
    return home


def _params(draw: random.Random) -> dict[str, Any]:
    found: dict[str, Any] = {k: draw.choice(d["choice"]) for k, d in SPACE.items() if "choice" in d}
    return found | {"optim.lr": 10 ** draw.uniform(-5, -2)}


def _end(number: int, trials: int, status: str, diverges: bool) -> str:
    if diverges:
        return "diverged"
    if number % 13 == 5:
        return "failed"
    if status in ("running", "interrupted") and number > trials - 3:
        return "running"
    return "done" if number % 4 == 2 or number == 1 else "stopped"


def _metrics(value: float, step: int, params: dict[str, Any]) -> dict[str, float]:
    rank = params["methods.0.rank"]
    return {
        "eval_loss": value, "eval_ppl": math.exp(min(value, 50)), "base_loss": BASE, "loss": value,
        "tokens": 700.0 * step, "seconds": 0.11 * step * (1 + rank / 100),
        "params_trainable": 13_000.0 * rank, "memory": 3.6e8 + 4e6 * rank,
    }  # fmt: skip


def _course(
    book: Ledger, now: list[float], draw: random.Random, trial: str, params: dict[str, Any],
    end: str, mode: str, copies: bool,
) -> float:  # fmt: skip
    """The lines of one trial; its best result."""
    off = abs(math.log10(params["optim.lr"]) + 2.7)
    floor = 3.6 + 0.35 * off**1.5 + 0.02 * abs(math.log2(params["methods.0.rank"]) - 4)
    stop = {"done": STEPS, "running": 40, "diverged": 20, "failed": 30}.get(end)
    stop = stop or draw.choice((10, 10, 10, 30, 30, 60))
    value, best = BASE, math.inf if mode == "min" else -math.inf
    for step in range(EVERY, stop + 1, EVERY):
        now[0] += 1.0
        value = floor + (BASE - floor) * math.exp(-step / 18) + draw.gauss(0, 0.01)
        value = value if mode == "min" else 10 - value
        if end == "diverged":
            value = BASE * (1 + step / 10) if mode == "min" else -step
        facts: dict[str, str] = {}
        if copies and step in (30, 60):
            facts["donor"], params = "t0001", params | {"optim.lr": params["optim.lr"] * 1.2}
        if end == "diverged" and step == stop:
            facts["error"] = f"eval_loss {value:.2f} is above 1.5 times the base model's"
        if end == "failed" and step == stop:
            facts["error"] = "\nOutOfMemoryError: 2 GiB asked for, 1 GiB there\nTraceback: ..."
        last = end if step == stop else "running"
        book.add(trial, last, step, params, _metrics(value, step, params), **facts)
        best = min(best, value) if mode == "min" else max(best, value)
    return best


def _pack(number: int, trials: float) -> dict[str, float]:
    seconds = trials * 4.0 + number
    return {
        "steps": seconds / 0.2, "busy": seconds * 3.6, "seconds": seconds, "slots": 4,
        "tokens": seconds * 1450, "start_seconds": START + 0.1 * number, "memory": 7.4e8,
        "alone_step_seconds": ALONE + 0.01 * number, "trials": 0,
    }  # fmt: skip
