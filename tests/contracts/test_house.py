"""House rules over rayft/, by reading the source: sizes, no guessing, menus equal rooms."""

from __future__ import annotations

import ast
import importlib
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import rayft
from rayft.config.menu_tree import under
from rayft.config.run import Run

PACKAGE = Path(__file__).parents[2] / "rayft"
FILES = sorted(PACKAGE.rglob("*.py"))
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def each(path: Path) -> pytest.param:
    return pytest.param(path, id=str(path.relative_to(PACKAGE)))


def calls(tree: ast.AST, names: set[str]) -> list[int]:
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names
    ]


def catch_alls(text: str) -> list[int]:
    """Lines that catch everything, do not raise it again, and give no reason beside it."""
    lines = text.splitlines()
    found = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.ExceptHandler):
            continue
        kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
        names = {kind.id for kind in kinds if isinstance(kind, ast.Name)}
        everything = node.type is None or names & {"Exception", "BaseException"}
        reason = lines[node.lineno - 1].partition("#")[2].replace("noqa", "").strip(" :")
        last = node.body[-1]
        again = isinstance(last, ast.Raise) and last.exc is None
        if everything and not again and len(reason.split()) < 3:
            found.append(node.lineno)
    return found


def long_functions(text: str) -> list[str]:
    return [
        f"{node.name}:{node.lineno}"
        for node in ast.walk(ast.parse(text))
        if isinstance(node, FUNCTIONS) and (node.end_lineno or 0) - node.lineno + 1 > 60
    ]


@pytest.mark.parametrize("path", [each(path) for path in FILES])
def test_a_file_keeps_the_house_rules(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 300
    assert long_functions(text) == []
    assert calls(ast.parse(text), {"getattr", "hasattr"}) == []
    assert catch_alls(text) == []
    assert ast.get_docstring(ast.parse(text)), "a file opens with what it is"
    lowered = text.lower()
    assert [word for word in ("todo", "fixme", "xxx", "for now") if f" {word}" in lowered] == []


def test_values_have_types() -> None:
    """Any switches the type checker off where it stands, and wherever it is handed on."""
    texts = [path.read_text() for path in FILES]
    lines = sum(len(text.splitlines()) for text in texts)
    found = sum(len(re.findall(r"\bAny\b", text)) for text in texts)
    assert found <= 8 * lines / 1000


RAY_FILES = {
    "cluster": {"connect", "driver_context", "map_tasks", "preflight"},
    "training": {"control", "launch", "telemetry", "worker"},
    "hosts": {"pack_actor", "pack_pool", "placer", "placer_config", "train_run_actor"},
    "search": {"searcher"},
    "sweeps": {
        "callback",
        "cluster",
        "driver",
        "promotion",
        "schedule",
        "scheduler_replay",
        "trial",
        "tuner",
    },
}


def test_class_names_are_found_once_and_mostly_two_words() -> None:
    """One word only where it is the field's own name for the thing."""
    names = [
        node.name.strip("_")
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    ]
    assert [name for name, times in Counter(names).items() if times > 1] == []
    one = [name for name in names if len(re.findall(r"[A-Z][a-z0-9]*", name)) < 2]
    assert len(one) <= len(names) / 6, sorted(one)


def test_no_room_hides_a_function_of_the_api() -> None:
    """Importing `rayft.train.x` would replace the function `rayft.train` by a module."""
    rooms = {path.parent.name for path in FILES} | {path.stem for path in PACKAGE.glob("*.py")}
    assert not rooms & set(rayft.__all__)


def test_ray_is_imported_where_it_is_said_to_be() -> None:
    """CONTRIBUTING names these files; whoever reads another one need not know Ray."""
    found: dict[str, set[str]] = {}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            imported += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.split(".")[0] == "ray" for name in imported):
                found.setdefault(path.parent.name, set()).add(path.stem)
    assert found == RAY_FILES
    told = (PACKAGE.parent / "CONTRIBUTING.md").read_text()
    for room, files in RAY_FILES.items():
        line = next(line for line in told.splitlines() if line.startswith(f"- `{room}/`: "))
        assert set(line.partition(": ")[2].strip("`.").split("`, `")) == files


def test_the_rules_see_what_they_forbid() -> None:
    bad = "try:\n    f()\nexcept Exception:\n    getattr(a, 'b')\nexcept:  # why\n    pass\n"
    assert catch_alls(bad) == [3, 5]
    assert (
        catch_alls("try:\n    f()\nexcept Exception:  # a tracker must not stop a run\n  x\n") == []
    )
    assert catch_alls("try:\n    f()\nexcept BaseException:\n    undo()\n    raise\n") == []
    assert calls(ast.parse(bad), {"getattr"}) == [4]
    assert long_functions("def f():\n" + "    x\n" * 60) == ["f:1"]
    assert long_functions("def f():\n" + "    x\n" * 59) == []


@pytest.mark.parametrize(
    ("room", "field"),
    [("methods", "methods"), ("objectives", "objective"), ("strategies", "strategy")],
)
def test_the_menu_and_the_room_hold_the_same_kinds(room: str, field: str) -> None:
    at = under(Run, field)
    menu = set((at.item or at).specs.values())
    found: dict[str, Any] = vars(importlib.import_module(f"rayft.{room}"))
    assert set(found["IMPLEMENTATIONS"]) == menu
