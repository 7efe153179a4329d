"""Tables at the foot of the page: failures, who copied whom, every trial."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from rayft.report.axes import written
from rayft.report.facts import SweepFacts, TrialResult
from rayft.report.numbers import MetricScale, many, seconds, size

MOST = 200
"""Copies that are listed one by one."""


def failures(facts: SweepFacts) -> str:
    """Trials without a result that counts, each with the first line of its error."""
    rows = [r for r in (*facts.rows, *facts.repeats) if r.trial.status in ("failed", "diverged")]
    if not rows:
        return ""
    body = "".join(
        f'<tr><th scope="row">{escape(row.trial.id)}</th><td>{escape(row.trial.status)}</td>'
        f'<td class="n">{row.trial.step:,}</td><td>{escape(_first(row.trial.error))}</td></tr>'
        for row in rows
    )
    return (
        "<h2>Failures</h2>"
        '<div class="wide-table tall"><table><thead><tr><th scope="col">trial</th>'
        '<th scope="col">status</th><th scope="col" class="n">step</th>'
        f'<th scope="col">what it said</th></tr></thead><tbody>{body}</tbody></table></div>'
    )


def inheritance(facts: SweepFacts) -> str:
    """Population-based training: who took over whose weights, and when."""
    copies = sorted(
        (step, row.trial.id, donor) for row in facts.rows for step, donor in row.trial.donors
    )
    if not copies:
        return ""
    body = "".join(
        f'<tr><td class="n">{step:,}</td><td>{escape(trial)}</td><td>{escape(donor)}</td></tr>'
        for step, trial, donor in copies[:MOST]
    )
    given: dict[str, int] = {}
    for _, _, donor in copies:
        given[donor] = given.get(donor, 0) + 1
    most = max(given, key=lambda name: given[name])
    times = "time" if len(copies) == 1 else "times"
    more = f" The first {MOST} are listed." if len(copies) > MOST else ""
    return (
        "<h2>Who copied whom</h2>"
        f"<p>Weights were taken over {len(copies):,} {times}, most often from {escape(most)} "
        f"({given[most]:,}).{more}</p>"
        '<div class="wide-table tall"><table><thead><tr><th scope="col" class="n">step</th>'
        '<th scope="col">trial</th><th scope="col">took the weights of</th></tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def every_trial(facts: SweepFacts, scale: MetricScale) -> str:
    """The sortable table; the best result first."""
    if not facts.rows:
        return ""
    ranked = facts.ranked()
    rest = [row for row in facts.rows if not row.fair]
    columns = _columns(facts)
    head = "".join(
        f'<th scope="col"{_class(number)}{_order(facts, name)}>'
        f"<button>{escape(label)}</button></th>"
        for name, label, number in columns
    )
    rows = [*ranked, *facts.repeats, *rest]
    body = "".join(_line(facts, row, columns, scale) for row in rows)
    tall = " tall" if len(rows) > 60 else ""
    return (
        "<h2>Every trial</h2>"
        '<p class="note">Press a heading to sort. The same table is in trials.csv; '
        "optuna-journal.log opens in optuna-dashboard.</p>"
        f'<div class="wide-table{tall}" tabindex="0" role="region" aria-label="Every trial">'
        f'<table id="trials" class="sortable"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


Column = tuple[str, str, bool]
"""Key, heading, whether it holds numbers."""


def _columns(facts: SweepFacts) -> list[Column]:
    told = {name for row in facts.rows for name in row.told}
    listed: list[Column] = [
        ("trial", "trial", False),
        ("status", "status", False),
        ("value", facts.record.metric, True),
        ("at", "at step", True),
        ("step", "last step", True),
    ]
    listed += [
        (f"axis {i}", axis.label, _numeric(axis.levels)) for i, axis in enumerate(facts.axes)
    ]
    costs = (("seconds", "engine time"), ("memory", "memory"), ("params_trainable", "trainable"))
    return [*listed, *((name, label, True) for name, label in costs if name in told)]


def _line(
    facts: SweepFacts, row: TrialResult, columns: Sequence[Column], scale: MetricScale
) -> str:
    star = facts.best is not None and row.trial.id == facts.best.trial.id
    cells = []
    for name, _, number in columns:
        raw, text = _cell(facts, row, name, scale)
        if name == "trial":
            mark = '<span class="star" title="best">★</span> ' if star else ""
            cells.append(f'<td data-v="{escape(row.trial.id)}">{mark}{escape(text)}</td>')
            continue
        sort = "" if raw is None else escape(str(raw))
        style = ' class="n"' if number else ' class="long"' if len(text) > 24 else ""
        full = f' title="{escape(text)}"' if len(text) > 24 else ""
        cells.append(f'<td{style}{full} data-v="{sort}">{escape(text)}</td>')
    return f"<tr{' class=best' if star else ''}>{''.join(cells)}</tr>"


def _cell(facts: SweepFacts, row: TrialResult, name: str, scale: MetricScale) -> tuple[object, str]:
    """What to sort by, and what to show."""
    trial = row.trial
    if name.startswith("axis "):
        axis = facts.axes[int(name.removeprefix("axis "))]
        picked = axis.pick(trial.params)
        return picked, "–" if picked is None else written(picked)
    again = f"{trial.status}, other seed" if trial.origin else trial.status
    known: dict[str, tuple[object, str]] = {
        "trial": (trial.id, trial.id),
        "status": (trial.status, again),
        "value": (row.value, scale.text(row.value)),
        "at": (row.at, "–" if row.at is None else f"{row.at:,}"),
        "step": (trial.step, f"{trial.step:,}"),
        "seconds": (row.told.get("seconds"), seconds(row.told.get("seconds"))),
        "memory": (row.told.get("memory"), size(row.told.get("memory"))),
        "params_trainable": (
            row.told.get("params_trainable"),
            many(row.told.get("params_trainable")),
        ),
    }
    return known[name]


def _numeric(levels: Sequence[str]) -> bool:
    try:
        return all([float(level) == float(level) for level in levels])
    except ValueError:
        return False


def _class(number: bool) -> str:
    return ' class="n"' if number else ""


def _order(facts: SweepFacts, name: str) -> str:
    way = "ascending" if facts.sign > 0 else "descending"
    return f' aria-sort="{way}"' if name == "value" else ""


def _first(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "no message")
