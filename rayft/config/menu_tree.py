"""The menu as a tree: what may stand at each place of a config.

Specs, unions of specs by `kind`, and lists of either are places; everything else is a leaf. `tidy`
writes the short forms out: a bare string is a source, a model or a kind; one entry is a list of
one; a preset name is a strategy; an empty section is a section of defaults.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from rayft.config.base import Spec
from rayft.config.data import SourceSpec
from rayft.config.parse import ConfigSource, Keys
from rayft.config.run import ModelSpec, Run
from rayft.config.strategies import PRESETS, ZeroSpec

SHORT: dict[type[Spec], str] = {SourceSpec: "path", ModelSpec: "path"}
"""Specs that a bare string may stand for, and the field it then is."""


@dataclass(frozen=True)
class MenuPlace:
    """What may stand somewhere.

    Attributes:
        sort: `spec`, `union` (of specs, by kind), `list` (of `item`), or `leaf`.
        specs: the specs by kind; a `spec` has one, under "".
        item: of a list.
        annotation: the type of a leaf.
        optional: null means that it is not there.
    """

    sort: Literal["spec", "union", "list", "leaf"]
    specs: dict[str, type[Spec]] = field(default_factory=dict, hash=False)
    item: MenuPlace | None = None
    annotation: object = None
    optional: bool = False

    def spec(self, value: object) -> type[Spec] | None:
        """The spec that `value` is written for; None when its kind is missing or unknown."""
        if self.sort == "spec":
            return self.specs[""]
        kind = value.get("kind") if isinstance(value, dict) else None
        return self.specs.get(kind) if isinstance(kind, str) else None


@cache
def place(annotation: object) -> MenuPlace:
    """The place that a type annotation of a spec describes."""
    if get_origin(annotation) is Annotated:
        return place(get_args(annotation)[0])
    if isinstance(annotation, type) and issubclass(annotation, Spec):
        return MenuPlace("spec", {"": annotation})
    arguments = get_args(annotation)
    if get_origin(annotation) is tuple and len(arguments) == 2 and arguments[1] is Ellipsis:
        item = place(arguments[0])
        if item.sort != "leaf":
            return MenuPlace("list", item=item)
    if get_origin(annotation) in (Union, types.UnionType):
        inner = [place(a) for a in arguments if a is not types.NoneType]
        if len(inner) == 1 and inner[0].sort == "spec":
            return replace(inner[0], optional=len(arguments) > 1)
        if all(p.sort == "spec" for p in inner):
            specs = [p.specs[""] for p in inner]
            return MenuPlace("union", {spec.model_fields["kind"].default: spec for spec in specs})
    return MenuPlace("leaf", annotation=annotation)


ROOT = place(Run)


def under(spec: type[Spec], name: str) -> MenuPlace:
    """The place of a field."""
    return place(spec.model_fields[name].annotation)


def every_field(start: MenuPlace = ROOT, keys: Keys = ()) -> Iterator[Keys]:
    """The path of every field of the menu; list entries are numbered 0."""
    if start.sort == "list" and start.item is not None:
        yield from every_field(start.item, (*keys, 0))
    for spec in start.specs.values():
        for name in spec.model_fields:
            yield (*keys, name)
            yield from every_field(under(spec, name), (*keys, name))


class _Absent:
    """An empty list or choice: the default applies."""


ABSENT = _Absent()


def tidy(source: ConfigSource, wrong: list[tuple[Keys, str]]) -> None:
    """Write the short forms out, in place; mistakes that pydantic would not see go to `wrong`."""
    source.data = _tidy(ROOT, source.data, (), source, wrong)


def _tidy(
    at: MenuPlace, value: object, keys: Keys, source: ConfigSource, wrong: list[tuple[Keys, str]]
) -> object:
    if at.sort == "leaf":
        return _leaf(at.annotation, value, keys, source, wrong)
    if value is None:
        return {} if at.sort == "spec" and not at.optional else ABSENT
    if at.sort == "list" and at.item is not None:
        if isinstance(value, str | dict):
            source.indent(keys, 0)
            value = [value]
        if not isinstance(value, list):
            return value
        entries = (_tidy(at.item, v, (*keys, i), source, wrong) for i, v in enumerate(value))
        return [None if entry is ABSENT else entry for entry in entries]
    if isinstance(value, str):
        value = _written_out(at, value)
    elif ZeroSpec in at.specs.values() and isinstance(value, dict):
        value = _preset(value)
    spec = at.spec(value)
    if spec is None or not isinstance(value, dict):
        return value
    inner = {
        key: _tidy(under(spec, key), v, (*keys, key), source, wrong)
        if key in spec.model_fields
        else v
        for key, v in value.items()
    }
    return {key: v for key, v in inner.items() if v is not ABSENT}


def _written_out(at: MenuPlace, word: str) -> object:
    """The mapping that a bare string stands for; the string where it stands for none."""
    if at.sort == "union":
        if ZeroSpec in at.specs.values() and word in PRESETS:
            return dict(PRESETS[word])
        return {"kind": word}
    short = SHORT.get(at.specs[""])
    return {short: word} if short else word


def _preset(value: dict[str, Any]) -> dict[str, object]:
    """`{kind: zero3, offload: cpu}` is the preset with a field changed."""
    kind = value.get("kind")
    if kind not in list(PRESETS):
        return value
    return PRESETS[kind] | {key: inner for key, inner in value.items() if key != "kind"}


def _leaf(
    annotation: object,
    value: object,
    keys: Keys,
    source: ConfigSource,
    wrong: list[tuple[Keys, str]],
) -> object:
    members = set(get_args(annotation)) if isinstance(annotation, types.UnionType) else {annotation}
    if str in members and members <= {str, type(None)} and isinstance(value, bool | int | float):
        return source.raw.get(keys, value)  # `subset: 2024`, `revision: 12e5`: text as typed
    if isinstance(value, bool) and members & {int, float}:
        # pydantic would read true as 1
        wrong.append((keys, f"must be a number, not {str(value).lower()}"))
    return value
