"""What pydantic refuses, said in sentences: the dotted path, what is wrong, the nearest name."""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Union, get_args, get_origin

from pydantic_core import ErrorDetails

from rayft.config.base import Spec
from rayft.config.data import CLEAN
from rayft.config.foreign_names import GONE, RENAMED
from rayft.config.menu_tree import ROOT, MenuPlace, every_field, place, under
from rayft.config.parse import Keys, dotted
from rayft.config.strategies import PRESETS, ZeroSpec
from rayft.core.address import redact

Mistake = tuple[Keys, str]

_EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "tuple": "a list",
    "dict": "a mapping (key: value)",
    "model": "a mapping (key: value)",
}
_BOUNDS = {
    "greater_than": "above {gt}",
    "greater_than_equal": "{ge} or more",
    "less_than": "below {lt}",
    "less_than_equal": "at most {le:,}",
    "finite_number": "a finite number",
}
_PATTERNS = {
    r"^[A-Za-z0-9][A-Za-z0-9._-]*$": "a letter or digit, then letters, digits, dots, dashes and "
    "underscores (it names a folder)",
    CLEAN: "text without line breaks and control characters",
}


def sentences(errors: Iterable[ErrorDetails], data: object) -> list[Mistake]:
    """(path, sentence) of every mistake, one per path, in the order they are found."""
    grouped: dict[Keys, list[ErrorDetails]] = {}
    for error in errors:
        keys, choice = _keys(error["loc"])
        if error["type"] == "too_short" and _value(data, keys):
            continue  # pydantic counts only the entries that are right; those have their own error
        if error["type"] == "missing" and keys and isinstance(keys[-1], int):
            keys = keys[:-1]  # a list of fixed length is too short
        elif choice and not isinstance(_value(data, keys[:choice]), list | dict):
            keys = keys[:choice]  # neither branch of a choice of types fits
        grouped.setdefault(keys, []).append(error)
    found = []
    for keys, group in grouped.items():
        if any(other != keys and other[: len(keys)] == keys for other in grouped) and all(
            error["type"].endswith("_type") for error in group
        ):
            continue  # another branch of this choice got further and says more
        found.append((keys, _sentence(keys, group, data)))
    return found


def _keys(loc: tuple[str | int, ...]) -> tuple[Keys, int]:
    """The data path of a pydantic location (which also names kinds and branches of unions), and
    its length where a choice of types began (0: there was none)."""
    at: MenuPlace | None = ROOT
    keys: list[str | int] = []
    rest = list(loc)
    while rest:
        if at is not None and at.sort == "union":
            at = MenuPlace("spec", {"": at.specs[str(rest.pop(0))]})
        elif at is not None and at.sort == "list":
            keys.append(rest.pop(0))
            at = at.item
        elif at is not None and at.sort == "spec":
            keys.append(name := rest.pop(0))
            fields = at.specs[""].model_fields
            at = under(at.specs[""], name) if name in fields else None
        else:
            choice = at is not None and _is_choice(at.annotation)
            tail = rest[1:] if choice else rest
            return (*keys, *(k for k in tail if k != "[key]")), len(keys) if choice else 0
    return tuple(keys), 0


def _is_choice(annotation: object) -> bool:
    members = [a for a in get_args(annotation) if a is not type(None)]
    return get_origin(annotation) in (Union, types.UnionType) and len(members) > 1


def _value(data: object, keys: Keys) -> Any:
    """What stands at a path; None where nothing does."""
    for key in keys:
        if isinstance(data, dict):
            data = data.get(key)
        elif isinstance(data, list) and isinstance(key, int) and -len(data) <= key < len(data):
            data = data[key]
        else:
            return None
    return data


def _sentence(keys: Keys, group: list[ErrorDetails], data: object) -> str:
    error = group[0]
    name = dotted(keys) or "the config"
    match error["type"]:
        case "extra_forbidden":
            return f"{name} is not a key{_unknown(keys, data)}"
        case "missing":
            return f"{name} {_missing(keys, _value(data, keys))}"
        case "union_tag_invalid" | "union_tag_not_found":
            return _kind(keys, _value(data, keys))
        case "value_error":
            return f"{name}: {_context(error)['error']}"
        case _:
            pass
    value = _value(data, keys)
    wanted, given = _wanted(group), _shown(value)
    hint = _near_choice(error, given) or _default_hint(keys, data)
    if wanted == "a list" and isinstance(value, str):
        hint = f"; write [{value}]"
    return f"{name} must be {wanted}, not {given}{hint}"


def _wanted(group: list[ErrorDetails]) -> str:
    """What would have fitted, branches of a choice joined by `or`."""
    return " or ".join(dict.fromkeys(_want(error) for error in group))


def _want(error: ErrorDetails) -> str:
    sort, context = error["type"], error.get("ctx", {})
    if sort in _BOUNDS:
        return _BOUNDS[sort].format(**context)
    if sort == "literal_error":
        words = [word.strip("'") for word in re.split(r", | or ", context["expected"])]
        return words[0] if len(words) == 1 else f"one of {', '.join(words)}"
    if sort == "string_too_long":
        return f"text of at most {context['max_length']:,} characters"
    if sort == "string_pattern_mismatch":
        return _PATTERNS.get(context["pattern"], f"text that matches {context['pattern']}")
    if sort == "too_short":
        return f"a list of {context['min_length']} or more"
    if sort == "too_long":
        most = context["max_length"]
        if most > 2:  # pairs are the only lists of fixed length
            noun = "mapping" if context["field_type"] == "Dictionary" else "list"
            return f"a {noun} of at most {most:,}"
        return f"a list of {most}" if most else "an empty list (no kind exists in this version)"
    return _EXPECTED.get(sort.split("_")[0], error["msg"].lower())


