"""The parts of the day, most important first, and the seconds that each may take."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent / "parts"


@dataclass(frozen=True)
class Part:
    """A script in a process of its own, which must end within `limit` seconds (`run.allowed`)."""

    name: str
    script: Path
    limit: float
    arguments: tuple[str, ...] = ()


# Together 525 s, so that with start and ends the whole stays under 9 minutes.
PARTS = (
    Part("gpu tests", HERE / "gpu_tests.py", 100),
    Part("losses, CPU and GPU", HERE / "both_losses.py", 70),
    Part("packing, 1B bf16", HERE / "packed.py", 90, ("--shape", "1b")),
    Part("packing, 8B nf4", HERE / "packed.py", 120, ("--shape", "8b", "--quant", "nf4")),
    Part("32 trials under 60 GB", HERE / "many_trials.py", 70),
    Part("chunked loss, 128k", HERE / "chunked_loss.py", 30),
    Part("single job", HERE / "single_run.py", 45),
)
