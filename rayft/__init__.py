"""rayft: fine-tune language models on a Ray cluster, and find the best way to do it.

    import rayft
    record = rayft.train("experiments/quickstart/qlora.yaml", ["optim.lr=1e-4"])
    run = rayft.load({"name": "a", ...})

Importing rayft imports neither torch nor ray.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rayft.config.run import Run
    from rayft.records.run_record import RunRecord, SweepRecord

__version__ = "0.1.0"
__all__ = ["__version__", "load", "sweep", "train"]

# By name, at the call: rooms may import rayft.__version__ without importing what is above them.
_API = "rayft.api"


def _other_than_kernels(record: logging.LogRecord) -> bool:
    """False for bitsandbytes' advice to install the `kernels` package."""
    return not record.msg.startswith("Failed to load CPU gemm_4bit_forward from kernels-community")


# Given while bitsandbytes is imported, on CPUs with AVX512-BF16, whoever imports it first (peft,
# transformers, we); so it is filtered here, before any of them. The kernel is one for the path that
# rayft's layers never take (models/load.py::keep_nf4_as_loaded); other messages pass.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_other_than_kernels)


def load(config: str | Path | Mapping[str, object] | Run, overrides: Sequence[str] = ()) -> Run:
    """A checked Run from a file, a mapping or a Run; see rayft.config.load.load."""
    return import_module(_API).load(config, overrides)


def train(
    config: str | Path | Mapping[str, object] | Run, overrides: Sequence[str] = ()
) -> RunRecord:
    """Run, or continue the unfinished run of that name; see rayft.api.train."""
    return import_module(_API).train(config, overrides)


def sweep(
    config: str | Path | Mapping[str, object] | Run, overrides: Sequence[str] = ()
) -> SweepRecord:
    """Run, or continue, the search of the config's sweep block; see rayft.api.sweep."""
    return import_module(_API).sweep(config, overrides)
