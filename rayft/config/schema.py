"""The JSON Schema of a config, for editors: the menu, and the short forms that `load` accepts."""

from __future__ import annotations

from typing import Any

from rayft.config.base import Spec
from rayft.config.menu_tree import SHORT, MenuPlace, place, under
from rayft.config.run import Run
from rayft.config.strategies import PRESETS, ZeroSpec


def schema() -> dict[str, object]:
    """JSON Schema (draft 2020-12) of a config file."""
    whole = Run.model_json_schema()
    _shorten(Run, whole["properties"])
    for spec in _specs(place(Run)):
        if spec is not Run:
            _shorten(spec, whole["$defs"][spec.__name__]["properties"])
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "rayft", **whole}


def _specs(at: MenuPlace) -> set[type[Spec]]:
    found = set(at.specs.values())
    for spec in at.specs.values():
        for name in spec.model_fields:
            found |= _specs(under(spec, name))
    return found | (_specs(at.item) if at.item else set())


def _shorten(spec: type[Spec], properties: dict[str, Any]) -> None:
    """Admit the short forms wherever a field of `spec` has one."""
    for name in spec.model_fields:
        at = under(spec, name)
        if at.sort == "leaf":
            continue
        long = properties[name]
        told = {key: long.pop(key) for key in ("description", "default") if key in long}
        if at.sort == "list" and at.item is not None:
            entry = {"anyOf": [long["items"], *_short(at.item)]}
            choices = [{**long, "items": entry}, *entry["anyOf"]]
        else:
            choices = [long, *_short(at)]
        optional = [] if spec.model_fields[name].is_required() else [{"type": "null"}]
        properties[name] = {**told, "anyOf": [*choices, *optional]}


def _short(at: MenuPlace) -> list[dict[str, Any]]:
    if at.sort == "union":
        presets = list(PRESETS) if ZeroSpec in at.specs.values() else []
        return [{"enum": list(dict.fromkeys([*at.specs, *presets]))}]
    return [{"type": "string"}] if at.specs[""] in SHORT else []
