"""One small local Ray per module, away from other clusters of this machine."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest

from rayft.config.run import Run

ENV = {
    "RAY_AUTH_MODE": "disabled",  # or a token file is left in the home folder
    "RAYFT_DASHBOARD": "0",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": f"{Path(__file__).parents[2]}:{Path(__file__).parent}",
}


@pytest.fixture(scope="session", autouse=True)
def quiet():
    """The environment of the drivers under test; ours is put back."""
    before = dict(os.environ)
    os.environ.pop("RAY_ADDRESS", None)
    os.environ.update(ENV)
    folder = tempfile.mkdtemp(prefix="rft", dir="/tmp")  # short: Unix socket paths are limited
    os.environ["RAY_TMPDIR"] = folder
    yield
    os.environ.clear()
    os.environ.update(before)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def a_run(tmp_path):
    """Makes a Run on two CPU workers below this test's folder."""

    def make(**changes):
        config = {
            "name": "r",
            "storage": str(tmp_path),
            "model": {"path": "builtin:tiny"},
            "data": {"train": [{"path": "builtin:docstrings"}]},
            "train": {"steps": 40, "save_every": 10},
            "scale": {"workers": 2, "gpus": 0},
        }
        return Run.model_validate(config | changes)

    return make
