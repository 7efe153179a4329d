"""The grid: every combination of the menu, on a two-layer model; each trains or is refused.

    make grid                 the whole product, one table; a quarter of an hour
    python -m tests.grid --pairs    as `make test` does: every pair of values at least once

A cell that trains runs the real engine for a few steps and must keep what every technique promises:
finite losses, gradients for what it declares and for nothing else, the base bit-identical where the
method says so, and the same held-out loss after a save and a load into a new model. A cell in a
pack must have the losses of its solo run. Kinds of the menu that no row here names fail a test.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import os
import random
import sys
import tempfile
import traceback
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from rayft.compose.assemble import RunParts, assemble
from rayft.compose.data import open_corpus, prepare_data
from rayft.compose.evaluate import evaluate
from rayft.compose.execute import stepper_of
from rayft.compose.job import AttemptJob
from rayft.compose.session import RunSession
from rayft.config import rules
from rayft.config.run import Run
from rayft.storage.folder import Storage
from rayft.trials.plan import why_not_packed
from tests.packs import Lab, Silent, finish, losses, small_model

STEPS = 3
METHODS: dict[str, dict[str, Any]] = {
    "full": {"kind": "full"},
    "lora": {"kind": "lora", "rank": 4, "lr_ratio": 4, "dropout": 0.1},
    "dora": {"kind": "lora", "rank": 4, "dora": True},
}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "sft": {"kind": "sft"},
    "lm": {"kind": "lm"},
}
PLACES: dict[str, tuple[int, str]] = {  # (workers, strategy)
    "solo": (1, "ddp"),
    "ddp": (2, "ddp"),
    "zero2": (2, "zero2"),
    "zero3": (2, "zero3"),
    "pack": (1, "ddp"),
}
QUANTS = ("none", "int8", "nf4")
SWITCHES = (False, True)


@dataclass(frozen=True)
class Cell:
    """One combination."""

    method: str
    objective: str
    place: str
    quant: str
    packing: bool
    checkpointing: bool

    @property
    def name(self) -> str:
        """Also the name of its run."""
        extras = ("packing",) * self.packing + ("checkpointing",) * self.checkpointing
        return "-".join((self.method, self.objective, self.place, self.quant, *extras))

    @property
    def world(self) -> int:
        """Its number of workers."""
        return PLACES[self.place][0]

    def run(self, model: str, folder: Path) -> Run:
        """Its config; no rule is asked."""
        source = {"path": "builtin:docstrings", "samples": 12}
        return Run.model_validate(
            {
                "name": self.name,
                "model": {"path": model, "quant": self.quant},
                "methods": [METHODS[self.method]],
                "objective": OBJECTIVES[self.objective],
                "data": {
                    "train": [source],
                    "eval": [source | {"split": "heldout", "samples": 6}],
                    "max_length": 64,
                    "packing": self.packing,
                    "cache": str(folder / "cache"),
                },
                "optim": {"lr": 1e-3, "warmup": 0, "schedule": "constant"},
                "train": {
                    "steps": STEPS,
                    "global_batch": 4,
                    "micro_batch": 2,
                    "gradient_checkpointing": self.checkpointing,
                },
                "strategy": PLACES[self.place][1],
                "storage": str(folder / "runs"),
            }
        )


def product() -> list[Cell]:
    """All of them."""
    axes = (METHODS, OBJECTIVES, PLACES, QUANTS, SWITCHES, SWITCHES)
    return [Cell(*values) for values in itertools.product(*axes)]


def pairwise(cells: Sequence[Cell], seed: int = 0) -> list[Cell]:
    """A few of `cells` that have every pair of values that any of them has: greedily the one with
    the most new pairs, of a few drawn at random."""
    draw = random.Random(seed)
    missing = set().union(*(_pairs(cell) for cell in cells))
    chosen: list[Cell] = []
    while missing:
        some = draw.sample(list(cells), min(80, len(cells)))
        best = max(some, key=lambda cell: len(missing & _pairs(cell)))
        if fresh := missing & _pairs(best):
            missing -= fresh
            chosen.append(best)
    return chosen


def _pairs(cell: Cell) -> set[tuple[tuple[str, object], ...]]:
    return set(itertools.combinations(sorted(vars(cell).items()), 2))


def verdict(cell: Cell, run: Run) -> str:
    """ "" for a cell that trains, else the sentences that refuse it."""
    refused = "; ".join(rules.fired(run))
    if not refused and cell.place == "pack":
        return why_not_packed(run)
    return refused


# ---- one cell


def train_cell(cell: Cell, run: Run, rank: int, world: int) -> dict[str, Any]:
    """Train it on this rank, save, load into a new model; what was measured."""
    if cell.place == "pack":
        return _pack(cell, run)
    ready = prepare_data(run, lambda function, items: [function(item) for item in items])
    job = AttemptJob(run.resolved(), run.digest(), "1a", ready.uri, ready.hash)
    home = Storage.open(run.storage).child(run.name)
    parts = _assembled(run, ready.uri, ready.hash)
    session = RunSession(job, parts, home, Silent(), 0.0)
    session.restore()
    frozen, stepper = _frozen(parts), stepper_of(parts)
    start = {name: tensor.clone() for name, tensor in parts.engine.full()}
    base = _held_out(parts)
    trained = [
        stepper.run(step, lambda: False, more=step < STEPS)[0] for step in range(1, STEPS + 1)
    ]
    moved = [name for name, now in parts.engine.full() if not torch.equal(now, start[name])]
    tuned = _held_out(parts)
    session.progress.step = STEPS
    session.save(STEPS, False)
    session.finish()
    again = _assembled(run, ready.uri, ready.hash)
    other = RunSession(job, again, home, Silent(), 0.0)
    commit = other.restore()
    found = {
        "losses": [one.loss for one in trained],
        "declared": sorted(start),
        "moved": sorted(moved),
        "base kept": _frozen(parts) == frozen,
        "base": base,
        "tuned": tuned,
        "again": _held_out(again),
        "commit": commit.step if commit else None,
    }
    other.abandon()
    return found


def _assembled(run: Run, uri: str, digest: str) -> RunParts[Any]:
    return assemble(run, open_corpus(run, uri, digest), torch.device("cpu"))


def _held_out(parts: RunParts[Any]) -> float:
    built = parts.built
    return evaluate(parts.engine, built.objective, parts.eval_batches, parts.tasks)["eval_loss"]


def _frozen(parts: RunParts[Any]) -> str:
    """Digest of this rank's part of what does not train."""
    sha = hashlib.sha256()
    for name, param in parts.built.model.named_parameters():
        if not param.requires_grad:
            held = vars(param).get("ds_tensor", param)  # ZeRO-3's slice
            sha.update(name.encode())
            sha.update(held.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def _pack(cell: Cell, run: Run) -> dict[str, Any]:
    """In a pack beside another trial, and by itself."""
    lab = Lab.__new__(Lab)  # its helpers alone, on this cell's model and data
    lab.folder = Path(run.storage).parent
    lab.ready = prepare_data(run, lambda function, items: [function(item) for item in items])
    beside = run.model_copy(update={"name": f"{run.name}-beside", "seed": 7})
    solo = run.model_copy(update={"storage": f"{run.storage}-alone"})
    finish(lab.pack(run, beside))
    lab.solo(solo)
    return {"losses": losses(run), "solo": losses(solo)}


# ---- all cells


def worker(rank: int, world: int, cells: list[Cell], model: str, folder: str) -> None:
    """Train the cells of this world on this rank; a failed one leaves its traceback."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    torch.set_num_threads(1)
    path = Path(folder)
    if world > 1:
        store = f"file://{folder}/store"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    for cell in cells:
        try:
            found = train_cell(cell, cell.run(model, path), rank, world)
        except Exception:  # the test of this cell fails with the text
            found = {"error": traceback.format_exc()}
        (path / f"{cell.name}.{rank}.json").write_text(json.dumps(found))
        if world > 1:
            dist.barrier()
    if dist.is_initialized():
        dist.destroy_process_group()


def train_all(cells: Iterable[Cell], folder: Path) -> dict[Cell, list[dict[str, Any]]]:
    """What every rank of every cell that is not refused measured."""
    model = str(small_model(folder / "model"))
    able = [cell for cell in cells if not verdict(cell, cell.run(model, folder))]
    for world in (1, 2):
        own = [cell for cell in able if cell.world == world]
        if own:
            mp.spawn(worker, (world, own, model, str(folder)), nprocs=world)
    return {
        cell: [
            json.loads((folder / f"{cell.name}.{rank}.json").read_text())
            for rank in range(cell.world)
        ]
        for cell in able
    }


def broken_promises(cell: Cell, run: Run, found: dict[str, Any]) -> Iterator[str]:
    """What one rank of a cell did not keep."""
    if "error" in found:
        yield found["error"]
        return
    if not all(math.isfinite(loss) for loss in found["losses"]) or len(found["losses"]) != STEPS:
        yield f"losses {found['losses']}"
    if cell.place == "pack":
        pairs = zip(found["losses"], found["solo"], strict=True)
        if not all(math.isclose(one, two, rel_tol=1e-5) for one, two in pairs):
            yield f"in a pack {found['losses']}, by itself {found['solo']}"
        return
    if found["moved"] != found["declared"]:
        yield f"did not move: {sorted(set(found['declared']) - set(found['moved']))}"
    if not found["base kept"]:
        yield "a frozen tensor changed"
    keeps = all("lora_" in name for name in found["declared"])
    if keeps != all(method.keeps_base for method in run.methods):
        yield f"keeps_base says otherwise than what trains: {found['declared'][:3]}"
    if found["tuned"] == found["base"]:
        yield "training changed no held-out loss"
    # another model, other memory: its sums may be added in another order
    if not math.isclose(found["tuned"], found["again"], rel_tol=1e-6) or found["commit"] != STEPS:
        yield f"held-out loss {found['tuned']}, after save and load {found['again']}"


def main() -> int:
    """Print the table of all cells; 1 where one broke a promise."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", action="store_true", help="every pair of values, not all cells")
    pairs = parser.parse_args().pairs
    cells = pairwise(product()) if pairs else product()
    with tempfile.TemporaryDirectory(prefix="rayft-grid-") as name:
        folder = Path(name)
        trained = train_all(cells, folder)
        failed = 0
        for cell in cells:
            run = cell.run(str(folder / "model"), folder)
            ranks = trained.get(cell, [])
            broken = [text for found in ranks for text in broken_promises(cell, run, found)]
            failed += bool(broken)
            said = "; ".join(broken) if broken else "trained" if ranks else verdict(cell, run)
            print(f"{'BROKEN' if broken else 'ok':<7} {cell.name:<44} {said}", flush=True)
    print(f"{len(cells)} cells: {len(trained)} trained, {len(cells) - len(trained)} refused or "
          f"not for a pack, {failed} broken")  # fmt: skip
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
