"""The few packages that the engine needs beside torch, transformers and safetensors.

A machine with a GPU and without a network gets them as wheels from a folder; they are unpacked into
a temporary folder that only the parts of the day see, so nothing of the machine changes.
"""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIMIT = 60.0  # MiB of all that are not optional
MANYLINUX = ("2_28", "2_27", "2_24", "2_17", "2014", "2_12", "2010", "2_5", "1")


@dataclass(frozen=True)
class Need:
    """A package. `mib`: size of the wheel for Python 3.12 on x86-64 in the version of
    constraints.txt, as `--wheels` fetched it (2026-11-21)."""

    package: str
    module: str
    mib: float
    optional: str = ""  # what goes without it


NEEDS = (
    Need("pydantic", "pydantic", 0.47),
    Need("pydantic_core", "pydantic_core", 2.16),
    Need("annotated-types", "annotated_types", 0.01),
    Need("typing-inspection", "typing_inspection", 0.01),
    Need("peft", "peft", 0.80),
    Need("accelerate", "accelerate", 0.38),
    Need("psutil", "psutil", 0.15),
    Need("pyarrow", "pyarrow", 52.49),
    Need("PyYAML", "yaml", 0.77),
    Need("pytest", "pytest", 0.39),
    Need("pluggy", "pluggy", 0.03),
    Need("iniconfig", "iniconfig", 0.01),
    Need("bitsandbytes", "bitsandbytes", 41.14, optional="nf4 and 8-bit AdamW are skipped"),
)
GIVEN = ("torch", "transformers", "safetensors")  # far too large to bring, or of no use alone


def pinned(package: str) -> str:
    """Its version in constraints.txt."""
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        name, _, version = line.partition("==")
        if _plain(name) == _plain(package):
            return version.strip()
    raise KeyError(f"constraints.txt does not name {package}")


def missing() -> list[Need]:
    """What this interpreter does not find."""
    return [need for need in NEEDS if find_spec(need.module) is None]


def absent_givens() -> list[str]:
    """Of what the machine must have by itself."""
    return [name for name in GIVEN if find_spec(name) is None]


def in_folder(folder: Path, need: Need) -> Path | None:
    """Its newest wheel there."""
    name = _plain(need.package)
    found = [path for path in folder.glob("*.whl") if _plain(path.name.split("-")[0]) == name]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def told(needs: list[Need], folder: Path | None) -> str:
    """The list, sizes included; those of wheels at hand are their own."""
    lines, total = [], 0.0
    for need in needs:
        wheel = in_folder(folder, need) if folder else None
        mib = wheel.stat().st_size / 2**20 if wheel else need.mib
        total += 0.0 if need.optional else mib
        where = f"from {wheel}" if wheel else "not at hand"
        also = f"; optional: without it {need.optional}" if need.optional else ""
        lines.append(f"  {need.package:18} {pinned(need.package):10} {mib:6.2f} MiB  {where}{also}")
    lines.append(f"  {'together, but for optional ones':29} {total:6.2f} MiB  (limit {LIMIT:g})")
    return "\n".join(lines)


def advice(needs: list[Need]) -> str:
    """How to get them here."""
    names = " ".join(need.package for need in needs)
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    return (
        "fetch them on a machine with a package index, put the folder on this one, start again:\n"
        f"  python experiments/gpu/run.py --wheels FOLDER --for-python {here} "
        f"--for-machine {platform.machine()} --names {names}\n"
        "  make gpu WHEELS=FOLDER"
    )


def install(needs: list[Need], folder: Path, site: Path) -> None:
    """Unpack the wheels of `needs` that are in `folder` into `site`. Raises RuntimeError."""
    names = [need.package for need in needs if in_folder(folder, need)]
    if not names:
        return
    # no versions: whoever filled the folder chose them
    options = ["--no-index", "--find-links", str(folder), "--no-deps", "--no-compile"]
    _pip(["install", "--target", str(site), *options, *names])


def download(folder: Path, names: list[str], python: str, machine: str) -> int:
    """The wheels of `names` (default: all but the optional ones) for another machine; exit code."""
    wanted = [need for need in NEEDS if need.package in names or not (names or need.optional)]
    if unknown := sorted(set(names) - {need.package for need in NEEDS}):
        print(f"not needed: {', '.join(unknown)}; known: {', '.join(n.package for n in NEEDS)}")
        return 2
    folder.mkdir(parents=True, exist_ok=True)
    target = ["--python-version", python, "--implementation", "cp"]
    for each in MANYLINUX:
        tag = f"manylinux{each}" if each in ("2014", "2010", "1") else f"manylinux_{each}"
        target += ["--platform", f"{tag}_{machine}"]
    exact = [f"{need.package}=={pinned(need.package)}" for need in wanted]
    options = ["--no-deps", "--only-binary=:all:", "--dest", str(folder), *target]
    try:
        _pip(["download", *options, *exact])
    except RuntimeError as error:
        print(error)
        return 1
    print(f"wheels for Python {python} on {machine} in {folder}:\n{told(wanted, folder)}")
    return 0


def _pip(arguments: list[str]) -> None:
    quiet = ["--quiet", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", *arguments, *quiet]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no output"]
        wrong = [line for line in lines if line.startswith("ERROR")] or lines
        raise RuntimeError(f"pip {arguments[0]} failed: {wrong[-1]}")


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name.strip()).lower()
