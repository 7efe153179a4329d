"""Set one value of a config by its dotted path, in place."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rayft.config.base import Spec
from rayft.config.messages import place_of
from rayft.config.parse import ConfigSource, Keys, dotted, parse, split
from rayft.config.sweep import KINDS
from rayft.config.yaml_dialect import DEPTH
from rayft.core.address import redact
from rayft.core.errors import ConfigError


def override(found: ConfigSource, text: str) -> None:
    """`a.b=c`, the value in YAML; an unknown last key is left for validation, which knows the
    nearest name.

    Raises:
        ConfigError: it is not written so, or nothing can stand there.
    """
    path, sign, value = text.partition("=")
    keys = _keys(path.strip(), found.data)
    if not sign or not path.strip() or "" in keys:
        raise ConfigError(f"an override is written a.b=value, not {text!r}")
    if len(keys) > DEPTH:
        raise ConfigError(f"an override goes {len(keys):,} levels deep; no config does")
    shown = redact(text)
    told = f"override {shown if len(shown) <= 60 else shown[:57] + '...'}"
    new = parse(value, "override", told)
    new.places[()] = told
    if new.data is None:
        new.raw[()] = value
    put(found, keys, new, told)


def put(found: ConfigSource, keys: Keys, new: ConfigSource, told: str) -> None:
    """`new` in place of whatever stands at `keys`; `told` is its place in messages.

    Raises:
        ConfigError: nothing can stand there.
    """
    holder = found.data
    for index, key in enumerate(keys[:-1]):
        holder = _step(found, holder, keys[: index + 1], key, told)
    _put(holder, keys, new.data, told)
    found.put(keys, new)


def _keys(path: str, data: Any) -> Keys:
    """The keys of a dotted path. Those of sweep.space hold dots themselves: all that follows is
    one, but for what lies inside a dimension that is there."""
    keys = split(path)
    parts = path.split(".")[2:]
    if keys[:2] != ("sweep", "space") or not parts:
        return keys
    sweep = data.get("sweep")
    space = sweep.get("space") if isinstance(sweep, dict) else None
    known = space if isinstance(space, dict) else {}
    lengths = range(len(parts), 0, -1)
    whole = len(parts) - (len(parts) > 1 and parts[-1] in KINDS)
    length = next((n for n in lengths if ".".join(parts[:n]) in known), whole)
    return (*keys[:2], ".".join(parts[:length]), *split(".".join(parts[length:])))


def _step(
    found: ConfigSource, holder: dict[str, Any] | list[Any], keys: Keys, key: str | int, told: str
) -> Any:
    """Go one key down, creating what the defaults would have put there."""
    if isinstance(holder, list):
        number = _index(holder, keys, told)
        if number == len(holder):
            holder.append({})
            found.places[keys] = told
        inner = holder[number]
    else:
        if holder.get(str(key)) is None:
            holder[str(key)] = _default(found, keys)
            found.places[keys] = told
        inner = holder[str(key)]
    if not isinstance(inner, list | dict):
        raise ConfigError(f"{dotted(keys)} is {inner!r} and has nothing inside it", where=told)
    return inner


def _put(holder: Any, keys: Keys, value: object, told: str) -> None:
    if isinstance(holder, list):
        number = _index(holder, keys, told)
        holder[number : number + 1] = [value]  # also appends
    else:
        holder[str(keys[-1])] = value


def _index(holder: list[Any], keys: Keys, told: str) -> int:
    """The last key as a place in `holder`, or the one behind its end."""
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
    return key


def _default(found: ConfigSource, keys: Keys) -> object:
    """What stands at `keys` when nothing is written there, as far as an override must see it."""
    parent = place_of(keys[:-1], found.data)
    spec = parent.specs.get("")
    if spec is None or keys[-1] not in spec.model_fields:
        return {}
    default = plain(spec.model_fields[str(keys[-1])].get_default(call_default_factory=True))
    return default if isinstance(default, list | dict) else {}


def plain(value: object) -> object:
    """Specs, tuples and paths as YAML would have given them; a copy."""
    if isinstance(value, Spec):
        kind = {"kind": value.model_dump()["kind"]} if "kind" in type(value).model_fields else {}
        return kind | value.model_dump(mode="json", exclude_unset=True)
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def flattened(data: Any, path: str = "", join: str = ".") -> dict[str, Any]:
    """{"a": {"b": [1]}} -> {"a.b.0": 1}, the way overrides name fields."""
    if isinstance(data, dict):
        items = [(str(key), value) for key, value in data.items()]
    elif isinstance(data, list):
        items = [(str(index), value) for index, value in enumerate(data)]
    else:
        return {path: data}
    found: dict[str, Any] = {}
    for key, value in items:
        found |= flattened(value, f"{path}{join}{key}" if path else key, join)
    return found
