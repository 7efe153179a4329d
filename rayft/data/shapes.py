"""Row -> example: what a row means, whatever its columns are called.

    shape               columns (ours)                                        becomes
    text                text                                                  Text
    alpaca              instruction, output; input, system, history, tools    Chat
    sharegpt            conversations [{from, value}]; system, tools          Chat
    messages            messages [{role, content, tool_calls, loss}]; tools   Chat
    prompt_completion   prompt, completion: strings, or lists of messages     Pair or Chat
    preference          chosen, rejected; prompt, input, conversations, ...   Preference

The user turn of alpaca is instruction + newline + input. A turn may carry `loss`, `train` or
`weight` (true/false/1/0): whether it is trained, against the default of its role. Two preference
conversations without a prompt column are prompts up to their last turn.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rayft.core.errors import ConfigError
from rayft.data.turns import SWITCHES, BadRow, Message, TurnKeys, flag, read_tools, read_turns, said

Row = Mapping[str, Any]

REQUIRED = {  # in the order of detection: the first shape whose columns are all there
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "preference": ("chosen", "rejected"),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}
_INNER = ("role", "content")  # keys inside a turn, not columns
OPTIONAL = {
    "messages": ("system", "tools", *_INNER),
    "sharegpt": ("system", "tools", *_INNER),
    "preference": ("prompt", "input", "system", "history", "conversations", "tools", *_INNER),
    "prompt_completion": ("system", "tools", *_INNER),
    "alpaca": ("input", "system", "history", "tools"),
    "text": (),
}


@dataclass(frozen=True)
class TextExample:
    """Plain text."""

    text: str


@dataclass(frozen=True)
class PromptPair:
    """Two strings."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class ChatExample:
    """A conversation. `flags[i]`: turn i is trained (True), is not (False), or its role decides;
    turns before `start` are the prompt, which a completion objective never trains by itself."""

    messages: tuple[Message, ...]
    flags: tuple[bool | None, ...]
    tools: list[Any] | None = None
    start: int = 0


@dataclass(frozen=True)
class PreferencePair:
    """A better and a worse answer to the same prompt."""

    chosen: PromptPair | ChatExample
    rejected: PromptPair | ChatExample


Example = TextExample | PromptPair | ChatExample | PreferencePair


@dataclass(frozen=True)
class RowLayout:
    """How the rows of a source are laid out: `columns` maps ours to theirs, `roles` theirs to ours
    (user, assistant, system, tool, function_call)."""

    shape: str = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)
    roles: Mapping[str, str] = field(default_factory=dict)

    @property
    def keys(self) -> TurnKeys:
        """How turns are written."""
        return TurnKeys(self.columns.get("role"), self.columns.get("content"), self.roles)

    def check(self) -> None:
        """Raises ConfigError for a column name that no shape, or not this one, has."""
        shapes = REQUIRED if self.shape == "auto" else (self.shape,)
        known = sorted({name for shape in shapes for name in (*REQUIRED[shape], *OPTIONAL[shape])})
        for name in self.columns:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1, 0.0)[0]
                what = "no shape" if self.shape == "auto" else f"shape {self.shape}"
                raise ConfigError(
                    f"data columns: {what} has no column {name!r}; did you mean {near!r}?",
                    fix=f"columns maps ours to theirs; ours: {', '.join(known)}",
                )

    def parse(self, row: Row) -> Example:
        """The example a row holds. Raises BadRow."""
        view = self._view(row)
        return _PARSERS[self.shape_of(view, row)](view, self)

    def _view(self, row: Row) -> Row:
        """The row under our names; a mapped column wins over one that has our name already."""
        renamed = {
            ours: row[theirs]
            for ours, theirs in self.columns.items()
            if theirs in row and ours not in _INNER
        }
        return {**row, **renamed} if renamed else row

    def shape_of(self, view: Row, row: Row) -> str:
        """The shape by columns that hold something (readers of tables fill the missing with None).

        Raises BadRow, listing the columns found and the shapes known."""
        present = {name for name, value in view.items() if value is not None}
        if self.shape != "auto":
            lacking = [name for name in REQUIRED[self.shape] if name not in present]
            if not lacking:
                return self.shape
            theirs = ", ".join(repr(self.columns.get(name, name)) for name in lacking)
            raise BadRow(f"{self.shape}: no column {theirs}; columns found: {_listed(row)}")
        for shape, required in REQUIRED.items():
            if present.issuperset(required):
                return shape
        raise BadRow(f"columns found: {_listed(row)}; they fit no shape")


