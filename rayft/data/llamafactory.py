"""LLaMA-Factory's dataset_info.json, read as it is: {name: {where, formatting, columns, tags}}.

Source: the field names and defaults of LLaMA-Factory 0.9 (data/README.md there). Left out: datasets
that come as a script, image, video and audio columns, and kto_tag (each refused with a sentence).
"""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayft.config.data import SourceSpec
from rayft.core.errors import ConfigError, DataError
from rayft.data.files import missing, readable
from rayft.data.shapes import RowLayout

_COLUMNS = {"system", "tools", "history", "chosen", "rejected"}  # named alike on both sides
_ALPACA = {"prompt": "instruction", "query": "input", "response": "output"}
_TAGS = {
    "user_tag": ("human", "user"),
    "assistant_tag": ("gpt", "assistant"),
    "observation_tag": ("observation", "tool"),
    "function_tag": ("function_call", "function_call"),
    "system_tag": ("system", "system"),
}
_REFUSED = {
    "script_url": "is a loading script, which rayft never runs; give the data files",
    "ms_hub_url": "lies on ModelScope only; give hf_hub_url or file_name",
    "om_hub_url": "lies on Modelers only; give hf_hub_url or file_name",
}
_KNOWN = {
    *("file_name", "hf_hub_url", "cloud_file_name", "formatting", "ranking", "subset", "split"),
    *("folder", "num_samples", "columns", "tags", "file_sha1", *_REFUSED),
}


@dataclass(frozen=True)
class DatasetEntry:
    """One dataset of the file. `path` is relative to `base` where it names a file."""

    path: str
    hub: bool
    base: Path
    layout: RowLayout
    subset: str | None
    split: str | None
    folder: str | None
    samples: int | None


def entry(spec: SourceSpec) -> DatasetEntry:
    """The dataset `spec.path` of the file `spec.dataset_info` (or of the folder that holds it).

    Raises:
        ConfigError: no such name, or a kind of dataset that rayft does not read.
        DataError: no such file, or it holds no JSON mapping.
    """
    file = Path(spec.dataset_info or ".").expanduser()
    file = file / "dataset_info.json" if file.is_dir() else file
    if not file.is_file():
        raise missing(str(file), file.absolute())
    try:
        with readable(str(file)):
            table = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} is not JSON", where=str(error)) from error
    if not isinstance(table, dict) or not isinstance(table.get(spec.path, {}), dict):
        raise DataError(f"{file} is no mapping {{name: {{file_name: ...}}}}")
    if spec.path not in table:
        near = difflib.get_close_matches(spec.path, table, 1, 0.0)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{file} has no dataset {spec.path!r}{hint}", where=str(file))
    return _entry(spec.path, table[spec.path], file)


def _entry(name: str, info: dict[str, Any], file: Path) -> DatasetEntry:
    hub = info.get("hf_hub_url")
    path = hub or info.get("cloud_file_name") or info.get("file_name")
    for key, why in _REFUSED.items():
        if key in info and not (path and key != "script_url"):
            raise ConfigError(f"dataset {name!r} {why}", where=str(file))
    for key in info:
        if key not in _KNOWN:
            raise ConfigError(f"dataset {name!r}: rayft does not know {key!r}", where=str(file))
    if not path:
        raise ConfigError(f"dataset {name!r} names no file_name, hf_hub_url", where=str(file))
    return DatasetEntry(
        path=path,
        hub=bool(hub),
        base=file.absolute().parent,
        layout=_layout(name, info, file),
        subset=info.get("subset"),
        split=info.get("split"),
        folder=info.get("folder"),
        samples=info.get("num_samples"),
    )


def _layout(name: str, info: dict[str, Any], file: Path) -> RowLayout:
    formatting, ranking = info.get("formatting", "alpaca"), bool(info.get("ranking"))
    columns, tags = info.get("columns", {}), info.get("tags", {})
    known = {*_COLUMNS, *_ALPACA, "messages"}
    for key in columns:
        if key not in known:
            raise ConfigError(
                f"dataset {name!r}: rayft does not use the column {key!r}",
                where=str(file),
                fix=f"known: {', '.join(sorted(known))}",
            )
    shared = {key: columns[key] for key in columns if key in _COLUMNS}
    if formatting == "alpaca":
        return _alpaca(columns, shared, ranking)
    if formatting not in ("sharegpt", "openai"):
        raise ConfigError(f"dataset {name!r}: unknown formatting {formatting!r}", where=str(file))
    plain = formatting == "openai"
    inner = {
        "role": tags.get("role_tag", "role" if plain else "from"),
        "content": tags.get("content_tag", "content" if plain else "value"),
    }
    turns = columns.get("messages", "messages" if plain else "conversations")
    roles = {tags.get(tag, usual): ours for tag, (usual, ours) in _TAGS.items()}
    if ranking:
        return RowLayout("preference", {"conversations": turns, **shared, **inner}, roles)
    shape = "messages" if plain else "sharegpt"
    return RowLayout(
        shape, {"messages" if plain else "conversations": turns, **shared, **inner}, roles
    )


def _alpaca(columns: dict[str, str], shared: dict[str, str], ranking: bool) -> RowLayout:
    """prompt, query and response are theirs for instruction, input and output. A dataset that maps
    a prompt alone (LLaMA-Factory's pre-training sets) is text."""
    if set(columns) == {"prompt"}:
        return RowLayout("text", {"text": columns["prompt"]})
    named = {theirs: columns.get(theirs, usual) for theirs, usual in _ALPACA.items()}
    if ranking:
        return RowLayout(
            "preference", {"prompt": named["prompt"], "input": named["query"], **shared}
        )
    ours = {_ALPACA[theirs]: column for theirs, column in named.items()}
    return RowLayout("alpaca", {**ours, **shared})
