"""What the charts share: Plotly figures in plain data ({"data": [...], "layout": {...}}).

Colours are names that the page's script replaces by those of the reader's theme: "@ink", "@best",
"@scale" ... (page.js, page.css). All text of users is escaped: Plotly reads a little HTML.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rayft.report.axes import SpaceAxis, written
from rayft.report.facts import SweepFacts, TrialResult
from rayft.report.numbers import MetricScale, amount

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


def words(text: object) -> str:
    """Text of a user for Plotly; one that starts with @ would be a colour's name."""
    return html.escape(str(text), quote=False).replace("@", "&#64;")


def pointed(row: TrialResult) -> str:
    """What page.js puts the trial's `hover` for: the text is on the page once."""
    return f"@@{row.trial.id}"


def hover(row: TrialResult, facts: SweepFacts, scale: MetricScale) -> str:
    """What a trial says when it is pointed at."""
    value = "no result" if row.value is None else scale.text(row.value)
    lines = [f"<b>{words(row.trial.id)}</b> {words(facts.record.metric)} {value}"]
    for axis in facts.axes:
        picked = axis.pick(row.trial.params)
        lines.append(f"{words(axis.label)} {words(short(written(picked), 40))}")
    lines += [amount(name, row.told[name]) for name in COSTS if name in row.told][:2]
    return "<br>".join([*lines, f"{row.trial.status} at step {row.trial.step:,}"])


def layout(x: str = "", y: str = "", **more: object) -> Figure:
    """What all charts share: no chrome, hairlines, the reader's colours."""
    axis = {
        "gridcolor": "@line", "linecolor": "@line", "zeroline": False, "automargin": True,
        "tickfont": {"color": "@muted"}, "ticks": "", "showline": False,
    }  # fmt: skip
    made: Figure = {
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


def ticks(axis: SpaceAxis) -> Figure:
    """A Plotly axis for a dimension."""
    if axis.levels:
        texts = [words(short(level, 18)) for level in axis.levels]
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


def points(
    rows: Sequence[TrialResult], xs: Iterable[object], ys: Iterable[object], facts: SweepFacts,
    size: int = 8, strong: Sequence[TrialResult] | None = None,
) -> Figure:  # fmt: skip
    """Trials as markers: the best a star, those in `strong` filled, the rest lighter."""
    best = facts.best.trial.id if facts.best else ""
    chosen = None if strong is None else {row.trial.id for row in strong}
    crowd = 0.55 if len(rows) > 100 else 0.8

    def is_strong(row: TrialResult) -> bool:
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


def metric_axis(facts: SweepFacts, rows: Sequence[TrialResult]) -> dict[str, object]:
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


def _log_ticks(low: float, high: float) -> dict[str, object]:
    at = [t for t in round_logs(low, high) if low * 0.99 <= t <= high * 1.01]
    at = at if len(at) > 1 else [low, high]
    texts = [f"{t:.0e}".replace("e-0", "e-") if t < 0.1 else f"{t:g}" for t in at]
    return {"tickvals": at, "ticktext": texts, "tickangle": 0}


def round_logs(low: float, high: float) -> list[float]:
    """Powers of ten, with their threefolds where there are few."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 3) if high / low < 300 else (1,)
    return [factor * 10.0**decade for decade in decades for factor in factors]


def short(text: str, most: int) -> str:
    """At most so many characters."""
    return text if len(text) <= most else f"{text[: most - 1]}…"
