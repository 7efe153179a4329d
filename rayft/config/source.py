"""Config text -> plain data, with the line of every key.

The dialect is YAML 1.2's core schema, of which JSON is a part: `2e-4` is a number, `no` and `off`
are text (a bool field still understands them), `010` is ten and a date is text. Anchors, aliases
and `<<` merges work. Duplicate keys are errors. No torch, no I/O but reading the one file.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from rayft.core.errors import ConfigError

Keys = tuple[str | int, ...]

_TAG = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}


class _Dumper(yaml.SafeDumper):
    """Quotes whatever YAML 1.1 or 1.2 would read as something else than text."""


for _name, _pattern, _first in (
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^[-+]?[0-9]+$", list("-+0123456789")),
    (
        "float",
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        list("-+.0123456789"),
    ),
    ("merge", r"^<<$", ["<"]),
):
    for _side in (_Loader, _Dumper):
        _side.add_implicit_resolver(_TAG + _name, re.compile(_pattern), _first)

_Loader.add_constructor(_TAG + "int", lambda _, node: int(node.value))
_Loader.add_constructor(
    _TAG + "float",
    lambda _, node: float(re.sub(r"^([-+]?)\.(?=[iInN])", r"\1", node.value)),
)


@dataclass
class Source:
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

    def put(self, keys: Keys, other: Source) -> None:
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


class _Walk:
    """One pass over the node tree of one document."""

    def __init__(self, name: str, loader: _Loader, place: str | None) -> None:
        self.loader, self.name, self.place = loader, name, place
        self.source = Source(name, None)
        self.doubles: list[str] = []
        self.open: list[yaml.Node] = []

    def at(self, node: yaml.Node) -> str:
        return self.place or f"{self.name}:{node.start_mark.line + 1}"

    def value(self, node: yaml.Node, keys: Keys) -> Any:
        if any(node is outer for outer in self.open):
            raise ConfigError("an alias refers to something that contains it", where=self.at(node))
        self.source.places.setdefault(keys, self.at(node))
        if isinstance(node, yaml.ScalarNode):
            result = self.loader.construct_object(node)
            if isinstance(result, str):
                return _joined(result)
            self.source.raw[keys] = node.value
            return result
        self.open.append(node)
        try:
            if isinstance(node, yaml.SequenceNode):
                return [self.value(item, (*keys, i)) for i, item in enumerate(node.value)]
            return self.mapping(node, keys)
        finally:
            self.open.pop()

    def mapping(self, node: yaml.Node, keys: Keys) -> dict[str, Any]:
        result: dict[str, Any] = {}
        first: dict[str, yaml.Node] = {}
        merged: list[yaml.Node] = []
        for key, child in node.value:
            if key.tag == _TAG + "merge":
                merged += child.value if isinstance(child, yaml.SequenceNode) else [child]
                continue
            if not isinstance(key, yaml.ScalarNode):
                raise ConfigError("a key must be a word, not a list or mapping", where=self.at(key))
            word = _joined(key.value)
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
            for word, value in self.mapping(child, keys).items():
                result.setdefault(word, value)
        return result


def _joined(text: str) -> str:
    """JSON escapes a character beyond U+FFFF as two surrogates; YAML reads them as two."""
    if not any("\ud800" <= character <= "\udfff" for character in text):
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16")


def dotted(keys: Keys) -> str:
    """`methods.0.rank`: the path as overrides write it."""
    return ".".join(str(key) for key in keys)


def split(path: str) -> Keys:
    """The inverse of `dotted`: list entries by number."""
    return tuple(int(part) if part.isdigit() else part for part in path.split(".") if path)


def parse(text: str, name: str, place: str | None = None) -> Source:
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
        loader = _Loader(text.replace("\t", " ") if name.endswith(".json") else text)
        node = loader.get_single_node()
        walk = _Walk(name, loader, place)
        if node is not None:
            walk.source.data = walk.value(node, ())
    except yaml.MarkedYAMLError as error:
        raise _broken(error, text, name, place) from None
    except (yaml.reader.ReaderError, ValueError) as error:
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
    said = next((plain for start, plain in _PLAIN if start in problem), problem)
    if mark is None:
        return ConfigError(f"broken YAML: {said}", where=place or name)
    lines = text.splitlines()
    line = lines[mark.line] if mark.line < len(lines) else ""
    if "\t" in line[: mark.column + 1]:
        said = "a tab; YAML is indented with spaces only"
    shown = f"\n  | {line.strip()[:90]}" if line.strip() else ""
    return ConfigError(
        f"broken YAML: {said}{shown}", where=place or f"{name}:{mark.line + 1}:{mark.column + 1}"
    )


def dump(data: Any) -> str:
    """YAML text that `parse`, and other YAML readers, read back as `data`."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)


def read(path: Path) -> Source:
    """Read and parse a config file.

    Raises:
        ConfigError: there is no such file, it is no text, or `parse` refuses it.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
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
    names = sorted(p.name for p in folder.iterdir() if p.suffix in {".yaml", ".yml", ".json"})
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    if near:
        return f"did you mean {folder / near[0]}?"
    return f"configs in {folder}: {', '.join(names[:6]) or 'none'}"
