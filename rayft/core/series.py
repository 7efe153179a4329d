"""The series in metrics.jsonl as a reader wants it: one row per step, split and task."""

from __future__ import annotations

from typing import Any

from rayft.core.jsonl import read_jsonl
from rayft.core.storage import Storage

METRICS = "metrics.jsonl"
Key = tuple[int, str, str]


def key_of(row: dict[str, Any]) -> Key | None:
    """(step, split, task); None for a row that belongs to no step."""
    step, split = row.get("step"), row.get("split", "train")
    if not isinstance(step, int) or isinstance(step, bool) or not isinstance(split, str):
        return None
    return step, split, str(row.get("task") or "")


def latest(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows by step, then in the order of their first line. A step logged again after a resume
    replaces the earlier row; rows without a step are left out."""
    kept: dict[Key, dict[str, Any]] = {}
    for row in rows:
        key = key_of(row)
        if key is not None:
            kept[key] = row
    return [kept[key] for key in sorted(kept, key=lambda key: key[0])]


def read_series(run: Storage, path: str = METRICS) -> list[dict[str, Any]]:
    """`latest` of a run's metrics; [] when nothing was logged."""
    return latest(read_jsonl(run, path))
