"""The turns of a conversation, as chat templates want them: role, content, tool_calls.

Roles are read under the names of OpenAI and of ShareGPT; a function_call becomes a tool call of the
assistant. A turn may carry `loss`, `train` or `weight`: whether it is trained.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]

SWITCHES = ("loss", "train", "weight")
_ROLES = {
    **{"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"},
    **{"observation": "tool", "function": "tool", "function_response": "tool"},
}


class BadRow(ValueError):
    """One row that cannot be used; the message says why."""


@dataclass(frozen=True)
class TurnKeys:
    """How turns are written: the keys of role and content where they are unusual, and `roles`,
    theirs to ours (user, assistant, system, tool, function_call)."""

    role: str | None = None
    content: str | None = None
    roles: Mapping[str, str] = field(default_factory=dict)


def said(role: str, content: str) -> Message:
    """A turn."""
    return {"role": role, "content": content}


def read_turns(value: object, name: str, keys: TurnKeys) -> list[Message]:
    """The turns in column `name`: a list of objects, or JSON text of one. Raises BadRow."""
    value = parsed(value)
    if not isinstance(value, list | tuple):
        raise BadRow(f"{name} is not a list but {type(value).__name__}")
    return [_turn(item, name, keys) for item in value]


def read_tools(value: object) -> list[Any] | None:
    """Tool descriptions: a list of objects, or JSON text of one. Raises BadRow."""
    value = parsed(value)
    if value is None or value in ("", []):
        return None
    if not isinstance(value, list):
        raise BadRow("tools is not a list of objects, nor JSON of one")
    return value


def flag(turn: Message) -> bool | None:
    """What the turn itself says about its training; None when it says nothing. Raises BadRow."""
    for name in SWITCHES:
        if name in turn:
            if turn[name] not in (True, False):
                raise BadRow(f"{name} of a turn must be true, false, 1 or 0, not {turn[name]!r}")
            return bool(turn[name])
    return None


def parsed(value: object) -> object:
    """Lists and objects that a table holds as JSON text; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        out = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return out if isinstance(out, list | dict) else value


def _turn(turn: object, name: str, keys: TurnKeys) -> Message:
    if not isinstance(turn, Mapping):
        raise BadRow(f"a turn of {name} is not an object but {type(turn).__name__}")
    role = _pick(turn, (keys.role, "role", "from"))
    content = _pick(turn, (keys.content, "content", "value"))
    if not isinstance(role, str) or not role:
        raise BadRow(f"a turn of {name} has no role")
    role, text = keys.roles.get(role, role), _content(content)
    if role == "function_call":
        return {"role": "assistant", **_called(text)}
    used = {keys.role, keys.content, "role", "from", "content", "value"}
    rest = {key: turn[key] for key in turn if key not in used and turn[key] is not None}
    if isinstance(rest.get("tool_calls"), list | tuple):
        rest["tool_calls"] = [_call(call) for call in rest["tool_calls"]]
    elif content is None:
        raise BadRow(f"a turn of {name} has no content")
    return {"role": _ROLES.get(role, role), "content": text, **rest}


def _pick(turn: Mapping[str, object], names: Iterable[str | None]) -> object:
    """The first of `names` that holds something."""
    return next((turn[name] for name in names if name and turn.get(name) is not None), None)


def _content(content: object) -> str:
    """The text of a turn: a string, or a list of text parts."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list | tuple):
        raise BadRow(f"content is not text but {type(content).__name__}")
    out = ""
    for part in content:
        if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
            raise BadRow("content has a part that is not text")
        out += part["text"]
    return out


def _called(text: str) -> Message:
    """A sharegpt function_call: JSON {name, arguments}, or a list of them; else it stays text."""
    calls = parsed(text)
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, dict) and "name" in call for call in calls):
        return {"content": text}
    return {"content": "", "tool_calls": [_call({"function": call}) for call in calls]}


def _call(call: object) -> object:
    """Arguments as an object: chat templates want it, the OpenAI format has JSON in a string."""
    if not isinstance(call, Mapping) or not isinstance(call.get("function"), Mapping):
        return call
    function = dict(call["function"])
    function["arguments"] = parsed(function.get("arguments"))
    return {"type": "function", **call, "function": function}
