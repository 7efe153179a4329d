"""rayft's own engine under Ray Train: the whole way from config to export, and through a kill."""

import json
from pathlib import Path

import faulty
import pytest

from rayft.config.run import Run
from rayft.runtime.cluster import connected
from rayft.runtime.train import train

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


@pytest.fixture(scope="module", autouse=True)
def cluster(quiet):
    with connected():
        yield


def config(storage, **changes):
    return Run.model_validate(
        {
            "name": "r",
            "storage": str(storage),
            "model": {"path": "builtin:tiny", "init": "random"},
            "methods": [{"kind": "full"}],
            "data": {
                "train": [{"path": "builtin:docstrings", "samples": 64}],
                "eval": [{"path": "builtin:docstrings", "samples": 8}],
                "max_length": 96,
            },
            "train": {"steps": 8, "save_every": 3, "global_batch": 4, "micro_batch": 2},
            "scale": {"workers": 2, "gpus": 0},
        }
        | changes
    )


def series(storage):
    """{(split, step): loss}; of a step logged again, the later line."""
    lines = (Path(storage) / "r/metrics.jsonl").read_text().splitlines()
    return {(one["split"], one["step"]): one["loss"] for one in map(json.loads, lines)}


def test_a_killed_run_has_the_loss_series_of_an_uninterrupted_one(tmp_path):
    whole = train(config(tmp_path / "whole"))
    killed = train(config(tmp_path / "killed"), engine=faulty.execute)
    assert (whole.status, whole.attempts) == ("done", 1)
    assert (killed.status, killed.attempts) == ("done", 2)
    assert series(tmp_path / "killed") == series(tmp_path / "whole")
    assert {step for split, step in series(tmp_path / "whole") if split == "train"} == {
        *range(1, 9)
    }
    assert killed.eval == whole.eval and killed.base == whole.base
    assert killed.tokens == whole.tokens and killed.steps == 8
    weights = [tmp_path / name / "r/export/model.safetensors" for name in ("whole", "killed")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
