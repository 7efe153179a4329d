"""The top of the page: what came out, the winner's values, and what to type next."""

from __future__ import annotations

import shlex
from html import escape

from rayft.core.address import below
from rayft.records.ledger import LEDGER
from rayft.report.axes import written
from rayft.report.facts import SweepFacts, value_of
from rayft.report.numbers import MetricScale, seconds
from rayft.storage.sealed import damage_sentence

ENDED_BY = {
    "max_seconds": "the time limit ended the search",
    "target": "the target was reached",
    "grid": "every combination was tried",
}


def standing(facts: SweepFacts) -> str:
    """One line on how far the sweep is; more when something is not as it should be."""
    record = facts.record
    over = facts.count("done", "stopped", "diverged", "failed")
    counts = [
        f"{facts.count(status)} {said}"
        for status, said in (
            ("done", "ran to the end"),
            ("stopped", "stopped early"),
            ("diverged", "diverged"),
            ("failed", "failed"),
            ("running", "running" if record.status == "running" else "unfinished"),
        )
        if facts.count(status)
    ]
    line = f"{_plural(len(facts.rows), 'trial')}: {', '.join(counts)}." if counts else ""
    if record.seconds:
        starts = f" over {record.starts} starts" if record.starts > 1 else ""
        line += f" {seconds(record.seconds)} wall clock{starts}"
        ended = ENDED_BY.get(record.stopped_by, "")
        line += f"; {ended}." if ended else "."
    said = {
        "running": f"The sweep is still running: {over} of {facts.spec.count} trials are over. "
        "What follows is what is known so far.",
        "interrupted": f"The sweep was interrupted after {over} of {facts.spec.count} trials; the "
        "same rayft sweep command continues it.",
        "failed": f"The sweep failed: {_first(record.error) or 'no trial came to a result'}",
        "diverged": "Every trial diverged, so there is no winner. Lower the learning rates in "
        "sweep.space, or lengthen optim.warmup.",
    }.get(record.status, "")
    lost = damage_sentence(LEDGER, facts.ledger.damage)
    warnings = [said, f"{lost}. What they said is in no number here." if lost else ""]
    shown = [f'<p class="status" role="status">{escape(text)}</p>' for text in warnings if text]
    return f'<p class="note">{escape(line.strip())}</p>{"".join(shown)}'


def answer(facts: SweepFacts, scale: MetricScale) -> str:
    """The result in a sentence, and how sure it is."""
    best, metric = facts.best, escape(facts.record.metric)
    if best is None or best.value is None:
        if not facts.rows:
            return '<p class="lead">No trial has started.</p>'
        none = "No trial has a result yet." if facts.count("running") else "No trial has a result."
        return f'<p class="lead">{none}</p>'
    value = f"<strong>{scale.text(best.value)}</strong>"
    name = escape(best.trial.id)
    at = f"at step {best.at:,}"
    if facts.base is None:
        lead = f"The best trial, {name}, reaches {metric} {value} {at}."
    else:
        verb = "brings" if facts.sign * (best.value - facts.base) < 0 else "leaves"
        lead = (
            f"The best trial, {name}, {verb} {metric} from {scale.text(facts.base)} "
            f"(base model) to {value}."
        )
    return f'<p class="lead">{lead}</p><p>{" ".join(_details(facts, scale))}</p>'


def _details(facts: SweepFacts, scale: MetricScale) -> list[str]:
    best = facts.best
    assert best is not None and best.value is not None  # answer() has looked
    said = []
    if facts.base:
        gain = facts.sign * (facts.base - best.value)
        share = abs(gain / facts.base)
        said.append(
            f"That is {share:.1%} {'better' if gain > 0 else 'worse'} than the base model, at step "
            f"{best.at:,} of its {best.trial.step:,}."
        )
    tuned, before = best.told.get("eval_ppl"), facts.record.base.get("eval_ppl")
    if facts.record.metric == "eval_loss" and tuned and before and best.at == best.trial.step:
        said.append(f"Perplexity {before:,.4g} → {tuned:,.4g}.")
    if facts.median is not None and len(facts.ranked()) > 1:
        gap = facts.sign * (facts.median - best.value)
        early = (
            ", counting trials stopped early as they were then" if facts.count("stopped") else ""
        )
        said.append(
            f"The median trial is {scale.text(gap)} worse, at {scale.text(facts.median)}{early}."
        )
    elif facts.median is None:
        said.append("More than half of the trials diverged.")
    spread = facts.spread
    if spread is not None:
        said.append(_seeds(facts, scale))
    elif facts.record.status == "done" and facts.spec.seeds == 1:
        said.append("One seed each: set sweep.seeds to see how far chance alone moves this.")
    return said