def _context(error: ErrorDetails) -> dict[str, Any]:
    return error.get("ctx", {})


def _near_choice(error: ErrorDetails, given: str) -> str:
    if error["type"] != "literal_error":
        return ""
    words = re.findall(r"'([^']*)'", _context(error)["expected"])
    near = difflib.get_close_matches(given.strip("'").lower(), words, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


def _default_hint(keys: Keys, data: object) -> str:
    """A key without a value was probably meant to have its default."""
    spec = _spec_at(keys[:-1], data)
    info = spec.model_fields.get(str(keys[-1])) if spec and keys else None
    if _value(data, keys) is not None or info is None or info.is_required():
        return ""
    return f"; leave the key out for its default ({info.default})"


def _shown(value: object) -> str:
    """A value as it may stand in a message."""
    if value is None:
        return "empty (null)"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    text = redact(repr(value))  # before it is cut: half a secret is not recognised
    return text if len(text) <= 40 else f"{text[:36]}...{text[-1]}"


def _missing(keys: Keys, value: object) -> str:
    spec = _spec_at(keys[:-1], {})
    info = spec.model_fields.get(str(keys[-1])) if spec else None
    if isinstance(value, list):
        wanted = len(get_args(place_of(keys).annotation))
        return f"must be a list of {wanted}, not a list of {len(value)}"
    if info is None:
        return "is missing"
    inner = place_of(keys).specs.get("")
    told = (info.description or (inner and inner.__doc__) or "").rstrip(".").replace("\n", " ")
    return f"is missing: {told[0].lower()}{told[1:]}" if told else "is missing"


def _kind(keys: Keys, value: object) -> str:
    at = place_of(keys)
    name, kinds = dotted(keys), list(at.specs)
    if not isinstance(value, dict) or "kind" not in value:
        holders = [k for k, s in at.specs.items() if isinstance(value, dict) and _fits(s, value)]
        hint = f"; did you mean kind: {holders[0]}?" if holders else ""
        return f"{name}.kind is missing; kinds: {', '.join(kinds)}{hint}"
    if ZeroSpec in at.specs.values():
        kinds = list(dict.fromkeys([*kinds, *PRESETS]))
    near = difflib.get_close_matches(str(value["kind"]).lower(), kinds, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{name} knows no kind {_shown(value['kind'])}{hint} (there are: {', '.join(kinds)})"


def _fits(spec: type[Spec], value: Mapping[str, object]) -> bool:
    return bool(value) and set(value) <= set(spec.model_fields)


def place_of(keys: Keys, data: object = None) -> MenuPlace:
    """The place at a path; in a union, `data` decides the kind, else any kind that has the key."""
    at = ROOT
    for index, key in enumerate(keys):
        if at.sort == "list" and at.item is not None:
            at = at.item
            continue
        spec = at.spec(_value(data, keys[:index]))
        options = [spec] if spec else list(at.specs.values())
        holder = next((s for s in options if key in s.model_fields), None)
        if holder is None:
            return place(Any)
        at = under(holder, str(key))
    return at


def _spec_at(keys: Keys, data: object) -> type[Spec] | None:
    at = place_of(keys, data)
    if at.sort == "union":
        return at.spec(_value(data, keys))
    return at.specs.get("")


def _unknown(keys: Keys, data: object) -> str:
    """`; did you mean ...?` for an unknown key: a near name here, another tool's, or elsewhere."""
    parents, word = keys[:-1], str(keys[-1])
    spec = _spec_at(parents, data)
    here = list(spec.model_fields) if spec else []
    low = word.lower().replace("-", "_")
    if low in GONE:
        return f": {GONE[low]}"
    for kind, other in place_of(parents, data).specs.items():
        if kind and word in other.model_fields:
            return f" of kind {_value(data, parents)['kind']}; kind {kind} has it"
    exact = next(_exactly(low, parents), "") if parents else ""
    if exact:
        return exact
    if low in RENAMED and (target := _renamed(RENAMED[low], parents)) != dotted(keys):
        return f"; did you mean {target}?"
    near = difflib.get_close_matches(low, here, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {dotted((*parents, near[0]))}?"
    return _nearly(low, parents) or f"; there are: {', '.join(here)}"


def _renamed(target: str, parents: Keys) -> str:
    """Our name for another tool's, with the number of the list entry it stands in."""
    head, _, tail = target.partition(".0.")
    if tail and [str(k) for k in parents[:-1]] == head.split("."):
        return dotted((*parents, tail))
    return target


def _exactly(word: str, parents: Keys) -> Iterator[str]:
    """The key as it is called, where it belongs."""
    for keys in every_field():
        if word == keys[-1] and keys[:-1] != parents and word not in ("kind", "path"):
            yield f"; did you mean {dotted(keys)}?"


def _nearly(word: str, parents: Keys) -> str:
    """A key of almost this name in another section."""
    exact = next(_exactly(word, parents), "")
    names = {str(keys[-1]): keys for keys in every_field() if keys[:-1] != parents}
    near = difflib.get_close_matches(word, list(names), n=1, cutoff=0.75)
    return exact or (f"; did you mean {dotted(names[near[0]])}?" if near else "")
