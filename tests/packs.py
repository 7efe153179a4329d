"""Packs and solo runs of a small random model, for the tests of rayft/trials."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rayft.compose.data import prepare_data
from rayft.compose.execute import execute
from rayft.compose.job import AttemptJob, PreparedData
from rayft.config.load import load
from rayft.config.run import Run
from rayft.records.run_record import RunRecord
from rayft.records.series import read_series
from rayft.storage.folder import Storage
from rayft.trials.pack import Pack

CPU = torch.device("cpu")
TINY = Path("rayft/models/tiny")


def small_model(folder: Path) -> Path:
    """Two layers, hidden 64 (nf4 needs blocks of 64), grouped-query attention, the tokenizer of
    builtin:tiny."""
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
        use_cache=False,
        pad_token_id=2,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(TINY / name, folder / name)
    return folder


class Lab:
    """Runs of one base and one corpus below a folder."""

    def __init__(self, folder: Path, *changes: str, steps: int = 50) -> None:
        self.folder, self._changes, self._steps = folder, changes, steps
        self._model = small_model(folder / "model")
        self.ready: PreparedData = prepare_data(
            self.run("first"), lambda function, items: [function(item) for item in items]
        )

    def run(self, name: str, *changes: str, where: str = "runs") -> Run:
        """A run; `changes` as on the command line."""
        source = {"path": "builtin:docstrings", "samples": 40}
        base: dict[str, Any] = {
            "name": name,
            "model": {"path": str(self._model)},
            "methods": [{"kind": "lora", "rank": 4, "alpha": 8.0}],
            "data": {
                "train": [source],
                "eval": [source | {"split": "heldout", "samples": 10}],
                "max_length": 64,
                "cache": str(self.folder / "cache"),
            },
            "optim": {"lr": 2e-3, "warmup": 4.0},
            "train": {
                "steps": self._steps,
                "global_batch": 4,
                "micro_batch": 4,
                "eval_every": 10,
                "eval_batch": 5,
            },
            "storage": str(self.folder / where),
        }
        return load(base, [*self._changes, *changes])

    def job(self, run: Run, attempt: int = 1) -> AttemptJob:
        """An attempt at `run`."""
        name = f"{attempt}x{run.seed}"
        return AttemptJob(run.resolved(), run.digest(), name, self.ready.uri, self.ready.hash)

    def pack(self, *runs: Run, slots: int = 32, **more: Any) -> Pack:
        """A pack with these trials in."""
        first = runs[0] if runs else self.run("first")
        pack = Pack(first, self.ready.uri, self.ready.hash, CPU, slots=slots, **more)
        for run in runs:
            pack.admit(self.job(run))
        return pack

    def solo(self, run: Run, attempt: int = 1, signals: Any = None) -> None:
        """What `rayft train` does with scale.workers: 0."""
        home = home_of(run)
        if not home.exists("run.json"):
            record = RunRecord(run.name, "running", run.resolved(), run.digest(), seed=run.seed)
            home.write_text("run.json", record.to_json())
        execute(self.job(run, attempt), 0, 1, CPU, signals or Silent())


class Silent:
    """Signals nobody listens to; they ask for a stop in step `stop_at`, after which it comes."""

    def __init__(self, stop_at: int = 0) -> None:
        self.left = stop_at

    def stop_requested(self) -> bool:
        self.left -= 1
        return self.left == 0

    def progress(self, event: dict) -> None:
        pass


def home_of(run: Run) -> Storage:
    """The run's folder."""
    return Storage.open(run.storage).child(run.name)


def finish(pack: Pack) -> list:
    """Step until nobody is in; everything that was told."""
    told = []
    while pack.trials:
        told += pack.step()
    return told


def losses(run: Run, split: str = "train") -> list[float]:
    """By step."""
    return [row["loss"] for row in read_series(home_of(run)) if row["split"] == split]


def record(run: Run) -> RunRecord:
    """run.json."""
    return RunRecord.from_json(home_of(run).read_text("run.json"))
