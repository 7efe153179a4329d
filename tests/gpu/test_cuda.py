"""On one GPU, without Ray: the engine trains, evaluates, saves, resumes and exports there.

python -m pytest -m gpu tests/gpu
"""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from rayft.compose.assemble import assemble
from rayft.compose.data import open_corpus, prepare_data
from rayft.compose.execute import stepper_of
from rayft.config.load import load
from rayft.records.series import read_series
from rayft.storage.folder import Storage
from rayft.training.driver import train
from rayft.trials.pack import Pack
from tests.packs import Lab, losses

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CASES = {
    "full-fp32": ["methods=full", "model.dtype=fp32"],
    "full-bf16": ["methods=full", "model.dtype=bf16"],
    "full-zero3-bf16": ["methods=full", "model.dtype=bf16", "strategy=zero3"],
    "lora-bf16": ["methods=lora", "model.dtype=bf16"],
    "qlora-zero2": ["methods=lora", "model.dtype=bf16", "model.quant=nf4", "strategy=zero2"],
    "qlora": ["methods=lora", "model.dtype=bf16", "model.quant=nf4"],
    "lora-8bit-adam": ["methods=lora", "model.dtype=bf16", "optim.kind=paged_adamw_8bit"],
}
NEEDS = {  # beside torch and transformers; a machine that is lent for a day may lack them
    "full-zero3-bf16": ("deepspeed",),
    "qlora-zero2": ("deepspeed", "bitsandbytes"),
    "qlora": ("bitsandbytes",),
    "lora-8bit-adam": ("bitsandbytes",),
}


def config(folder, changes):
    base = {
        "name": "r",
        "storage": str(folder),
        "model": {"path": "builtin:tiny"},
        "data": {
            "train": [{"path": "builtin:docstrings", "samples": 256}],
            "eval": [{"path": "builtin:docstrings", "samples": 32}],
            "max_length": 128,
            "packing": True,
        },
        "optim": {"lr": 1e-3},
        "train": {"steps": 20, "global_batch": 4, "micro_batch": 2, "save_every": 10},
        "scale": {"workers": 0},
    }
    return load(base, changes)


@pytest.mark.parametrize("case", CASES)
def test_trains_on_the_gpu(tmp_path, case):
    absent = [name for name in NEEDS.get(case, ()) if find_spec(name) is None]
    if absent:
        pytest.skip(f"{' and '.join(absent)} not installed")
    record = train(config(tmp_path, CASES[case]))
    assert record.status == "done"
    assert record.eval["eval_loss"] < 0.95 * record.base["eval_loss"]
    assert 0 < record.peak_memory < torch.cuda.get_device_properties(0).total_memory
    assert (tmp_path / "r/export/README.md").exists()


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_step_waits_for_the_gpu_once(tmp_path, method):
    """And transformers once per micro-batch: it asks whether the rows are packed."""
    run = config(tmp_path, [f"methods={method}", "model.dtype=bf16", "data.packing=false"])
    ready = prepare_data(run, lambda function, items: [function(item) for item in items])
    parts = assemble(run, open_corpus(run, ready.uri, ready.hash), torch.device("cuda", 0))
    stepper = stepper_of(parts)
    for step in range(1, 4):  # the gradient check looks in the first two
        stepper.run(step, lambda: False, more=True)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            stepper.run(4, lambda: False, more=True)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [Path(each.filename).name for each in said if "synchronizing" in str(each.message)]
    assert sorted(waits) == ["loop.py", *["masking_utils.py"] * 2]


def test_gpu_and_cpu_agree(tmp_path, monkeypatch):
    """Full fine-tuning in fp32: the same losses on both, to the rounding of other kernels."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    losses = {}
    for gpus in (0, 1):
        folder = tmp_path / str(gpus)
        train(config(folder, ["methods=full", f"scale.gpus={gpus}"]))
        rows = read_series(Storage.open(str(folder)).child("r"))
        losses[gpus] = [row["loss"] for row in rows if row["split"] == "train"]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_a_parked_trial_lies_in_host_memory_and_goes_on_bit_for_bit(tmp_path):
    """Parameters, moments and the generator of its dropout."""
    changes = ("methods.0.dropout=0.2", "train.eval_every=2", "optim.warmup=2.0")
    lab, found = Lab(tmp_path, *changes, steps=4), {}
    for where in ("still", "paused"):
        run = lab.run("bits", where=where)
        pack = Pack(run, lab.ready.uri, lab.ready.hash, torch.device("cuda", 0), slots=1)
        pack.admit(lab.job(run))
        while pack.trials:
            pack.step()
            if where == "paused" and pack.trials:
                pack.park("bits")
                slot = pack._table.all["bits"]
                params = slot.adapter.params.values()
                states = [t for p in params for t in slot.optimizer.state[p].values()]
                assert all(t.is_pinned() for t in (*(p.data for p in params), *states))
                pack.resume("bits")
                assert all(p.is_cuda and p.grad.is_cuda for p in params)
        found[where] = losses(run)
    assert found["paused"] == found["still"] and len(found["still"]) == 4
