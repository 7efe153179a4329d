"""The space of a sweep: what a pick of its values makes of the base config."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Iterator, Mapping

from pydantic import ValidationError

from rayft.config.menu_tree import tidy
from rayft.config.messages import Mistake, sentences
from rayft.config.override import plain, put
from rayft.config.parse import ConfigSource, Keys, dotted, split
from rayft.config.run import Run
from rayft.config.sweep import Domain, perturbable
from rayft.config.validate import ruled, validated
from rayft.core.errors import ConfigError

__all__ = [
    "TRIES",
    "applied",
    "combination",
    "drawn",
    "hopeless",
    "mistakes",
    "params_of",
    "perturbable",
]

TRIES = 200  # draws that make no valid config before the space is given up


FIXED = {
    "name": "every trial has a name of its own",
    "storage": "every trial has a folder of its own",
    "sweep": "a sweep does not search itself",
    "scale": "it says where trials run, not what they learn",
    "trackers": "they only watch",
    "data.cache": "it changes no number",
    "data.eval": "trials are compared on the same held-out rows",
    "train.keep": "it changes no number",
    "train.log_every": "it changes no number",
}
"""Fields that no trial may differ in, and why."""


def params_of(space: Mapping[str, Domain], picks: Mapping[str, object]) -> dict[str, object]:
    """{path: value} of one pick per dimension; the pick of a paired one is its whole entry."""
    params: dict[str, object] = {}
    for name, domain in space.items():
        params |= domain.params(name, picks[name])
    return params


def applied(
    run: Run, params: Mapping[str, object], *, name: str | None = None, storage: str | None = None
) -> Run:
    """The trial that `params` make of the base `run`: a Run without a sweep, checked like a file.

    Args:
        params: {path of a config field: value}.
        name, storage: of the trial; default the base's.

    Raises:
        ConfigError: naming the path and the value, or the rule that refuses the combination.
    """
    data: dict[str, object] = {**run.resolved(), "sweep": None}
    data |= {key: value for key, value in (("name", name), ("storage", storage)) if value}
    if run.sweep is not None and run.sweep.steps is not None:
        train = run.train.model_dump(mode="json")
        data["train"] = train | {"steps": run.sweep.steps, "epochs": None}
    told = ", ".join(f"{path}={value}" for path, value in params.items())
    found = ConfigSource(f"trial {name or run.name}{f' ({told})' if told else ''}", data)
    wrong = _set(found, params)
    return ruled(found, validated(found, wrong))


def combination(space: Mapping[str, Domain], index: int) -> dict[str, object]:
    """The picks of one combination of a finite space; the last dimension varies fastest."""
    picks: dict[str, object] = {}
    for name, domain in reversed(list(space.items())):
        values = domain.values or ()
        index, rest = divmod(index, len(values))
        picks[name] = values[rest]
    return {name: picks[name] for name in space}


def drawn(domain: Domain, chance: random.Random) -> object:
    """One value of a dimension, by chance."""
    if domain.uniform is not None:
        return chance.uniform(*domain.uniform)
    if domain.loguniform is not None:
        low, high = domain.loguniform
        return min(max(math.exp(chance.uniform(math.log(low), math.log(high))), low), high)
    return chance.choice(domain.values or ())


def hopeless(run: Run) -> str:
    """Why no trial can be: each of many combinations (of a small space, all) is refused. "" as soon
    as one is not."""
    if run.sweep is None:
        return ""
    space, whole, said = run.sweep.space, run.sweep.combinations, ""
    for number in range(min(TRIES, whole or TRIES)):
        if whole is not None and whole <= TRIES:
            picks = combination(space, number)
        else:
            chance = random.Random(number)
            picks = {name: drawn(domain, chance) for name, domain in space.items()}
        try:
            applied(run, params_of(space, picks))
        except ConfigError as error:
            said = f"{error.what} ({error.where})"
        else:
            return ""
    return f"no combination of sweep.space makes a valid config; the last one tried: {said}"


def mistakes(run: Run) -> list[Mistake]:
    """What is wrong with the space of `run.sweep`: paths that are no fields or must not vary, and
    values that their field refuses, each tried alone on the base config."""
    found: list[Mistake] = []
    if run.sweep is None:
        return found
    base = run.resolved() | {"sweep": None}
    seen: list[str] = []
    for name, domain in run.sweep.space.items():
        here = ("sweep", "space", name)
        paths = list(domain.paired[0]) if domain.paired else [name]
        refused = [said for path in paths for said in _place(path, seen)]
        seen += paths
        if not refused:
            found += [
                ((*here, *inner), f"{dotted(here)}: {said}")
                for inner, said in _values(base, name, domain)
            ]
        found += [(here, f"{dotted(here)}: {said}") for said in refused]
    return found


def _place(path: str, seen: list[str]) -> Iterator[str]:
    """Why `path` cannot be searched beside the paths in `seen`."""
    if not path or dotted(split(path)) != path:
        yield f"{path!r} is no path of a config field, as methods.0.rank"
    for fixed, why in FIXED.items():
        if _within(path, fixed):
            yield f"{path} cannot be searched: {why}"
    for other in seen:
        if path == other:
            yield f"{path} is searched twice; name it in one dimension"
        elif _within(path, other) or _within(other, path):
            outer, inner = sorted((path, other), key=len)
            yield f"{inner} lies inside {outer}, which the space sets too; drop one of them"


def _within(path: str, outer: str) -> bool:
    return path == outer or path.startswith(f"{outer}.")


def _values(base: Mapping[str, object], name: str, domain: Domain) -> Iterator[tuple[Keys, str]]:
    """Values that the base config refuses: the keys inside the domain, and a sentence. An unknown
    path refuses them all, and is said once."""
    (kind,) = domain.model_dump()
    told: set[str] = set()
    for index, value in enumerate(domain.ends()):
        said = _refused(base, domain.params(name, value))
        if said and said not in told:
            told.add(said)
            yield (kind, index), said
            if " is not a key" in said:
                return
    ends = domain.uniform or domain.loguniform
    if ends is not None and not told:
        between = ends[0] + (ends[1] - ends[0]) / math.pi
        if _refused(base, {name: between}):
            yield (
                (kind,),
                f"{name} takes no fractions, so a {kind} range cannot be; use int, choice",
            )


def _refused(base: Mapping[str, object], params: Mapping[str, object]) -> str:
    """The first mistake of `base` with `params`, "" when there is none. Rules are left aside: what
    they refuse depends on the other dimensions."""
    found = ConfigSource("config", copy.deepcopy(base))
    wrong: list[Mistake] = []
    try:
        wrong = _set(found, params)
        Run.model_validate(found.data)
    except ConfigError as error:
        return error.what
    except ValidationError as error:
        wrong = [*wrong, *sentences(error.errors(include_url=False), found.data)]
    return wrong[0][1] if wrong else ""


def _set(found: ConfigSource, params: Mapping[str, object]) -> list[Mistake]:
    """Put `params` into the config, short forms written out; the mistakes seen on the way."""
    wrong: list[Mistake] = []
    for path, value in params.items():
        told = f"{path}={value}"
        new = ConfigSource("params", plain(value), {(): told})
        put(found, split(path), new, told)
    tidy(found, wrong)
    return [(keys, f"{dotted(keys)} {said}") for keys, said in wrong]
