"""Charts of one quantity: the results, importance, each parameter, each kind of cost."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from rayft.report.facts import SweepFacts, TrialResult, front
from rayft.report.figure import (
    COSTS,
    Chart,
    Figure,
    layout,
    metric_axis,
    points,
    round_logs,
    ticks,
    words,
)
from rayft.report.numbers import MetricScale, amount
from rayft.report.study import ParamImportance


def strip(facts: SweepFacts, scale: MetricScale) -> Chart:
    """Every trial's result on one line, with the base model and the median."""
    rows = facts.ranked()
    heights = _spread_out([row.value or 0.0 for row in rows])
    lines = [("base model", facts.base, "dash"), ("median trial", facts.median, "dot")]
    top = max(heights, default=0) + 1.5
    reach = _reach([*(row.value for row in rows), facts.base], 0.05)
    data = [points(rows, [r.value for r in rows], heights, facts, size=9)]
    notes = []
    for place, (name, at, dash) in enumerate(lines):
        if at is None:
            continue
        tall = top + 1.4 * (place + 1)
        data.append({
            "type": "scatter", "x": [at, at], "y": [-1, tall], "mode": "lines",
            "line": {"color": "@ink", "width": 1, "dash": dash}, "hoverinfo": "skip",
        })  # fmt: skip
        notes.append(_note(at, tall, f"{name} {scale.text(at)}", reach))
    if facts.best is not None and facts.best.value is not None:
        at = facts.best.value
        name = f"<b>{words(facts.best.trial.id)} {scale.text(at)}</b>"
        notes.append(_note(at, -1.1, name, reach, yanchor="top"))
    made = layout(
        x=f"{words(facts.record.metric)} ({_better(facts)})",
        yaxis={"visible": False, "range": [-3, top + 4.5]}, annotations=notes,
        xaxis={"range": reach},
    )  # fmt: skip
    told = f"{len(rows)} trials by {facts.record.metric}."
    return Chart("strip", {"data": data, "layout": made}, told, 190)


def important(facts: SweepFacts, found: ParamImportance) -> Chart:
    """Shares per parameter as bars, with the chance level."""
    labels = {axis.name: axis.label for axis in facts.axes}
    names = [words(labels[name]) for name in found.shares][::-1]
    shares = list(found.shares.values())[::-1]
    data = [{
        "type": "bar", "orientation": "h", "y": names, "x": shares, "width": 0.55,
        "marker": {"color": "@accent"}, "hoverinfo": "skip", "cliponaxis": False,
        "text": [f"{share:.0%}" for share in shares], "textposition": "outside",
        "textfont": {"color": "@ink"},
    }]  # fmt: skip
    line = {
        "type": "line", "x0": found.chance, "x1": found.chance, "yref": "paper", "y0": 0, "y1": 1,
        "line": {"color": "@ink", "width": 1, "dash": "dot"},
    }  # fmt: skip
    note = {
        "x": found.chance, "yref": "paper", "y": 1, "yanchor": "bottom", "showarrow": False,
        "text": "chance", "font": {"color": "@muted", "size": 11},
    }  # fmt: skip
    made = layout(
        xaxis={"range": [0, max(*shares, found.chance) * 1.18], "visible": False},
        yaxis={"tickfont": {"color": "@ink"}, "showgrid": False, "ticksuffix": "  "},
        shapes=[line], annotations=[note],
        margin={"t": 22},
    )  # fmt: skip
    told = ", ".join(f"{labels[name]} {share:.0%}" for name, share in found.shares.items())
    figure = {"data": data, "layout": made}
    return Chart("importance", figure, f"Importance: {told}.", 50 + 34 * len(names))


def slices(facts: SweepFacts) -> list[Chart]:
    """The result over each parameter by itself."""
    charts = []
    rows = facts.ranked()
    for index, axis in enumerate(facts.axes):
        here = [row for row in rows if axis.at(row.trial.params) is not None]
        xs = [axis.at(row.trial.params) for row in here]
        if axis.levels:
            xs = [x + 0.5 * _wobble(row) for x, row in zip(xs, here, strict=True) if x is not None]
        data = [points(here, xs, [r.value for r in here], facts)]
        made = layout(xaxis=ticks(axis), yaxis=metric_axis(facts, here))
        told = f"{facts.record.metric} of every trial over {axis.label}."
        charts.append(Chart(f"slice-{index}", {"data": data, "layout": made}, told, 240, axis.name))
    return charts


