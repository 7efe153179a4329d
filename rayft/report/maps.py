"""Several parameters at once: parallel coordinates, and the result over two of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rayft.report.axes import SpaceAxis, written
from rayft.report.facts import SweepFacts, TrialResult
from rayft.report.figure import Chart, Figure, layout, pointed, ticks, words
from rayft.report.numbers import MetricScale
from rayft.report.study import ParamImportance

MOST = 3  # surfaces
ENOUGH = 15  # trials for a contour
SHADES = 5
GRID = 28
WIDTH = 0.15  # of the smoothing kernel, in units of an axis
FAR = 0.32  # from the nearest trial, in the same units: nothing is drawn there


def parallel(facts: SweepFacts, scale: MetricScale) -> Chart:
    """One line per trial through all its values, the result last; the best on top and thick."""
    rows = [
        r for r in facts.ranked() if all(a.unit(r.trial.params) is not None for a in facts.axes)
    ]
    low, high = _between(rows)
    data, count = [], len(facts.axes)
    for shade in range(SHADES):  # the worst first
        least, most = (len(rows) * (SHADES - shade - step) // SHADES for step in (1, 0))
        group = [row for row in rows[least:most] if row is not facts.best]
        data.append(_bundle(group, facts, low, high, f"@v{shade + 1}", shade))
    if facts.best is not None and facts.best in rows:
        line = _bundle([facts.best], facts, low, high, "@best", SHADES)
        line["line"]["width"], line["opacity"] = 4, 1
        data.append(line)
    shapes = [
        {"type": "line", "x0": i, "x1": i, "y0": 0, "y1": 1, "layer": "below",
         "line": {"color": "@muted", "width": 1}}
        for i in range(count + 1)
    ]  # fmt: skip
    notes = [
        _tick(i, place, text) for i, axis in enumerate(facts.axes) for place, text in _marks(axis)
    ]
    better, worse = (low, high) if facts.sign > 0 else (high, low)
    notes += [_tick(count, 1, scale.text(better)), _tick(count, 0, scale.text(worse))]
    names = [*(axis.label for axis in facts.axes), facts.record.metric]
    for index, name in enumerate(names):
        notes.append({"x": index, "y": 1.06, "text": f"<b>{words(name)}</b>", "showarrow": False,
                      "yanchor": "bottom", "font": {"color": "@ink"}})  # fmt: skip
    made = layout(
        xaxis={"visible": False, "range": [-0.15, count + 0.35]},
        yaxis={"visible": False, "range": [-0.04, 1.16]}, annotations=notes, shapes=shapes,
    )  # fmt: skip
    told = f"{len(rows)} trials as lines over {', '.join(names)}."
    return Chart("parallel", {"data": data, "layout": made}, told, 380)


def _bundle(
    rows: Sequence[TrialResult], facts: SweepFacts, low: float, high: float, color: str, shade: int
) -> Figure:
    xs: list[object] = []
    ys: list[object] = []
    texts: list[str] = []
    for row in rows:
        heights = [_height(axis, row) for axis in facts.axes]
        share = ((row.value or 0.0) - low) / (high - low) if high > low else 0.5
        heights.append(min(1.0, max(0.0, 1 - share if facts.sign > 0 else share)))
        xs += [*range(len(heights)), None]
        ys += [*heights, None]
        texts += [pointed(row)] * (len(heights) + 1)
    many = len(facts.rows) > 100
    return {
        "type": "scatter", "mode": "lines", "x": xs, "y": ys, "hovertext": texts,
        "hoverinfo": "text", "line": {"color": color, "width": 1 + shade * (0.2 if many else 0.3)},
        "opacity": (0.35 if many else 0.55) + 0.08 * shade,
    }  # fmt: skip


def _height(axis: SpaceAxis, row: TrialResult) -> float:
    """Where a line crosses an axis; a little beside its level, which keeps bundles apart."""
    place = axis.unit(row.trial.params) or 0.0
    if len(axis.levels) < 2:
        return place
    number = sum(ord(c) * 17**i for i, c in enumerate(row.trial.id)) % 41 / 41 - 0.5
    return place + number * min(0.05, 0.5 / (len(axis.levels) - 1))


def _marks(axis: SpaceAxis) -> list[tuple[float, str]]:
    """Labels along an axis, by their height."""
    if axis.levels:
        last = max(1, len(axis.levels) - 1)
        every = 1 + len(axis.levels) // 12
        shown = list(enumerate(axis.levels))[::every]
        return [(i / last if len(axis.levels) > 1 else 0.5, text) for i, text in shown]
    made = ticks(axis)
    places = made.get("tickvals", [axis.low, (axis.low + axis.high) / 2, axis.high])
    unit = [(axis.unit({axis.name: p}), written(float(p))) for p in places]
    return [(place, text) for place, text in unit if place is not None]


def _tick(x: float, y: float, text: str) -> Figure:
    short = text if len(text) <= 14 else f"{text[:13]}…"
    return {
        "x": x, "y": y, "text": words(short), "showarrow": False, "xanchor": "left", "xshift": 4,
        "bgcolor": "@veil", "borderpad": 1, "font": {"color": "@muted", "size": 11},
    }  # fmt: skip


def _between(rows: Sequence[TrialResult]) -> tuple[float, float]:
    """The results at the ends of the last axis: nine in ten of them; worse ones lie at the end."""
    values = [row.value or 0.0 for row in rows]
    if not values:
        return 0.0, 1.0
    edge = values[int(0.9 * (len(values) - 1))]
    return min(values[0], edge), max(values[0], edge)


def pairs(facts: SweepFacts, found: ParamImportance | None) -> list[tuple[SpaceAxis, SpaceAxis]]:
    """Which surfaces to draw: rank x lr and lr x lr_ratio where they are searched, then the pairs
    of the most important (else the first) parameters."""
    by_label = {axis.label: axis for axis in facts.axes}
    known = [("lr", "rank"), ("lr", "lr_ratio")]
    chosen = [(by_label[x], by_label[y]) for x, y in known if x in by_label and y in by_label]
    order = {name: place for place, name in enumerate(found.shares)} if found else {}
    varied = [a for a in facts.axes if len({a.at(r.trial.params) for r in facts.ranked()}) > 1]
    varied.sort(key=lambda axis: order.get(axis.name, len(order)))
    for i, first in enumerate(varied[:4]):
        for second in varied[i + 1 : 4]:
            x, y = (second, first) if first.levels and not second.levels else (first, second)
            if {x.name, y.name} not in [{a.name, b.name} for a, b in chosen]:
                chosen.append((x, y))
    return chosen[:MOST]


def surface(facts: SweepFacts, scale: MetricScale, x: SpaceAxis, y: SpaceAxis, index: int) -> Chart:
    """Trials over two parameters, shaded by result; a smoothed surface where enough lie."""
    rows = [
        row for row in facts.ranked()
        if x.at(row.trial.params) is not None and y.at(row.trial.params) is not None
    ]  # fmt: skip
    low, high = _between(rows)
    rows.reverse()  # the best on top
    data: list[Figure] = []
    shades = {"zmin": low, "zmax": high, "reversescale": facts.sign < 0}
    varied = all(len({axis.at(row.trial.params) for row in rows}) > 2 for axis in (x, y))
    if len(rows) >= ENOUGH and varied and high > low:
        data.append(_contour(rows, x, y, scale) | shades)
    best = facts.best.trial.id if facts.best else ""
    count = len(rows)
    data.append({
        "type": "scatter", "mode": "markers", "cliponaxis": False,
        "x": [_beside(x, row, 0) for row in rows], "y": [_beside(y, row, 1) for row in rows],
        "hovertext": [pointed(row) for row in rows], "hoverinfo": "text",
        "marker": {
            "color": [row.value for row in rows], "colorscale": "@scale", "cmin": low,
            "cmax": high, "reversescale": facts.sign < 0,
            "size": [16 if r.trial.id == best else 7 + 4 * i / max(count, 1)
                     for i, r in enumerate(rows)],
            "symbol": ["star" if r.trial.id == best else "circle" for r in rows],
            "line": {"width": 1, "color": "@paper"},
            "colorbar": {"orientation": "h", "y": 1, "yanchor": "bottom", "thickness": 8,
                         "nticks": 5, "len": 1.02, "outlinewidth": 0,
                         "tickfont": {"color": "@muted", "size": 10}},
        },
    })  # fmt: skip
    # by hand: Plotly puts an axis' title between its ticks where the plot is small
    below = {"xref": "paper", "yref": "paper", "x": 0.5, "y": 0, "yanchor": "top", "yshift": -22,
             "text": words(x.label), "showarrow": False, "font": {"size": 14}}  # fmt: skip
    made = layout(
        y=words(y.label),
        annotations=[below],
        xaxis=ticks(x),
        yaxis=ticks(y),
        margin={"b": 48},
    )
    told = f"{facts.record.metric} of every trial over {x.label} and {y.label}."
    title = f"{x.label} × {y.label}"
    return Chart(f"surface-{index}", {"data": data, "layout": made}, told, 320, title)


def _contour(rows: Sequence[TrialResult], x: SpaceAxis, y: SpaceAxis, scale: MetricScale) -> Figure:
    """The mean of the results weighted by a Gaussian kernel on the unit square; None far away."""
    known = [
        (x.unit(row.trial.params) or 0.0, y.unit(row.trial.params) or 0.0, row.value or 0.0)
        for row in rows
    ]
    z: list[list[float | None]] = []
    for j in range(GRID + 1):
        line: list[float | None] = []
        for i in range(GRID + 1):
            weights = [(i / GRID - u) ** 2 + (j / GRID - v) ** 2 for u, v, _ in known]
            if min(weights) > FAR**2:
                line.append(None)
                continue
            kernel = [math.exp(-w / (2 * WIDTH**2)) for w in weights]
            total = sum(k * value for k, (_, _, value) in zip(kernel, known, strict=True))
            line.append(total / sum(kernel))
        z.append(line)
    heights = [value for line in z for value in line if value is not None]
    low, high = min(heights), max(heights)
    places = [[_from_unit(axis, i / GRID) for i in range(GRID + 1)] for axis in (x, y)]
    return {
        "type": "contour", "x": places[0], "y": places[1], "z": z, "colorscale": "@scale",
        "showscale": False, "opacity": 0.55, "hoverinfo": "skip", "autocontour": False,
        "contours": {"start": low, "end": high, "size": (high - low) / 7 or 1.0,
                     "showlabels": True, "labelfont": {"size": 10, "color": "@ink"},
                     "labelformat": f".{scale.decimals}f"},
        "line": {"width": 0.5}, "connectgaps": False,
    }  # fmt: skip


def _from_unit(axis: SpaceAxis, share: float) -> float:
    if axis.log:
        return math.exp(math.log(axis.low) * (1 - share) + math.log(axis.high) * share)
    return axis.low + share * (axis.high - axis.low)


def _beside(axis: SpaceAxis, row: TrialResult, salt: int) -> float | None:
    """A place a little beside a level, so that trials with the same values are all seen."""
    place = axis.at(row.trial.params)
    if place is None or not axis.levels:
        return place
    seed = sum(ord(c) * (13 + salt) ** i for i, c in enumerate(row.trial.id))
    return place + 0.25 * (seed % 37 / 37 - 0.5)
