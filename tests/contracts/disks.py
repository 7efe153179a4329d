"""Real file systems that refuse: a small one that fills up, one that becomes read-only."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def mounted(*arguments: str) -> None:
    """`mount ...`; skips the test, with mount's words, where it is refused."""
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mount is refused here: {done.stderr.strip()}")


@contextmanager
def small_disk(folder: Path, size: str = "8m") -> Iterator[Path]:
    """A file system of `size` at `folder`."""
    folder.mkdir()
    mounted("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder))
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Take every byte that is left."""
    file = folder / "filler"
    room = os.statvfs(folder)
    with file.open("wb") as out:
        os.posix_fallocate(out.fileno(), 0, room.f_bavail * room.f_bsize)
    return file
