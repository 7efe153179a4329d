"""The charts, as Plotly figures in plain data ({"data": [...], "layout": {...}}).

Colours are names that the page's script replaces by those of the reader's theme: "@ink", "@best",
"@scale" ... (page.js, page.css). All text of users is escaped: Plotly reads a little HTML.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rayft.report.axes import Axis, written
from rayft.report.facts import Facts, Row, front
from rayft.report.numbers import Scale, amount
from rayft.report.study import Importance

Figure = dict[str, Any]
SYMBOLS = {"done": "circle", "stopped": "x", "diverged": "triangle-up", "failed": "square"}
SYMBOL_OF_RUNNING = "circle-open"
COSTS = {
    "seconds": "engine seconds",
    "memory": "memory",
    "params_trainable": "trainable parameters",
}


@dataclass(frozen=True)
class Chart:
    """A figure and what it says."""

    id: str
    figure: Figure
    told: str  # for those who do not see it
    height: int = 300
    title: str = ""


def words(text: Any) -> str:
    """Text of a user for Plotly; one that starts with @ would be a colour's name."""
    return html.escape(str(text), quote=False).replace("@", "&#64;")


def pointed(row: Row) -> str:
    """What page.js puts the trial's `hover` for: the text is on the page once."""
    return f"@@{row.trial.id}"


def hover(row: Row, facts: Facts, scale: Scale) -> str:
    """What a trial says when it is pointed at."""
    value = "no result" if row.value is None else scale.text(row.value)
    lines = [f"<b>{words(row.trial.id)}</b> {words(facts.record.metric)} {value}"]
    for axis in facts.axes:
        picked = axis.pick(row.trial.params)
        lines.append(f"{words(axis.label)} {words(_short(written(picked), 40))}")
    lines += [amount(name, row.told[name]) for name in COSTS if name in row.told][:2]
    return "<br>".join([*lines, f"{row.trial.status} at step {row.trial.step:,}"])


def layout(x: str = "", y: str = "", **more: Any) -> Figure:
    """What all charts share: no chrome, hairlines, the reader's colours."""
    axis = {
        "gridcolor": "@line", "linecolor": "@line", "zeroline": False, "automargin": True,
        "tickfont": {"color": "@muted"}, "ticks": "", "showline": False,
    }  # fmt: skip
    made = {
        "paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 12, "color": "@ink"},
        "margin": {"l": 8, "r": 12, "t": 8, "b": 8}, "showlegend": False,
        "hovermode": "closest", "dragmode": False,
        "hoverlabel": {"bgcolor": "@paper", "bordercolor": "@muted", "font": {"color": "@ink"}},
        "xaxis": axis | {"title": {"text": x, "standoff": 8}},
        "yaxis": axis | {"title": {"text": y, "standoff": 8}},
    }  # fmt: skip
    for name, change in more.items():
        same = isinstance(made.get(name), dict) and isinstance(change, dict)
        made[name] = made[name] | change if same else change
    return made


def ticks(axis: Axis) -> dict[str, Any]:
    """A Plotly axis for a dimension."""
    if axis.levels:
        texts = [words(_short(level, 18)) for level in axis.levels]
        pad = 0.5 if len(texts) > 1 else 1
        return {
            "tickvals": list(range(len(texts))), "ticktext": texts,
            "range": [-pad, len(texts) - 1 + pad],
        }  # fmt: skip
    low, high = axis.low, axis.high
    if axis.log:
        low, high = math.log10(low), math.log10(high)
        pad = (high - low) * 0.05 or 0.1
        return {"type": "log", "range": [low - pad, high + pad]} | _log_ticks(axis.low, axis.high)
    pad = (high - low) * 0.05 or 0.5
    return {"range": [low - pad, high + pad]}


def strip(facts: Facts, scale: Scale) -> Chart:
    """Every trial's result on one line, with the base model and the median."""
    rows = facts.ranked()
    heights = _spread_out([row.value or 0.0 for row in rows])
    lines = [("base model", facts.base, "dash"), ("median trial", facts.median, "dot")]
    top = max(heights, default=0) + 1.5
    reach = _reach([*(row.value for row in rows), facts.base], 0.05)
    data = [_points(rows, [r.value for r in rows], heights, facts, size=9)]
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


def important(facts: Facts, found: Importance) -> Chart:
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


