"""The README's tables of what goes with what: `python -m rayft.config.support` prints them.

A cell is what traits and rules say of a run like that, so that no table can promise what
`rayft check` refuses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from rayft.config import rules
from rayft.config.methods import LoraSpec, MethodSpec
from rayft.config.objectives import ObjectiveSpec
from rayft.config.run import DataSpec, ModelSpec, Run, SourceSpec, TrainSpec
from rayft.config.strategies import DdpSpec, StrategySpec, ZeroSpec
from rayft.config.traits import QUANTS, Quant

VARIANTS: dict[str, MethodSpec] = {"lora, `dora: true`": LoraSpec(dora=True)}
"""Settings of a kind that can less than the kind itself."""


def kinds(union: object) -> list[type]:
    """The specs of a union of the menu, in its order."""
    return list(get_args(get_args(union)[0]))


def methods() -> dict[str, MethodSpec]:
    """Every row of the table of methods: each kind as it is by default, and its variants."""
    found: dict[str, MethodSpec] = {}
    for spec in kinds(MethodSpec):
        one = spec()
        found[one.kind] = one
        found |= {name: other for name, other in VARIANTS.items() if other.kind == one.kind}
    return found


def allowed(method: MethodSpec, quant: Quant, strategy: StrategySpec) -> bool:
    """Whether a run of this method on such a base under this strategy may start."""
    run = Run(
        name="support",
        model=ModelSpec(path="builtin:tiny", quant=quant),
        methods=(method,),
        data=DataSpec(train=(SourceSpec(path="builtin:docstrings"),)),
        train=TrainSpec(steps=100),
        strategy=strategy,
    )
    return not rules.fired(run)


def method_table() -> str:
    """Methods by base: the strategies, then what else their traits say."""
    rows = []
    for name, method in methods().items():
        marks = [_mark(method.packs), _mark(method.deltas), _mark(method.merges)]
        bases = [_strategies(method, quant) for quant in QUANTS]
        rows.append([name, *bases, *marks, method.export_as])
    heads = [f"`quant: {quant}`" for quant in QUANTS]
    return _table(["method", *heads, "packs", "weight deltas", "merges", "leaves"], rows)


def objective_table() -> str:
    """What each objective reads and reports."""
    rows = []
    for spec in kinds(ObjectiveSpec):
        one = spec()
        rows.append([one.kind, one.reads, ", ".join(one.metrics), _mark(one.packs)])
    return _table(["objective", "reads", "evaluations report", "packs"], rows)


def _strategies(method: MethodSpec, quant: Quant) -> str:
    stages = [stage for stage in (0, 1, 2, 3) if allowed(method, quant, ZeroSpec(stage=stage))]
    parts = ["ddp"] if allowed(method, quant, DdpSpec()) else []
    if stages:
        whole = stages == list(range(stages[0], stages[-1] + 1))
        said = f"{stages[0]}-{stages[-1]}" if whole else ", ".join(map(str, stages))
        parts.append(f"ZeRO {said}")
    return ", ".join(parts) or "-"


def _mark(value: bool) -> str:
    return "yes" if value else "-"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    print(method_table(), objective_table(), sep="\n\n")
