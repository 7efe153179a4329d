"""What the numbers depend on: device, driver, versions, commit. Asks torch in another process, so
that the one which runs the day neither waits for it nor holds memory of the GPU."""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PACKAGES = ("torch", "transformers", "safetensors", "peft", "pydantic", "pyarrow", "bitsandbytes")
PROBE = """
import json, torch
cuda = torch.cuda.is_available()
one = torch.cuda.get_device_properties(0) if cuda else None
print(json.dumps({"cuda": torch.version.cuda, "devices": torch.cuda.device_count(),
    "device": one.name if one else None, "memory_gib": one.total_memory / 2**30 if one else None}))
"""


def facts(
    device: str, tiny: bool, environment: Mapping[str, str], commit: str | None
) -> dict[str, Any]:
    """For the head of the results; of the GPU where it is asked for.

    Raises RuntimeError where torch finds no CUDA device.
    """
    found: dict[str, Any] = {
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit or head(),
        "machine": f"{processor()}, {len(os.sched_getaffinity(0))} cores",
        "load": f"{os.getloadavg()[0]:.1f} at the start",
        "sizes": "tiny: these numbers say nothing about speed" if tiny else "as named",
    }
    if device == "cuda":
        gpu = _gpu(environment)
        found["device"] = f"{gpu['device']}, {gpu['memory_gib']:.0f} GiB; {gpu['devices']} here"
        found |= {"driver": driver(), "cuda": gpu["cuda"]}
    else:
        found["device"] = "cpu"
    return found | {"python": platform.python_version(), "versions": _versions(environment)}


def _gpu(environment: Mapping[str, str]) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", PROBE], env=dict(environment), capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"torch does not load: {done.stderr.strip().splitlines()[-1]}")
    gpu = json.loads(done.stdout.splitlines()[-1])
    if gpu["device"] is None:
        raise RuntimeError("torch finds no CUDA device; --device cpu --tiny tries the parts out")
    return gpu


def _versions(environment: Mapping[str, str]) -> str:
    """As the parts see them."""
    code = "from machine import versions; print(versions())"
    paths = os.pathsep.join([environment["PYTHONPATH"], str(Path(__file__).parent)])
    env = {**environment, "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def versions() -> str:
    """In this process."""
    return ", ".join(f"{name} {_version(name)}" for name in PACKAGES)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


def driver() -> str:
    """Of the GPU."""
    if not shutil.which("nvidia-smi"):
        return "unknown: no nvidia-smi"
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=30)
    return done.stdout.strip().split("\n")[0] or "unknown"


def processor() -> str:
    """The CPU's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def head() -> str:
    """Short hash, "+ changes" where tracked files differ from it; a bare copy has none."""
    if not shutil.which("git") or not (ROOT / ".git").exists():
        return "unknown: no git here (name it with --commit)"
    git = ["git", "-C", str(ROOT)]
    found = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    state = [*git, "status", "--porcelain", "--untracked-files=no"]
    changed = subprocess.run(state, capture_output=True, text=True).stdout.strip()
    return (found.stdout.strip() or "unknown") + (" + changes" if changed else "")
