"""Learning curves: the metric by step of every trial, and where each one ended."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rayft.report.facts import SweepFacts, TrialResult
from rayft.report.figure import SYMBOLS, Chart, Figure, layout, pointed, words
from rayft.report.numbers import MetricScale

FEW = 5
"""Trials drawn in colour and named; the rest is grey."""
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash")


def curves(facts: SweepFacts, scale: MetricScale) -> Chart:
    """The best few in colour, dashed each in its own way; the rest grey."""
    rows = [row for row in facts.rows if _course(row, facts)]
    strong = [row for row in facts.ranked() if row in rows][:FEW]
    weak = [row for row in rows if row not in strong]
    data = [_crowd(weak, facts), *_ends(weak, facts)]
    notes: list[Figure] = []
    for number, row in reversed(list(enumerate(strong))):
        data.append(_line(row, number, facts, scale))
    last = max((row.trial.step for row in rows), default=1)
    shapes = []
    if facts.base is not None:
        shapes.append({
            "type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": facts.base, "y1": facts.base,
            "line": {"color": "@ink", "width": 1, "dash": "dash"},
        })  # fmt: skip
        notes.append({
            "xref": "paper", "x": 1, "xanchor": "right", "y": facts.base, "yanchor": "bottom",
            "text": f"base model {scale.text(facts.base)}", "showarrow": False,
            "font": {"color": "@ink"},
        })  # fmt: skip
    made = layout(
        x="optimizer step", y=words(facts.record.metric), shapes=shapes, annotations=notes,
        xaxis={"range": [0, last * 1.02]}, yaxis={"range": _range(rows, facts), "nticks": 6},
        showlegend=True, hovermode="closest",
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "font": {"size": 12},
                "itemclick": False, "itemdoubleclick": False, "traceorder": "normal"},
    )  # fmt: skip
    best = ", ".join(f"{row.trial.id} {scale.text(row.value)}" for row in strong)
    told = f"{facts.record.metric} by step of {len(rows)} trials. The best: {best}."
    return Chart("curves", {"data": data, "layout": made}, told, 440)


def _course(row: TrialResult, facts: SweepFacts) -> list[tuple[int, float]]:
    """(step, metric) of every report that has a finite one."""
    told = [(r.step, r.metrics.get(facts.record.metric, math.nan)) for r in row.trial.reports]
    return [(step, value) for step, value in told if math.isfinite(value)]


def _start(row: TrialResult, facts: SweepFacts) -> list[tuple[int, float]]:
    """The base model is where every trial that started anew begins."""
    course = _course(row, facts)
    known = facts.base is not None and course[0][0] > 0 and not row.trial.donors
    return [(0, facts.base or 0.0), *course] if known else course


def _line(row: TrialResult, number: int, facts: SweepFacts, scale: MetricScale) -> Figure:
    course = _start(row, facts)
    best = number == 0
    return {
        "type": "scatter", "mode": "lines+markers", "legendrank": number,
        "name": f"{words(row.trial.id)} {scale.text(row.value)}",
        "x": [step for step, _ in course], "y": [value for _, value in course],
        "line": {"color": f"@s{number + 1}", "width": 3 if best else 1.8,
                 "dash": _DASHES[number]},
        "marker": {"size": [0] * (len(course) - 1) + [13 if best else 8],
                   "symbol": "star" if best else SYMBOLS.get(row.trial.status, "circle-open"),
                   "opacity": 1},
        "text": [f"{scale.text(value)} at step {step:,}" for step, value in course],
        "hovertemplate": "%{text}<br>%{customdata}<extra></extra>",
        "customdata": [pointed(row)] * len(course), "cliponaxis": False,
    }  # fmt: skip


def _crowd(rows: Sequence[TrialResult], facts: SweepFacts) -> Figure:
    """All grey lines in one trace, with gaps between."""
    xs: list[object] = []
    ys: list[object] = []
    for row in rows:
        for step, value in _start(row, facts):
            xs.append(step)
            ys.append(value)
        xs.append(None)
        ys.append(None)
    thin = 0.25 if len(rows) > 100 else 0.45
    return {
        "type": "scatter", "mode": "lines", "x": xs, "y": ys, "hoverinfo": "skip",
        "line": {"color": "@grey", "width": 1}, "opacity": thin, "showlegend": False,
    }  # fmt: skip


def _ends(rows: Sequence[TrialResult], facts: SweepFacts) -> list[Figure]:
    """Where each grey line ends, marked by why."""
    found = []
    for status in ("stopped", "diverged", "failed", "running", "done"):
        here = [row for row in rows if row.trial.status == status]
        if not here:
            continue
        lasts = [_course(row, facts)[-1] for row in here]
        why = {"stopped": "stopped early", "done": "ran to its end", "running": "still runs"}
        loud = status in ("diverged", "failed")
        found.append({
            "type": "scatter", "mode": "markers",
            "name": f"{why.get(status, status)} ({len(here)})",
            "x": [step for step, _ in lasts], "y": [value for _, value in lasts],
            "marker": {"symbol": SYMBOLS.get(status, "circle-open"), "size": 9 if loud else 6,
                       "color": "@bad" if loud else "@grey"},
            "hovertext": [pointed(row) for row in here], "hoverinfo": "text",
            "legendrank": 900,
        })  # fmt: skip
    return found


def _range(rows: Sequence[TrialResult], facts: SweepFacts) -> list[float]:
    """From the best to the base model, or nine in ten of the values where that is further; what
    diverged is cut off."""
    values = sorted(facts.sign * v for row in rows for _, v in _course(row, facts))
    if not values:
        return [0.0, 1.0]
    low, high = values[0], values[int(0.9 * (len(values) - 1))]
    if facts.base is not None:
        low, high = min(low, facts.sign * facts.base), max(high, facts.sign * facts.base)
    pad = (high - low) * 0.05 or abs(high) * 0.02 or 0.1
    return sorted([facts.sign * (low - pad), facts.sign * (high + pad)])
