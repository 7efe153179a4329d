"""report.html: one file with everything in it. Text and tables read without a script; the charts
need one, which is Plotly, compressed (the browser unpacks it)."""

from __future__ import annotations

import base64
import gzip
import json
from functools import cache
from html import escape
from importlib.resources import files

from plotly.offline import get_plotlyjs

import rayft
from rayft.report.answer import answer, commands, standing, winner
from rayft.report.charts import costs, important, slices, strip
from rayft.report.curves import curves
from rayft.report.facts import SweepFacts
from rayft.report.figure import Chart, hover
from rayft.report.listing import every_trial, failures, inheritance
from rayft.report.maps import pairs, parallel, surface
from rayft.report.numbers import MetricScale
from rayft.report.packs import fullness, saved
from rayft.report.study import LEAST, ParamImportance, importance

POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"
"""The browser itself refuses every load from elsewhere."""


class Page:
    """HTML and the charts in it, in order."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.charts: list[Chart] = []

    def add(self, *parts: str) -> None:
        """HTML."""
        self.parts += [part for part in parts if part]

    def chart(self, chart: Chart, caption: str = "") -> None:
        """One figure."""
        self.add(self.figure(chart, caption))

    def several(self, charts: list[Chart], wide: bool = False) -> None:
        """Figures side by side where there is room, each under its title."""
        inside = "".join(self.figure(chart, "") for chart in charts)
        self.add(f'<div class="several{" wide" if wide else ""}">{inside}</div>')

    def figure(self, chart: Chart, caption: str) -> str:
        """The place of a chart; it is drawn by page.js."""
        self.charts.append(chart)
        title = f"<h3>{escape(chart.title)}</h3>" if chart.title else ""
        said = f"<figcaption>{caption}</figcaption>" if caption else ""
        return (
            f'<figure>{title}{said}<div class="chart" id="{chart.id}" role="img" '
            f'aria-label="{escape(chart.told)}" style="height:{chart.height}px"></div></figure>'
        )


def page(facts: SweepFacts, place: str) -> str:
    """The whole report.

    Args:
        place: the address of the sweep's folder, for the commands.
    """
    scale = MetricScale.of([*(row.value for row in facts.rows if row.fair), facts.base])
    made = Page()
    made.add(standing(facts), answer(facts, scale))
    ranked = facts.ranked()
    if len(ranked) > 1:
        made.chart(strip(facts, scale), _marks_said(facts))
    made.add('<div class="two">', winner(facts), commands(facts, place), "</div>")
    if len(ranked) > 1:
        _parameters(made, facts, scale)
    if any(row.value is not None for row in facts.rows):
        _course(made, facts, scale)
    made.add(fullness(facts), saved(facts))
    made.add(failures(facts), inheritance(facts), every_trial(facts, scale))
    hovers = {row.trial.id: hover(row, facts, scale) for row in facts.rows} if made.charts else {}
    return _whole(made, facts, hovers)


def _parameters(made: Page, facts: SweepFacts, scale: MetricScale) -> None:
    found = importance(facts)
    made.add("<h2>What mattered</h2>")
    if found is None:
        some = len(facts.ranked())
        made.add(
            f"<p>Importance needs at least {LEAST} trials with a result; there "
            f"{'is' if some == 1 else 'are'} {some}.</p>"
        )
    else:
        made.chart(important(facts, found), _importance_said(found))
    made.chart(
        parallel(facts, scale),
        "Each line is a trial, through its values to its result. Darker and thicker is better"
        ' (brighter on a dark page); the <span class="star">★ best</span> is drawn last.',
    )
    made.add(
        "<h2>One parameter at a time</h2>"
        "<p class='note'>Each mark is a trial at its best evaluation. Results far worse than the "
        "rest lie outside.</p>"
    )
    made.several(slices(facts))
    chosen = pairs(facts, found)
    if chosen:
        made.add(
            "<h2>Two parameters together</h2>"
            "<p class='note'>Larger marks are better trials. The shading behind them is their "
            "smoothed mean, and is left out where no trial is near.</p>"
        )
        made.several([surface(facts, scale, x, y, i) for i, (x, y) in enumerate(chosen)], True)


def _marks_said(facts: SweepFacts) -> str:
    """What the marks of trials mean, in all charts."""
    runs = ", ○ still running" if facts.count("running") else ""
    return (
        '<span class="star">★</span> the best trial, ● trials that ran to their end, '
        f"× stopped early{runs}."
    )


def _importance_said(found: ParamImportance) -> str:
    return (
        f"PED-ANOVA over {found.trials} trials: how far the best quarter's values differ from all "
        "trials'. A bar that ends left of the dotted line is no longer than the longest bar "
        "typically gets when results are shuffled: it may be chance. Trials that were stopped "
        "early count with what they reached."
    )


def _course(made: Page, facts: SweepFacts, scale: MetricScale) -> None:
    made.add("<h2>Learning curves</h2>")
    made.chart(
        curves(facts, scale),
        "The best trials in colour, all others grey up to where they ended.",
    )
    found = costs(facts)
    if found:
        made.add(
            "<h2>Quality against cost</h2>"
            "<p class='note'>Filled in blue and joined by the line: the Pareto front, trials that "
            "no other beats in both. Engine seconds are one device's time, a packed trial's share "
            "of it.</p>"
        )
        made.several(found)


def _whole(made: Page, facts: SweepFacts, hovers: dict[str, str]) -> str:
    drawn = [{"id": c.id, "height": c.height, "figure": c.figure} for c in made.charts]
    data = json.dumps(
        {"figures": drawn, "hovers": hovers}, separators=(",", ":"), allow_nan=False
    ).replace("<", "\\u003c")
    name = escape(facts.record.name)
    model = escape(str(facts.record.config.get("model", {}).get("path", "")))
    body = "\n".join(made.parts)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{name}: sweep report</title>
<style>{_asset("page.css")}</style>
</head>
<body>
<main>
<h1>Sweep <b>{name}</b> of {model}</h1>
{body}
</main>
<footer>{_foot(facts)}</footer>
<noscript><p>The charts need JavaScript; everything else on this page does not.</p></noscript>
<script type="application/json" id="figures">{data}</script>
<script type="text/plain" id="plotly">{plotly() if drawn else ""}</script>
<script>{_asset("page.js")}</script>
</body>
</html>
"""


def _foot(facts: SweepFacts) -> str:
    record = facts.record
    versions = ", ".join(f"{name} {value}" for name, value in sorted(record.versions.items()))
    parts = [
        f"rayft {rayft.__version__}",
        f"config {record.config_hash[:12]}",
        f"data {record.data_hash[:12]}" if record.data_hash else "",
        f"written by {versions}" if versions else "",
    ]
    return escape(" · ".join(part for part in parts if part))


@cache
def plotly() -> str:
    """Plotly's script, gzip and base64: about two fifths of its size."""
    packed = gzip.compress(get_plotlyjs().encode(), 9, mtime=0)
    return base64.b64encode(packed).decode()


@cache
def _asset(name: str) -> str:
    return (files("rayft.report") / name).read_text(encoding="utf-8")
