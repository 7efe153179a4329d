"""Names of checkpoints, and what can be said of them without reading one. No torch in here."""

from __future__ import annotations

import json
import logging
import re

from rayft.core.errors import DamagedError, StorageError
from rayft.storage.folder import Storage

log = logging.getLogger(__name__)

FOLDER = "checkpoints"
COMMIT = "COMMIT.json"
BAD = "BAD.json"  # marks a bad checkpoint where folders cannot be renamed
ASIDE = ".bad"  # where bad ones go where folders can be
RESTARTED = "RESTARTED.json"  # in ASIDE: those that the user gave up
_NAME = re.compile(r"step-(\d{1,18})-(\d{1,18})([0-9A-Za-z]*)")


def folder_name(step: int, attempt: str) -> str:
    """`step-<n>-<attempt>`."""
    return f"step-{step}-{attempt}"


def folder_order(name: str) -> tuple[int, int, str] | None:
    """(step, attempt number, rest of the attempt) of a checkpoint's folder; None: not one."""
    match = _NAME.fullmatch(name)
    return (int(match[1]), int(match[2]), match[3]) if match else None


def folder_names(run: Storage) -> list[str]:
    """Checkpoint folders, committed or not, newest first (by step, then attempt)."""
    found = [entry.name for entry in run.list(FOLDER) if entry.folder and folder_order(entry.name)]
    return sorted(found, key=lambda name: folder_order(name) or (), reverse=True)


def committed_names(run: Storage) -> list[str]:
    """Those that may be used, newest first."""
    return [
        name
        for name in folder_names(run)
        if run.exists(f"{FOLDER}/{name}/{COMMIT}") and not run.exists(f"{FOLDER}/{name}/{BAD}")
    ]


def last_attempt(run: Storage) -> int:
    """The highest number of an attempt that has left a folder, good or bad; 0 without one."""
    return max(
        ((folder_order(name) or (0, 0))[1] for name in [*folder_names(run), *_moved(run)]),
        default=0,
    )


def set_aside(run: Storage, name: str, reason: str) -> None:
    """Move the folder to checkpoints/.bad/ (object stores: mark it): nobody tries it again."""
    folder = run.local_path(f"{FOLDER}/{name}")
    try:
        if folder is None:
            run.write_text(f"{FOLDER}/{name}/{BAD}", json.dumps({"reason": reason}))
        else:
            target = folder.parent / ASIDE / name
            target.parent.mkdir(exist_ok=True)
            folder.rename(target)
    except (OSError, StorageError) as error:  # another rank was first, or storage is read-only
        log.warning("could not set %s aside: %s", name, error)


def damaged_names(run: Storage) -> list[str]:
    """Commits that were set aside as bad, newest first, without those that were given up."""
    marked = [name for name in folder_names(run) if run.exists(f"{FOLDER}/{name}/{BAD}")]
    found = {*_moved(run), *marked} - _given_up(run)
    return sorted(found, key=lambda name: folder_order(name) or (), reverse=True)


def give_up(run: Storage) -> list[str]:
    """Set every checkpoint of the run aside, so that it begins at step 0; their names. Nothing is
    deleted."""
    for name in folder_names(run):
        if not run.exists(f"{FOLDER}/{name}/{BAD}"):
            set_aside(run, name, "the run was started again with --restart")
    gone = sorted({*_moved(run), *folder_names(run)} - _given_up(run))
    if gone:
        every = sorted({*gone, *_given_up(run)})
        run.write_text(f"{FOLDER}/{ASIDE}/{RESTARTED}", json.dumps({"checkpoints": every}) + "\n")
    return gone


def all_damaged(run: Storage, bad: list[str]) -> DamagedError:
    """What stops a run whose commits are `bad`, every one."""
    return DamagedError(
        f"every checkpoint of this run is damaged: {', '.join(bad)}",
        where=run.shown(FOLDER),
        cause="storage that loses or flips bits; which files, is in the lines above",
        fix="put one back from a copy, or give the command again with --restart: "
        "it sets them aside and begins at step 0",
    )


def _moved(run: Storage) -> list[str]:
    return [e.name for e in run.list(f"{FOLDER}/{ASIDE}") if e.folder and folder_order(e.name)]


def _given_up(run: Storage) -> set[str]:
    try:
        told = json.loads(run.read_bytes(f"{FOLDER}/{ASIDE}/{RESTARTED}"))
        return {name for name in told["checkpoints"] if isinstance(name, str)}
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # the user is asked once more
        return set()
