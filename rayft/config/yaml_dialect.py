"""The YAML that configs are written in: YAML 1.2's core schema, of which JSON is a part.

`2e-4` is a number, `no` and `off` are text (a bool field still understands them), `010` is ten and
a date is text. Tags name those types only. What no person writes is refused before it costs memory:
nesting beyond `DEPTH`, more than `VALUES` values (aliases count each time they are used), numbers
of more than `DIGITS` digits.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

SIZE = 2**18  # bytes of a config: read in under half a second, a hundred times what people write
DEPTH = 50  # lists and mappings inside each other; the menu needs 7
VALUES = 10_000  # after aliases are written out
DIGITS = 40  # of a whole number; Python itself refuses 4,300 with an error of its own

TAG = "tag:yaml.org,2002:"
_PATTERNS = (
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^[-+]?[0-9]+$", list("-+0123456789")),
    (
        "float",
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        list("-+.0123456789"),
    ),
    ("merge", r"^<<$", ["<"]),
)


class ExcessError(yaml.MarkedYAMLError):
    """Well-formed, but no config."""


class ConfigLoader(yaml.SafeLoader):
    """Composes nodes; their values are made by `scalar`."""

    yaml_implicit_resolvers: dict[str, Any] = {}

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = self._nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """As the base class, which calls itself for every level, within bounds."""
        self._depth += 1
        self._nodes += 1
        if self._depth > DEPTH:
            raise excess_depth(self.peek_event().start_mark)
        if self._nodes > 2 * VALUES:  # keys are nodes too
            raise excess_values(self.peek_event().start_mark)
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1


class _ConfigDumper(yaml.SafeDumper):
    """Quotes whatever YAML 1.1 or 1.2 would read as something else than text."""


for _name, _pattern, _first in _PATTERNS:
    for _side in (ConfigLoader, _ConfigDumper):
        _side.add_implicit_resolver(TAG + _name, re.compile(_pattern), _first)


def excess_depth(mark: yaml.Mark) -> ExcessError:
    """The refusal of deep nesting."""
    return ExcessError(None, None, f"lists and mappings more than {DEPTH} deep in each other", mark)


def excess_values(mark: yaml.Mark) -> ExcessError:
    """The refusal of too many values."""
    return ExcessError(
        None, None, f"more than {VALUES:,} values, aliases (*name) written out", mark
    )


def scalar(loader: ConfigLoader, node: yaml.ScalarNode) -> object:
    """The value of a scalar: text, a number, a bool or None.

    Raises:
        yaml.MarkedYAMLError: a tag that is not used here, or that the text does not fit; a number
            of too many digits; half of a character.
    """
    text, kind = node.value, node.tag.removeprefix(TAG)
    if kind == "str":
        return joined(text, node.start_mark)
    if kind not in ("null", "bool", "int", "float"):
        raise _tagged(node)
    fits = loader.resolve(yaml.ScalarNode, text, (True, False)).removeprefix(TAG)
    if fits != kind and (fits, kind) != ("int", "float"):
        raise ExcessError(None, None, f"{text[:40]!r} is no !!{kind}", node.start_mark)
    if kind == "int" and len(text) > DIGITS:
        raise ExcessError(None, None, f"a whole number of {len(text):,} digits", node.start_mark)
    match kind:
        case "null":
            return None
        case "bool":
            return text.lower() == "true"
        case "int":
            return int(text)
        case _:
            return float(re.sub(r"^([-+]?)\.(?=[iInN])", r"\1", text))


def check_tag(node: yaml.Node) -> None:
    """Raises yaml.MarkedYAMLError for a list or mapping that is tagged as something else."""
    if node.tag != TAG + ("seq" if isinstance(node, yaml.SequenceNode) else "map"):
        raise _tagged(node)


def _tagged(node: yaml.Node) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(None, None, "could not determine a constructor", node.start_mark)


def joined(text: str, mark: yaml.Mark) -> str:
    """JSON escapes a character beyond U+FFFF as two surrogates; YAML reads them as two."""
    if not any("\ud800" <= character <= "\udfff" for character in text):
        return text
    try:
        return text.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        raise ExcessError(
            None, None, "half of a character (\\ud800 to \\udfff come in pairs)", mark
        ) from None


def dump(data: object, *, unicode: bool = True) -> str:
    """YAML text that `parse`, and other YAML readers, read back as `data`.

    Args:
        unicode: write characters beyond ASCII as they are, not as escapes.
    """
    return yaml.dump(data, Dumper=_ConfigDumper, sort_keys=False, allow_unicode=unicode, width=1000)
