"""Which techniques go together, derived from their traits: a new kind is judged by what it says of
itself, not by its name.
"""

from __future__ import annotations

from collections import Counter

from rayft.config.rule import Rule
from rayft.config.run import Run


def _kinds(run: Run) -> list[str]:
    return [method.kind for method in run.methods]


def _repeated(run: Run) -> str:
    """The first kind that is listed twice; "" without one."""
    counted = Counter(_kinds(run))
    return next((kind for kind, count in counted.items() if count > 1), "")


def _claims_all(run: Run) -> str:
    """The kind that trains every weight; "" without one."""
    return next((method.kind for method in run.methods if method.claims_all), "")


def _crowded(run: Run) -> bool:
    return bool(_claims_all(run)) and len(set(_kinds(run))) > 1


def _twice(run: Run) -> str:
    kind = _repeated(run)
    if kind == _claims_all(run):
        return f"methods lists {kind} twice; once is everything already"
    return (
        f"methods lists {kind} twice and their parameter groups would have the same names; write "
        f"one {kind} whose targets name all the modules"
    )


def _unfit(run: Run) -> str:
    """Why a method cannot train on this base; "" where all can."""
    refusals = (method.quant_refusals() for method in run.methods)
    return next((found[run.model.quant] for found in refusals if run.model.quant in found), "")


def _moves_base(run: Run) -> bool:
    return any(not method.keeps_base for method in run.methods)


METHOD_RULES: tuple[Rule, ...] = (
    Rule(lambda run: bool(_unfit(run)), lambda run: _unfit(run).format(run=run), "model.quant"),
    Rule(
        lambda run: (
            run.model.quant == "nf4"
            and run.strategy.shards == 3
            and any(method.reads_base for method in run.methods)
        ),
        "dora reads the base's weights, and 4-bit ones that ZeRO stage 3 has cut are lost when "
        "they are read; use strategy.stage: 2, model.quant: none, or dora: false",
        "strategy.stage",
    ),
    Rule(
        _crowded,
        lambda run: (
            f"{_claims_all(run)} trains every weight, so no method can stand beside it; keep "
            f"either {_claims_all(run)} or the others"
        ),
        "methods",
    ),
    Rule(lambda run: bool(_repeated(run)), _twice, "methods"),
)

OBJECTIVE_RULES: tuple[Rule, ...] = (
    Rule(
        lambda run: run.data.packing and not run.objective.row_packing,
        "data.packing would tear the rows of a {run.objective.kind} example apart; set "
        "data.packing: false",
        "data.packing",
    ),
    Rule(
        lambda run: run.objective.reference and _moves_base(run),
        "{run.objective.kind} compares with the model as it was, and a method here overwrites it; "
        "use methods that keep the base, e.g. lora",
        "objective",
    ),
)