def slices(facts: Facts) -> list[Chart]:
    """The result over each parameter by itself."""
    charts = []
    rows = facts.ranked()
    for index, axis in enumerate(facts.axes):
        here = [row for row in rows if axis.at(row.trial.params) is not None]
        xs = [axis.at(row.trial.params) for row in here]
        if axis.levels:
            xs = [x + 0.5 * _wobble(row) for x, row in zip(xs, here, strict=True) if x is not None]
        data = [_points(here, xs, [r.value for r in here], facts)]
        made = layout(xaxis=ticks(axis), yaxis=_metric_axis(facts, here))
        told = f"{facts.record.metric} of every trial over {axis.label}."
        charts.append(Chart(f"slice-{index}", {"data": data, "layout": made}, told, 240, axis.name))
    return charts


def costs(facts: Facts) -> list[Chart]:
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
        points = _points(rows, ends, [r.value for r in rows], facts, strong=edge)
        axis = _cost_axis(name, min(ends), max(ends), log)
        figure = {
            "data": [line, points],
            "layout": layout(xaxis=axis, yaxis=_metric_axis(facts, rows)),
        }
        best = ", ".join(f"{r.trial.id} ({amount(name, r.told[name])})" for r in edge[:8])
        told = f"{facts.record.metric} over {label}. Pareto front: {best}."
        charts.append(Chart(f"cost-{name}", figure, told, 260, label))
    return charts


def _points(
    rows: Sequence[Row], xs: Iterable[Any], ys: Iterable[Any], facts: Facts,
    size: int = 8, strong: Sequence[Row] | None = None,
) -> Figure:  # fmt: skip
    """Trials as markers: the best a star, those in `strong` filled, the rest lighter."""
    best = facts.best.trial.id if facts.best else ""
    chosen = None if strong is None else {row.trial.id for row in strong}
    crowd = 0.55 if len(rows) > 100 else 0.8

    def is_strong(row: Row) -> bool:
        return chosen is not None and row.trial.id in chosen

    return {
        "type": "scatter", "mode": "markers", "x": list(xs), "y": list(ys),
        "hovertext": [pointed(row) for row in rows], "hoverinfo": "text",
        "cliponaxis": False,
        "marker": {
            "symbol": ["star" if r.trial.id == best else SYMBOLS.get(r.trial.status,
                       SYMBOL_OF_RUNNING) for r in rows],
            "size": [size * 2 if r.trial.id == best else size - (r.trial.status == "stopped")
                     for r in rows],
            "color": ["@best" if r.trial.id == best else "@accent" if is_strong(r) or
                      (chosen is None and r.trial.status == "done") else "@grey" for r in rows],
            "opacity": [1 if r.trial.id == best or is_strong(r) else crowd for r in rows],
            "line": {"width": [1 if r.trial.id == best else 0 for r in rows], "color": "@paper"},
        },
    }  # fmt: skip


def _metric_axis(facts: Facts, rows: Sequence[Row]) -> dict[str, Any]:
    """Where the results are; far outliers are cut off rather than squeezing the rest."""
    values = sorted(facts.sign * (row.value or 0.0) for row in rows)
    if not values:
        return {}
    quarter = values[len(values) // 4], values[(3 * len(values)) // 4]
    most = quarter[1] + 4 * (quarter[1] - quarter[0]) or values[-1]
    high = max(v for v in values if v <= most) if quarter[1] > quarter[0] else values[-1]
    pad = (high - values[0]) * 0.08 or abs(high) * 0.02 or 0.1
    ends = sorted([facts.sign * (values[0] - pad), facts.sign * (high + pad)])
    return {"range": ends, "nticks": 5}


def _cost_axis(name: str, low: float, high: float, log: bool) -> dict[str, Any]:
    if log:
        span = [math.log10(low), math.log10(high)]
        pad = (span[1] - span[0]) * 0.06
        at = [t for t in _steps(low, high) if low * 0.9 <= t <= high * 1.1]
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


def _steps(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 3) if high / low < 300 else (1,)
    return [factor * 10.0**decade for decade in decades for factor in factors]


def _log_ticks(low: float, high: float) -> dict[str, Any]:
    at = [t for t in _steps(low, high) if low * 0.99 <= t <= high * 1.01]
    at = at if len(at) > 1 else [low, high]
    texts = [f"{t:.0e}".replace("e-0", "e-") if t < 0.1 else f"{t:g}" for t in at]
    return {"tickvals": at, "ticktext": texts, "tickangle": 0}


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


def _note(x: float, y: float, text: str, reach: Sequence[float], **more: Any) -> Figure:
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


def _wobble(row: Row) -> float:
    """A fixed place in [-0.5, 0.5) by the trial's id: many trials share a level."""
    return (sum(ord(c) * 31**i for i, c in enumerate(row.trial.id)) % 97) / 97 - 0.5


def _better(facts: Facts) -> str:
    return "lower is better" if facts.sign > 0 else "higher is better"


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
