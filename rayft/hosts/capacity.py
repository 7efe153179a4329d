"""How many trials a cluster holds at the same time: packs, slots in them, and runs of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rayft.cluster import preflight
from rayft.cluster.connect import Node, ceiling, has_dashboard
from rayft.config.run import Run
from rayft.config.space import applied
from rayft.core.errors import ConfigError, InfeasibleError
from rayft.trials.plan import default_slots, why_not_packed


@dataclass(frozen=True)
class ClusterCapacity:
    """What a sweep may use."""

    packs: int
    slots: int  # per pack
    own_runs: int  # runs of their own at the same time
    gpus: float  # of a pack
    sentence: str  # for people

    @property
    def at_once(self) -> int:
        """Trials that can train at the same time."""
        return self.packs * self.slots + self.own_runs


def reasons_not_packed(run: Run) -> tuple[bool, list[str]]:
    """Whether some trial of the space can pack, and why others cannot (clauses, each once).

    Every value of the space is looked at on its own, the ends of ranges for the whole range.
    """
    if run.swept.pack == "off":
        return False, ["sweep.pack is off"]
    found: dict[str, None] = {}
    some = False
    for name, domain in run.swept.space.items():
        for value in domain.ends():
            try:
                why = why_not_packed(applied(run, domain.params(name, value)))
            except ConfigError:
                continue  # a value that only works together with another one
            some = some or not why
            if why:
                found[why] = None
    return some, list(found)


def cluster_capacity(run: Run, living: Sequence[Node]) -> ClusterCapacity:
    """The room for `run`'s sweep on these nodes.

    Raises:
        InfeasibleError: no trial fits, or runs of their own would hang without a dashboard.
    """
    packable, reasons = reasons_not_packed(run)
    gpus = preflight.gpus_per_worker(run, living)
    own_runs = 0
    if reasons:
        # What a trial asks for, at most; too little for even one is refused here.
        preflight.feasible(run, living, gpus, ceiling())
        if not has_dashboard():
            raise InfeasibleError(
                "this Ray cluster has no dashboard, and trials that run on their own would hang",
                cause="without it Ray frees no placement group of a stopped run",
                fix="pip install 'ray[default]' on all nodes, and start Ray with its dashboard",
            )
        need = preflight.resources(run.scale, gpus)
        own_runs = (
            preflight.fitting(living, need, run.scale.placement) // preflight.span(run.scale)[0]
        )
    packs = _packs(run, living, gpus) if packable else 0
    if packs and own_runs:  # a mixed space: half each
        packs, own_runs = max(1, packs // 2), max(1, own_runs // 2)
    slots = run.swept.slots or default_slots(run, gpus > 0)
    packs = min(packs, run.swept.count)
    if packs * slots > run.swept.count:  # fewer trials than slots: spread over the packs
        slots = -(-run.swept.count // packs)
    return ClusterCapacity(
        packs, slots, own_runs, gpus, _sentence(packs, slots, own_runs, gpus, reasons)
    )


def _packs(run: Run, living: Sequence[Node], gpus: float) -> int:
    need = {"CPU": run.scale.cpus} | ({"GPU": gpus} if gpus else {})
    most = preflight.fitting(living, need, "PACK")
    if most == 0:
        raise InfeasibleError(
            f"no node has {run.scale.cpus:g} CPU" + f" and {gpus:g} GPU" * bool(gpus),
            cause="a pack needs that much",
            fix="lower scale.cpus or scale.gpus",
        )
    return min(most, run.swept.packs or most)


def _sentence(packs: int, slots: int, own_runs: int, gpus: float, reasons: list[str]) -> str:
    parts: list[str] = []
    if packs:
        where = "GPU" if gpus else "CPU core"
        parts.append(f"{packs} packs of {slots} trial{'s' * (slots > 1)}, one per {where}")
    if own_runs:
        why = "; ".join(reasons)
        parts.append(f"{own_runs} trials at a time as runs of their own ({why})")
    return ", ".join(parts)
