"""rayft from Python: the same code as the commands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rayft.config.load import load
from rayft.config.run import Run

if TYPE_CHECKING:
    from rayft.records.run_record import RunRecord, SweepRecord

__all__ = ["load", "sweep", "train"]


def train(
    config: str | Path | Mapping[str, object] | Run,
    overrides: Sequence[str] = (),
    *,
    restart: bool = False,
) -> RunRecord:
    """Run, or continue the unfinished run of that name; `rayft train` is this function.

    Args:
        restart: set the run's checkpoints and metrics aside (nothing is deleted), begin at step 0.

    Raises:
        RayftError: see rayft.core.errors; each class has the command's exit code.
    """
    run = load(config, overrides)
    from rayft.training.driver import train as start  # torch and ray: only when training

    return start(run, restart=restart)


def sweep(
    config: str | Path | Mapping[str, object] | Run, overrides: Sequence[str] = ()
) -> SweepRecord:
    """Run, or continue, the search that the config's sweep block describes; `rayft sweep` is this
    function.

    Raises:
        RayftError: see rayft.core.errors; each class has the command's exit code.
    """
    run = load(config, overrides)
    from rayft.sweeps.driver import sweep as start  # ray: only when a sweep starts

    return start(run)
