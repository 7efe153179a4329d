"""The series in metrics.jsonl as a reader wants it: one row per step, split and task."""

from __future__ import annotations

from collections.abc import Mapping

from rayft.storage.folder import Storage
from rayft.storage.jsonl import read_jsonl, read_log
from rayft.storage.sealed import damage_sentence

METRICS = "metrics.jsonl"
Key = tuple[int, str, str]


def key_of(row: Mapping[str, object]) -> Key | None:
    """(step, split, task); None for a row that belongs to no step."""
    step, split = row.get("step"), row.get("split", "train")
    if not isinstance(step, int) or isinstance(step, bool) or not isinstance(split, str):
        return None
    return step, split, str(row.get("task") or "")


def latest_rows(rows: list[dict[str, object]]) -> list[dict[str, object]]:
    """Rows by step, then in the order of their first line. A step logged again after a resume
    replaces the earlier row; rows without a step are left out."""
    kept: dict[Key, dict[str, object]] = {}
    for row in rows:
        key = key_of(row)
        if key is not None:
            kept[key] = row
    return [kept[key] for key in sorted(kept, key=lambda key: key[0])]


def read_series(run: Storage, path: str = METRICS) -> list[dict[str, object]]:
    """`latest_rows` of a run's metrics; [] when nothing was logged."""
    return latest_rows(read_jsonl(run, path, is_series_row))


def missing_lines(run: Storage, lines: int) -> list[str]:
    """What a run's metrics have lost, a sentence each.

    Args:
        lines: that there were when the run was saved.
    """
    found, place = read_log(run, METRICS, is_series_row), run.shown(METRICS)
    said = [damage_sentence(place, found.damage)] if found.damage else []
    if found.last < lines:
        said.append(f"{place} has {found.last} of the {lines} lines it had: its curve has a gap")
    return said


def is_series_row(row: Mapping[str, object]) -> bool:
    """Whether a row is one of a series: it has a step and a loss, one per split and task."""
    need = ("loss", "eval_loss") if row.get("split") == "eval" else ("loss",)
    return key_of(dict(row)) is not None and all(
        isinstance(row.get(name), int | float) for name in need
    )


def base_of(run: Storage) -> dict[str, float]:
    """The base model's evaluation, {"eval_loss": ...}, from the line of step 0; {} where it is
    gone, and for a clone, whose donor was evaluated."""
    first = (r for r in read_series(run) if r["step"] == 0 and r.get("split") == "eval")
    found = next(first, {}).items()
    return {k: float(v) for k, v in found if k.startswith("eval_") and isinstance(v, int | float)}
