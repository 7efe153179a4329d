"""Config text -> plain data, with the line of every key.

Anchors, aliases and `<<` merges work; a key written twice is an error, and so is text that unfolds
to more than any config holds. No torch, no I/O but reading the one file.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from rayft.config.yaml_dialect import (
    DEPTH,
    SIZE,
    TAG,
    VALUES,
    ConfigLoader,
    ExcessError,
    check_tag,
    dump,
    excess_depth,
    excess_values,
    joined,
    scalar,
)
from rayft.core.address import redact
from rayft.core.errors import ConfigError

__all__ = ["Keys", "ConfigSource", "dotted", "dump", "parse", "read", "split"]

Keys = tuple[str | int, ...]


@dataclass
class ConfigSource:
    """Plain data, and where each of its keys was written.

    `places` maps a path of keys to `file:line` or to the override that set it; `raw` holds the text
    of every number, bool and null, so that a text field gets exactly what was typed.
    """

    name: str
    data: Any
    places: dict[Keys, str] = field(default_factory=dict)
    raw: dict[Keys, str] = field(default_factory=dict)

    def where(self, keys: Keys) -> str:
        """The place of `keys`, or of the nearest enclosing key that was written."""
        for length in range(len(keys), 0, -1):
            if keys[:length] in self.places:
                return self.places[keys[:length]]
        return self.places.get((), self.name)

    def put(self, keys: Keys, other: ConfigSource) -> None:
        """Remember that `other` now stands at `keys`, in place of whatever stood there."""
        for table, new in ((self.places, other.places), (self.raw, other.raw)):
            for old in [old for old in table if old[: len(keys)] == keys]:
                del table[old]
            table.update({keys + tail: value for tail, value in new.items()})

    def indent(self, keys: Keys, step: str | int) -> None:
        """What stood at `keys` now stands one level deeper, under `step`."""
        for table in (self.places, self.raw):
            deeper = {old: table[old] for old in table if old[: len(keys)] == keys and old != keys}
            for old, value in deeper.items():
                del table[old]
                table[(*keys, step, *old[len(keys) :])] = value
            if keys in self.raw and table is self.raw:
                table[(*keys, step)] = table.pop(keys)


class _NodeWalk:
    """One pass over the node tree of one document."""

    def __init__(self, name: str, loader: ConfigLoader, place: str | None) -> None:
        self.loader, self.name, self.place = loader, name, place
        self.source = ConfigSource(name, None)
        self.doubles: list[str] = []
        self.open: list[yaml.Node] = []
        self.seen = 0  # values so far, those behind an alias each time it is used

    def at(self, node: yaml.Node) -> str:
        return self.place or f"{self.name}:{node.start_mark.line + 1}"

    def enter(self, node: yaml.Node) -> None:
        """Begin with a list or mapping; whoever ends it takes it off `open`."""
        if any(node is outer for outer in self.open):
            raise ConfigError("an alias refers to something that contains it", where=self.at(node))
        if len(self.open) == DEPTH:
            raise excess_depth(node.start_mark)
        check_tag(node)
        self.open.append(node)

    def count(self, node: yaml.Node) -> None:
        self.seen += 1
        if self.seen > VALUES:
            raise excess_values(node.start_mark)

    def value(self, node: yaml.Node, keys: Keys) -> object:
        self.count(node)
        self.source.places.setdefault(keys, self.at(node))
        if isinstance(node, yaml.ScalarNode):
            result = scalar(self.loader, node)
            if not isinstance(result, str):
                self.source.raw[keys] = node.value
            return result
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, keys)
        self.enter(node)
        values = [self.value(item, (*keys, i)) for i, item in enumerate(node.value)]
        self.open.pop()
        return values

    def mapping(self, node: yaml.MappingNode, keys: Keys) -> dict[str, Any]:
        self.enter(node)
        result: dict[str, Any] = {}
        first: dict[str, yaml.Node] = {}
        merged: list[yaml.Node] = []
        for key, child in node.value:
            if key.tag == TAG + "merge":
                merged += child.value if isinstance(child, yaml.SequenceNode) else [child]
                continue
            if not isinstance(key, yaml.ScalarNode):
                raise ConfigError("a key must be a word, not a list or mapping", where=self.at(key))
            word = joined(key.value, key.start_mark)
            if word in first:
                path = dotted((*keys, word))
                self.doubles.append(
                    f"{self.at(key)}: {path} is written twice, first in line "
                    f"{first[word].start_mark.line + 1}; keep one of them"
                )
                continue
            first[word] = key
            self.source.places[(*keys, word)] = self.at(key)
            result[word] = self.value(child, (*keys, word))
        for child in merged:
            if not isinstance(child, yaml.MappingNode):
                raise ConfigError("<< can only merge mappings", where=self.at(child))
            self.count(child)
            for word, value in self.mapping(child, keys).items():
                result.setdefault(word, value)
        self.open.pop()
        return result


def dotted(keys: Keys) -> str:
    """`methods.0.rank`: the path as overrides write it."""
    return ".".join(str(key) for key in keys)


def split(path: str) -> Keys:
    """The inverse of `dotted`: list entries by number."""
    return tuple(int(part) if _is_index(part) else part for part in path.split(".") if path)


def _is_index(part: str) -> bool:
    """`0` to `99999`; not `²`, which is a digit to Python, nor more digits than any list needs."""
    return part.isascii() and part.isdigit() and len(part) < 6


def parse(text: str, name: str, place: str | None = None) -> ConfigSource:
    """Parse one YAML or JSON document.

    Args:
        text: the document.
        name: file name for messages.
        place: said instead of `name:line` (the text of an override).

    Raises:
        ConfigError: it is not one well-formed document, or a key is written twice.
    """
    # Outside of strings a tab in JSON is only space, but YAML refuses it.
    loader = None
    try:
        loader = ConfigLoader(text.replace("\t", " ") if name.endswith(".json") else text)
        node = loader.get_single_node()
        walk = _NodeWalk(name, loader, place)
        if node is not None:
            walk.source.data = walk.value(node, ())
    except yaml.MarkedYAMLError as error:
        raise _broken(error, text, name, place) from None
    except (yaml.reader.ReaderError, ValueError, OverflowError) as error:
        raise ConfigError(f"this is not YAML: {str(error).splitlines()[0]}", where=name) from None
    finally:
        if loader is not None:
            loader.dispose()
    if len(walk.doubles) == 1:
        where, _, what = walk.doubles[0].partition(": ")
        raise ConfigError(what, where=where)
    if walk.doubles:
        raise ConfigError("\n".join([f"{len(walk.doubles)} keys are written twice", *walk.doubles]))
    return walk.source


_PLAIN = (
    ("could not find expected ':'", "a line is neither `key: value` nor part of a list"),
    ("mapping values are not allowed", "a second `: ` in one line; quote the value, or indent"),
    ("expected <block end>", "the indentation does not line up with the lines above"),
    ("expected ',' or", "a bracket is not closed, or a comma is missing"),
    ("found another document", "there is a second `---` document; a config is one document"),
    ("expected the node content", "a value is missing, or a bracket is not closed"),
    ("found unexpected end of stream", "a quote is not closed"),
    ("found undefined alias", "an alias (*name) has no anchor (&name) before it"),
    ("could not determine a constructor", "tags (!something) are not used in configs"),
)


def _broken(error: yaml.MarkedYAMLError, text: str, name: str, place: str | None) -> ConfigError:
    """The parser's complaint as one sentence with line and column."""
    mark = error.problem_mark or error.context_mark
    problem = error.problem or str(error)
    where = name if mark is None else f"{name}:{mark.line + 1}:{mark.column + 1}"
    if isinstance(error, ExcessError):
        return ConfigError(problem, where=place or where)
    said = next((plain for start, plain in _PLAIN if start in problem), problem)
    if mark is None:
        return ConfigError(f"broken YAML: {said}", where=place or name)
    lines = text.splitlines()
    line = lines[mark.line] if mark.line < len(lines) else ""
    if "\t" in line[: mark.column + 1]:
        said = "a tab; YAML is indented with spaces only"
    shown = f"\n  | {redact(line.strip())[:90]}" if line.strip() else ""
    return ConfigError(f"broken YAML: {said}{shown}", where=place or where)


def read(path: Path) -> ConfigSource:
    """Read and parse a config file.

    Raises:
        ConfigError: there is no such file, it is no text, or `parse` refuses it.
    """
    try:
        with path.open("rb") as file:
            data = file.read(SIZE + 1)
        if len(data) > SIZE:
            raise ConfigError(f"{path} is longer than {SIZE:,} bytes; that is no config")
        text = data.decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"there is no config file {path}", fix=_nearby(path)) from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a folder; a config is one YAML file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    return parse(text, str(path))


def _nearby(path: Path) -> str:
    """The file that was probably meant."""
    folder = path.parent
    if not folder.is_dir():
        return f"there is no folder {folder} either; you are in {Path.cwd()}"
    try:
        found = list(folder.iterdir())
    except OSError:  # may not be listed
        found = []
    names = sorted(p.name for p in found if p.suffix in {".yaml", ".yml", ".json"})
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    if near:
        return f"did you mean {folder / near[0]}?"
    return f"configs in {folder}: {', '.join(names[:6]) or 'none'}"
