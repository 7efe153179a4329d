"""load: a config file, a mapping or a Run, with overrides, to a checked Run."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rayft.config import rules
from rayft.config.base import Spec
from rayft.config.mistakes import Mistake, place_of, sentences
from rayft.config.run import Run
from rayft.config.shape import tidy
from rayft.config.source import Keys, Source, dotted, parse, read
from rayft.core.errors import ConfigError

LISTED = 8  # mistakes shown at once


def load(source: str | Path | Mapping[str, Any] | Run, overrides: Sequence[str] = ()) -> Run:
    """Read, override, validate, and refuse what is impossible.

    Paths inside a config (data, models, storage) are relative to the current directory, not to the
    config file, as in the tools people come from: the same file works from a project's root
    wherever it is kept.

    Args:
        source: path of a YAML or JSON file, the same as a mapping, or a Run.
        overrides: `a.b=c`, the value in YAML, list entries by number: `methods.0.rank=8`. An
            override stands over the file; the last one wins.

    Raises:
        ConfigError: all mistakes at once (up to 8), each with its line, or a pair of settings that
            cannot work (rayft.config.rules).
    """
    if isinstance(source, str | Path):
        found = read(Path(source))
    else:
        found = Source("config", source.resolved() if isinstance(source, Run) else _plain(source))
    if found.data is None:
        found.data = {}
    if not isinstance(found.data, dict):
        raise ConfigError("a config is a mapping (key: value) at the top", where=found.name)
    wrong: list[Mistake] = []
    tidy(found, wrong)
    for override in overrides:
        _override(found, override)
        wrong.clear()  # it may have put a mistake right
        tidy(found, wrong)
    return _checked(found, [(keys, f"{dotted(keys)} {said}") for keys, said in wrong])


def _checked(found: Source, wrong: list[Mistake]) -> Run:
    try:
        run = Run.model_validate(found.data)
    except ValidationError as error:
        known = {keys for keys, _ in wrong}
        details = error.errors(include_url=False)
        wrong += [m for m in sentences(details, found.data) if m[0] not in known]
    if wrong:
        raise _refusal(found, wrong)
    refused = rules.matching(run)
    if refused:
        raise _refusal(
            found, [(_path(rule.key), rule.sentence(run)) for rule in refused], "reason to refuse"
        )
    return run


def _path(key: str) -> Keys:
    return tuple(int(part) if part.isdigit() else part for part in key.split("."))


def _refusal(found: Source, wrong: list[Mistake], noun: str = "mistake") -> ConfigError:
    """One error for all mistakes, in the order of the file."""

    def order(mistake: Mistake) -> int:
        number = re.search(r":(\d+)$", found.where(mistake[0]))
        return int(number[1]) if number else 1 << 30

    wrong = sorted(wrong, key=order)
    names = any(" is not a key" in said or " is missing" in said for _, said in wrong)
    fix = "`rayft check --schema` lists every key" if names else ""
    if len(wrong) == 1:
        keys, said = wrong[0]
        return ConfigError(said, where=found.where(keys), fix=fix)
    nouns = "reasons to refuse" if noun != "mistake" else "mistakes"
    lines = [f"{len(wrong)} {nouns} in {found.name}"]
    lines += [f"  {found.where(keys)}: {said}" for keys, said in wrong[:LISTED]]
    if len(wrong) > LISTED:
        lines.append(f"  ... and {len(wrong) - LISTED} more")
    return ConfigError("\n".join(lines), fix=fix)


def _override(found: Source, text: str) -> None:
    """Set one value; an unknown last key is left for validation, which knows the nearest name."""
    path, sign, value = text.partition("=")
    keys = _path(path.strip())
    if not sign or not path.strip() or "" in keys:
        raise ConfigError(f"an override is written a.b=value, not {text!r}")
    told = f"override {text if len(text) <= 60 else text[:57] + '...'}"
    new = parse(value, "override", told)
    new.places[()] = told
    if new.data is None:
        new.raw[()] = value
    holder = found.data
    for index, key in enumerate(keys[:-1]):
        holder = _step(found, holder, keys[: index + 1], key, told)
    _put(holder, keys, new.data, told)
    found.put(keys, new)


def _step(
    found: Source, holder: dict[str, Any] | list[Any], keys: Keys, key: str | int, told: str
) -> Any:
    """Go one key down, creating what the defaults would have put there."""
    if isinstance(holder, list):
        _index(holder, keys, told)
        if key == len(holder):
            holder.append({})
            found.places[keys] = told
    elif holder.get(str(key)) is None:
        holder[str(key)] = _default(found, keys)
        found.places[keys] = told
    inner = holder[key if isinstance(holder, list) else str(key)]
    if not isinstance(inner, list | dict):
        raise ConfigError(f"{dotted(keys)} is {inner!r} and has nothing inside it", where=told)
    return inner


def _put(holder: Any, keys: Keys, value: Any, told: str) -> None:
    key = keys[-1]
    if isinstance(holder, list):
        _index(holder, keys, told)
        holder[key : key + 1] = [value]  # also appends
    else:
        holder[str(key)] = value


def _index(holder: list[Any], keys: Keys, told: str) -> None:
    key = keys[-1]
    if not isinstance(key, int):
        last = len(holder) - 1
        raise ConfigError(
            f"{dotted(keys[:-1])} is a list: name an entry by its number, "
            f"{dotted((*keys[:-1], 0))} to {dotted((*keys[:-1], max(last, 0)))}",
            where=told,
        )
    if key > len(holder):
        raise ConfigError(
            f"{dotted(keys)} does not exist: {dotted(keys[:-1])} has {len(holder)} "
            f"{'entry' if len(holder) == 1 else 'entries'}, counted from 0",
            where=told,
        )


def _default(found: Source, keys: Keys) -> Any:
    """What stands at `keys` when nothing is written there, as far as an override must see it."""
    parent = place_of(keys[:-1], found.data)
    spec = parent.specs.get("")
    if spec is None or keys[-1] not in spec.model_fields:
        return {}
    default = _plain(spec.model_fields[str(keys[-1])].get_default(call_default_factory=True))
    return default if isinstance(default, list | dict) else {}


def _plain(value: Any) -> Any:
    """Specs, tuples and paths as YAML would have given them; a copy."""
    if isinstance(value, Spec):
        kind = {"kind": value.model_dump()["kind"]} if "kind" in type(value).model_fields else {}
        return kind | value.model_dump(mode="json", exclude_unset=True)
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
