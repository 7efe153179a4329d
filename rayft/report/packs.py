"""How full the packs were, and what stopping early and packing saved."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from rayft.report.facts import SweepFacts
from rayft.report.numbers import MINUS, many, seconds
from rayft.report.savings import EngineSavings

FORMULA = (
    "Alone is, over all trials, start + planned steps × step alone. Steps not taken are those of "
    "stopped and diverged trials. Spent is the engine time charged to trials plus the packs' own "
    "starts. Packing is what remains: start + steps taken × step alone, less what was spent. "
    "Step alone is a measured forward and backward pass with its share of a measured evaluation; "
    "the optimizer's part is in the time spent only, so packing is counted too low, not too high."
)


def fullness(facts: SweepFacts) -> str:
    """A row per pack."""
    packs = facts.ledger.packs
    if not packs:
        return ""
    rows = "".join(_pack(name, numbers) for name, numbers in packs.items())
    busy = sum(_n(p, "busy") for p in packs.values())
    room = sum(_n(p, "slots") * _n(p, "seconds") for p in packs.values())
    share = f"{busy / room:.0%}" if room else "–"
    heads = ("slots", "full", "engine time", "steps", "tokens/s", "start", "step alone")
    head = "".join(
        f'<th scope="col"{"" if name == "full" else " class=n"}>{name}</th>' for name in heads
    )
    return (
        "<h2>How full the packs were</h2>"
        f"<p>Slots were busy {share} of the time in which the packs trained. Full is busy "
        "slot-seconds over slots × engine time; step alone is a trial's step by itself, "
        "measured in the pack.</p>"
        '<div class="wide-table"><table class="keep"><thead><tr><th scope="col">pack</th>'
        f"{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _pack(name: str, numbers: Mapping[str, object]) -> str:
    room = _n(numbers, "slots") * _n(numbers, "seconds")
    share = _n(numbers, "busy") / room if room else 0.0
    bar = f'<span class="bar"><i style="width:{min(1.0, max(0.0, share)):.0%}"></i></span>'
    rate = _n(numbers, "tokens") / _n(numbers, "seconds") if _n(numbers, "seconds") else None
    cells = [
        f"{_n(numbers, 'slots'):.0f}",
        seconds(_n(numbers, "seconds")),
        f"{_n(numbers, 'steps'):,.0f}",
        many(rate),
        seconds(_n(numbers, "start_seconds")),
        seconds(_n(numbers, "alone_step_seconds")),
    ]
    numbered = [f'<td class="n">{cell}</td>' for cell in cells]
    return (
        f'<tr><th scope="row">{escape(name)}</th>{numbered[0]}<td>{bar}{share:.0%}</td>'
        f"{''.join(numbered[1:])}</tr>"
    )


def saved(facts: SweepFacts) -> str:
    """The arithmetic of rayft.report.savings as a bill."""
    bill = facts.saved
    if bill is None or not bill.alone:
        return ""
    lines = [
        ("Every trial alone, to its planned end", bill.alone, _alone(bill), ""),
        ("Steps not taken", -bill.stopping, _stopping(bill), ""),
        ("Packing", -bill.packing, _packing(bill), ""),
        ("Spent", bill.spent, f"{bill.spent / bill.alone:.0%} of the first line", "sum"),
    ]
    rows = "".join(
        f'<tr class="{style}"><th scope="row">{name}</th><td class="n">{seconds(value)}</td>'
        f'<td class="note">{said}</td></tr>'
        for name, value, said, style in lines
    )
    cost = ""
    if bill.packing < 0:
        cost = "<p>By this count packing saved nothing here.</p>"
    return (
        "<h2>What early stopping and packing saved</h2>"
        '<div class="wide-table"><table><caption>Engine time, all devices added up</caption>'
        '<thead><tr><th scope="col"></th><th scope="col" class="n">time</th>'
        f'<th scope="col">how it is counted</th></tr></thead><tbody>{rows}</tbody></table></div>'
        f'{cost}<p class="note">{FORMULA}</p>'
    )


def _alone(bill: EngineSavings) -> str:
    if not bill.packed:
        return f"{bill.planned:,} planned steps at each trial's own seconds per step"
    return (
        f"{bill.packed:,} starts of {seconds(bill.start)} + {bill.planned:,} planned steps of "
        f"{seconds(bill.step)}"
    )


def _stopping(bill: EngineSavings) -> str:
    return f"{bill.cut:,} of {bill.planned:,} planned steps, {_share(bill.stopping, bill.alone)}"


def _packing(bill: EngineSavings) -> str:
    if not bill.packed:
        return "no trial was packed"
    return f"{bill.taken:,} steps taken, {_share(bill.packing, bill.alone)}"


def _share(part: float, whole: float) -> str:
    sign = MINUS if part < 0 else ""
    return f"{sign}{abs(part / whole):.0%} of the first line"


def _n(numbers: Mapping[str, object], name: str) -> float:
    value = numbers.get(name, 0.0)
    return float(value) if isinstance(value, int | float) else 0.0