def known_shapes() -> str:
    """One line for error messages."""
    return "; ".join(f"{shape} ({', '.join(names)})" for shape, names in REQUIRED.items())


def _listed(row: Row) -> str:
    return ", ".join(sorted(str(name) for name in row)[:12]) or "none"


# --- the shapes ---


def _text(view: Row, layout: RowLayout) -> TextExample:
    return TextExample(_string(view, "text"))


def _alpaca(view: Row, layout: RowLayout) -> ChatExample:
    turns = [*_before(view), said("user", _instruction(view, "instruction"))]
    return _chat([*turns, said("assistant", _string(view, "output"))], view)


def _sharegpt(view: Row, layout: RowLayout) -> ChatExample:
    return _chat(
        [*_system(view), *read_turns(view["conversations"], "conversations", layout.keys)], view
    )


def _messages(view: Row, layout: RowLayout) -> ChatExample:
    return _chat([*_system(view), *read_turns(view["messages"], "messages", layout.keys)], view)


def _prompt_completion(view: Row, layout: RowLayout) -> PromptPair | ChatExample:
    return _answered(view, "completion", layout)


def _preference(view: Row, layout: RowLayout) -> PreferencePair:
    return PreferencePair(_answered(view, "chosen", layout), _answered(view, "rejected", layout))


_PARSERS: dict[str, Callable[[Row, RowLayout], Example]] = {
    "text": _text,
    "alpaca": _alpaca,
    "sharegpt": _sharegpt,
    "messages": _messages,
    "prompt_completion": _prompt_completion,
    "preference": _preference,
}


def _answered(view: Row, name: str, layout: RowLayout) -> PromptPair | ChatExample:
    """The prompt of a row together with the answer in column `name`."""
    answer, prompt = view[name], view.get("prompt")
    surrounded = any(view.get(key) for key in ("system", "history", "tools", "conversations"))
    if isinstance(answer, str) and isinstance(prompt, str) and not surrounded:
        return PromptPair(_instruction(view, "prompt"), answer)
    if isinstance(answer, str):
        answered = [said("assistant", answer)]
    else:
        listed = [answer] if isinstance(answer, dict) else answer
        answered = read_turns(listed, name, layout.keys)
    if view.get("conversations"):
        turns = [*_system(view), *read_turns(view["conversations"], "conversations", layout.keys)]
    elif isinstance(prompt, str):
        turns = [*_before(view), said("user", _instruction(view, "prompt"))]
    elif prompt is not None:
        turns = [*_system(view), *read_turns(prompt, "prompt", layout.keys)]
    else:
        turns, answered = answered[:-1], answered[-1:]
    return _chat([*turns, *answered], view, start=len(turns))


def _instruction(view: Row, name: str) -> str:
    text, extra = _string(view, name), view.get("input")
    if extra is not None and not isinstance(extra, str):
        raise BadRow(f"input is not a string but {type(extra).__name__}")
    return f"{text}\n{extra}" if extra else text


def _before(view: Row) -> list[Message]:
    """System turn and history: [[user, assistant], ...]."""
    turns = _system(view)
    for pair in view.get("history") or ():
        if not (isinstance(pair, list | tuple) and [type(item) for item in pair] == [str, str]):
            raise BadRow("history is not a list of [user, assistant] strings")
        turns += [said("user", pair[0]), said("assistant", pair[1])]
    return turns


def _system(view: Row) -> list[Message]:
    system = view.get("system")
    return [said("system", system)] if isinstance(system, str) and system else []


def _chat(turns: list[Message], view: Row, start: int = 0) -> ChatExample:
    if not turns:
        raise BadRow("empty conversation")
    if len(turns) > 1 and turns[0]["role"] == turns[1]["role"] == "system":
        turns, start = turns[1:], max(start - 1, 0)  # the conversation brings its own
    flags = tuple(flag(turn) for turn in turns)
    bare = [{key: turn[key] for key in turn if key not in SWITCHES} for turn in turns]
    return ChatExample(tuple(bare), flags, read_tools(view.get("tools")), start)


def _string(view: Row, name: str) -> str:
    value = view[name]
    if not isinstance(value, str):
        raise BadRow(f"{name} is not a string but {type(value).__name__}")
    return value
