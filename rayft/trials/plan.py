"""Which trials may share a frozen base, and how many fit in a pack. Config only, no torch."""

from __future__ import annotations

import json

from rayft.config.override import flattened
from rayft.config.run import Run

FREE = {
    "optim": None,
    "train": None,
    "seed": None,
    "name": None,
    "storage": None,
    "scale": None,
    "trackers": None,
    "sweep": None,
    "data": ("cache",),
}
"""What trials of one pack may differ in, beside what their method says (`pack_free`); None: all of
that section, less `SHARED`."""
SHARED = {"train": ("gradient_checkpointing", "precision"), "optim": ("kind",)}
"""Fields of a free section that hold for the whole pack."""


def why_not_packed(run: Run) -> str:
    """ "" when the run can be a trial of a pack; else the reason, one clause."""
    if run.scale.workers != 1:
        return f"scale.workers is {run.scale.workers}"
    if not run.strategy.packs:
        return f"strategy is {run.strategy.kind}"
    return why_not_shared(run)


def why_not_shared(run: Run) -> str:
    """ "" when the run's steps can go through a base that others share, wherever that is; else the
    reason, one clause."""
    methods = run.methods
    if len(methods) != 1 or not methods[0].packs:
        return f"methods: {', '.join(method.kind for method in methods)} is not one lora"
    if not run.objective.packs:
        return f"objective {run.objective.kind} needs more than the trial's own rows"
    if run.penalties:
        return "penalties look at weights that a pack shares"
    if run.optim.kind != "adamw":
        return f"optim.kind is {run.optim.kind}"
    if run.model.quant == "int8":
        return "model.quant is int8, whose outliers mix the rows of a batch"
    return ""


def pack_key(run: Run) -> str:
    """Equal exactly for runs that may share a pack."""
    return json.dumps(_shared(run), sort_keys=True)


def pack_differences(run: Run, other: Run) -> list[str]:
    """Paths of the fields that keep two runs out of one pack."""
    ours, theirs = (flattened(_shared(one)) for one in (run, other))
    return sorted(p for p in ours.keys() | theirs.keys() if ours.get(p) != theirs.get(p))


def _shared(run: Run) -> dict[str, object]:
    """The config without what trials of one pack may differ in."""
    data = run.resolved()
    for method, spec in zip(data["methods"], run.methods, strict=True):
        for name in spec.pack_free:
            del method[name]
    for section, names in FREE.items():
        if names is not None:
            for name in names:
                del data[section][name]
        elif section in SHARED:
            data[section] = {name: data[section][name] for name in SHARED[section]}
        else:
            del data[section]
    if run.model.init == "random":
        data["seed"] = run.seed  # the base's weights are drawn from it
    return data


def default_slots(run: Run, gpu: bool) -> int:
    """Trials per pack: on a GPU width pays until the step is compute-bound. On one CPU core a few
    hundred tokens are (experiments/README.md): more trials at a time are then only slower each, and
    early stopping and the searcher know less when they decide."""
    tokens = run.train.global_batch * run.data.max_length  # of a trial's step, at most
    if gpu:
        return 16
    return 4 if tokens <= 256 else 2 if tokens <= 512 else 1