def _seeds(facts: SweepFacts, scale: MetricScale) -> str:
    spread, best = facts.spread, facts.best
    assert spread is not None and best is not None and best.value is not None  # as above
    count = len(spread.values)
    if count == 1:
        return f"Repeated with another seed it reached {scale.text(spread.values[0])}."
    reach = f"{scale.text(min(spread.values))} to {scale.text(max(spread.values))}"
    said = (
        f"Repeated with {count} other seeds it reached {scale.text(spread.mean)} on average "
        f"(standard deviation {scale.text(spread.deviation)}, {reach})."
    )
    near = [
        row
        for row in facts.ranked()[1:]
        if facts.sign * ((row.value or 0.0) - best.value) <= spread.deviation
    ]
    if near:
        said += (
            f" {_plural(len(near), 'other trial')} lie{'s' if len(near) == 1 else ''} within one "
            f"standard deviation of the winner: take {'it' if len(near) == 1 else 'them'} as "
            "equally good."
        )
    return said


def winner(facts: SweepFacts) -> str:
    """The searched fields: what won, what the config had, and what was tried."""
    if facts.best is None:
        return ""
    rows = []
    params = facts.best.trial.params
    for axis in facts.axes:
        base = value_of(facts.record.config, axis.name)
        edge = axis.edge(params)
        hint = (
            f'<br><span class="note">at the {edge} end of what was searched</span>' if edge else ""
        )
        rows.append(
            f'<tr><th scope="row"><code>{escape(axis.name).replace(".", ".<wbr>")}</code></th>'
            f'<td class="n"><b>{escape(written(axis.pick(params)))}</b></td>'
            f'<td class="n">{escape(written(base)) if base is not None else "–"}</td>'
            f"<td>{escape(axis.said())}{hint}</td></tr>"
        )
    head = (
        '<thead><tr><th scope="col">field</th><th scope="col" class="n">best</th>'
        '<th scope="col" class="n">config</th><th scope="col">searched</th></tr></thead>'
    )
    body = "".join(rows)
    return (
        f'<section><h2>The winning settings</h2><div class="wide-table"><table>{head}'
        f"<tbody>{body}</tbody></table></div></section>"
    )


def commands(facts: SweepFacts, place: str) -> str:
    """What to type to use, check and repeat the winner; only what is there to be used."""
    if facts.best is None:
        return ""
    best = shlex.quote(below(place, "best"))
    said = []
    if "run.json" in facts.files:
        said += [
            ("Export it, adapters merged into the base", f"rayft export {best} --merge"),
            ("Compare it with the base model", f"rayft eval {best} --generate 64"),
        ]
    if "config.yaml" in facts.files:
        config = shlex.quote(below(place, "best", "config.yaml"))
        said.append(("Train it again", f"rayft train {config}"))
    if not said:
        said_by = "The folder best/ is written when the sweep ends."
        return f"<section><h2>Use it</h2><p>{said_by}</p></section>"
    refit = ""
    if facts.record.refit and facts.record.refit.get("metric") is not None:
        again = facts.record.refit
        refit = (
            f"<p>best/ was trained again for {again['step']:,} steps and reached "
            f"{escape(facts.record.metric)} {again['metric']:.4f}.</p>"
        )
    body = "".join(f"<p>{escape(name)}</p><pre>{escape(line)}</pre>" for name, line in said)
    return f"<section><h2>Use it</h2>{refit}{body}</section>"


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _first(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")
