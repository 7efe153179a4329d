"""Training trains in train mode from its first step, whether it was evaluated before or not.

transformers loads models in eval mode, and there dropout and gradient checkpointing do nothing.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from rayft.compose.assemble import assemble
from rayft.compose.data import open_corpus, prepare_data
from rayft.compose.execute import execute
from rayft.compose.job import AttemptJob, PreparedData
from rayft.config.load import load
from rayft.config.run import Run
from rayft.records.run_record import RunRecord
from rayft.records.series import read_series
from rayft.storage.folder import Storage
from rayft.storage.jsonl import read_jsonl

STEPS = 4


@pytest.fixture(autouse=True, scope="module")
def alone():
    """ZeRO in this process makes a process group of one; it and its variables end with this file,
    as the tests that follow in the same process expect."""
    before = dict(os.environ)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        if name not in before:
            os.environ.pop(name, None)


class Stopping:
    """Signals that ask for a stop before step `at`."""

    def __init__(self, at: int = STEPS + 1) -> None:
        self.at, self.asked = at, 0

    def stop_requested(self) -> bool:
        self.asked += 1
        return self.asked >= self.at

    def progress(self, event: dict) -> None:
        pass


def a_run(folder: Path, name: str, *changes: str) -> Run:
    data = {"train": [{"path": "builtin:docstrings", "samples": 8}], "max_length": 64}
    base = {
        "name": name,
        "model": {"path": "builtin:tiny"},
        "methods": [{"kind": "lora", "rank": 4}],
        "data": data,
        "optim": {"lr": 1e-2, "warmup": 0},
        "train": {"steps": STEPS, "global_batch": 4, "micro_batch": 4},
        "storage": str(folder),
    }
    return load(base, changes)


def prepared(run: Run) -> PreparedData:
    return prepare_data(run, lambda function, items: [function(item) for item in items])


def losses(run: Run, *attempts: Stopping) -> list[float]:
    """Training losses of all steps after these attempts."""
    ready, home = prepared(run), Storage.open(run.storage).child(run.name)
    record = RunRecord(run.name, "running", run.resolved(), run.digest())
    home.write_text("run.json", record.to_json())
    for number, signals in enumerate(attempts, start=1):
        job = AttemptJob(run.resolved(), run.digest(), f"{number}a", ready.uri, ready.hash)
        execute(job, 0, 1, torch.device("cpu"), signals)
    return [row["loss"] for row in read_series(home) if row["split"] == "train"]


HELD_OUT = "data.eval=[{path: builtin:docstrings, samples: 4}]"


@pytest.mark.parametrize("strategy", ["ddp", "zero2"])
def test_dropout_works_without_any_evaluation(strategy, tmp_path):
    chosen = f"strategy={strategy}"
    plain = losses(a_run(tmp_path, "plain", chosen), Stopping())
    dropped = losses(a_run(tmp_path, "drop", chosen, "methods.0.dropout=0.5"), Stopping())
    seen = losses(a_run(tmp_path, "seen", chosen, "methods.0.dropout=0.5", HELD_OUT), Stopping())
    assert dropped[0] == plain[0]  # B is zero
    assert all(one != other for one, other in zip(plain[1:], dropped[1:], strict=True))
    assert dropped == seen  # an evaluation changes nothing


def test_a_resumed_run_continues_with_dropout(tmp_path):
    changes = ("methods.0.dropout=0.5", HELD_OUT)
    once = losses(a_run(tmp_path, "once", *changes), Stopping())
    twice = losses(a_run(tmp_path, "twice", *changes), Stopping(at=3), Stopping())
    assert once == twice
    rows = read_jsonl(Storage.open(str(tmp_path / "twice")), "metrics.jsonl")
    assert [row["step"] for row in rows if row["split"] == "eval"] == [0, STEPS]  # base: once


@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_gradient_checkpointing_recomputes(method, strategy, tmp_path):
    changes = (f"methods={method}", f"strategy={strategy}", "train.gradient_checkpointing=true")
    run = a_run(tmp_path, "run", *changes)
    ready = prepared(run)
    parts = assemble(run, open_corpus(run, ready.uri, ready.hash), torch.device("cpu"))
    calls = []
    layer = parts.built.model.model.layers[0].mlp
    layer.register_forward_pre_hook(lambda *_: calls.append(1))
    batch = parts.stream.window(1, 0, 1)[0]
    ones = dict.fromkeys(parts.built.objective.terms, torch.ones(batch.rows))
    rows = parts.engine.forward(batch, ones)
    assert len(calls) == 1
    parts.engine.backward(sum(value.sum() for value in rows.values()), last=True)
    assert len(calls) == 2