def costs(facts: SweepFacts) -> list[Chart]:
    """The result over each kind of cost, with the Pareto front."""
    charts = []
    for name, label in COSTS.items():
        rows = [r for r in facts.ranked() if math.isfinite(r.told.get(name, math.nan))]
        if len({row.told[name] for row in rows}) < 2:
            continue
        edge = front(rows, name, facts.sign)
        ends = [row.told[name] for row in rows]
        log = min(ends) > 0 and max(ends) / min(ends) > 20
        line = {
            "type": "scatter", "mode": "lines", "hoverinfo": "skip",
            "line": {"color": "@ink", "width": 1.5, "shape": "hv"},
            "x": [r.told[name] for r in edge], "y": [r.value for r in edge],
        }  # fmt: skip
        marks = points(rows, ends, [r.value for r in rows], facts, strong=edge)
        axis = _cost_axis(name, min(ends), max(ends), log)
        figure = {
            "data": [line, marks],
            "layout": layout(xaxis=axis, yaxis=metric_axis(facts, rows)),
        }
        best = ", ".join(f"{r.trial.id} ({amount(name, r.told[name])})" for r in edge[:8])
        told = f"{facts.record.metric} over {label}. Pareto front: {best}."
        charts.append(Chart(f"cost-{name}", figure, told, 260, label))
    return charts


def _cost_axis(name: str, low: float, high: float, log: bool) -> Figure:
    if log:
        span = [math.log10(low), math.log10(high)]
        pad = (span[1] - span[0]) * 0.06
        at = [t for t in round_logs(low, high) if low * 0.9 <= t <= high * 1.1]
        axis = {"type": "log", "range": [span[0] - pad, span[1] + pad]}
        return axis | {"tickvals": at, "ticktext": [amount(name, t) for t in at]}
    pad = (high - low) * 0.06
    at = _even(low, high, 1024 if name == "memory" else 10)
    texts = [amount(name, t) for t in at]
    return {"range": [low - pad, high + pad], "tickvals": at, "ticktext": texts}


def _even(low: float, high: float, base: int) -> list[float]:
    """About three round numbers between two ends; round in units of 1024 for bytes."""
    unit = float(base) ** math.floor(math.log(max((high - low) / 2, 1e-9), base))
    factors = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512) if base == 1024 else (1, 2, 5)
    step = next((unit * f for f in factors if (high - low) / (unit * f) <= 3.5), unit * base)
    first = math.ceil(low / step)
    return [step * n for n in range(first, math.floor(high / step) + 1)]


def _spread_out(values: Sequence[float]) -> list[float]:
    """Heights for points on a line so that neighbours do not cover each other."""
    if not values:
        return []
    low, high = min(values), max(values)
    width = (high - low) / 70 or 1.0
    stacks: dict[int, int] = {}
    heights = []
    for value in values:
        cell = int((value - low) / width)
        heights.append(float(stacks.get(cell, 0)))
        stacks[cell] = stacks.get(cell, 0) + 1
    return heights


def _note(x: float, y: float, text: str, reach: Sequence[float], **more: object) -> Figure:
    """Text at a place; near an end of the axis it grows inwards, so that nothing is cut off."""
    share = (x - reach[0]) / (reach[1] - reach[0])
    side = "left" if share < 0.25 else "right" if share > 0.75 else "center"
    return {
        "xanchor": side,
        "x": x, "y": y, "text": text, "showarrow": False, "yanchor": "bottom",
        "font": {"color": "@ink"},
    } | more  # fmt: skip


def _reach(values: Iterable[float | None], share: float) -> list[float]:
    known = [value for value in values if value is not None] or [0.0, 1.0]
    pad = (max(known) - min(known)) * share or 0.1
    return [min(known) - pad, max(known) + pad]


def _wobble(row: TrialResult) -> float:
    """A fixed place in [-0.5, 0.5) by the trial's id: many trials share a level."""
    return (sum(ord(c) * 31**i for i, c in enumerate(row.trial.id)) % 97) / 97 - 0.5


def _better(facts: SweepFacts) -> str:
    return "lower is better" if facts.sign > 0 else "higher is better"
