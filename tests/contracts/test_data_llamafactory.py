"""LLaMA-Factory's dataset_info.json, read as it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rayft.config.data import SourceSpec
from rayft.core.errors import ConfigError
from rayft.data.sources import resolve

INFO = {
    "alpaca": {"file_name": "alpaca.json", "num_samples": 1},
    "renamed": {
        "file_name": "renamed.json",
        "columns": {"prompt": "q", "query": "ctx", "response": "a", "system": "sys"},
    },
    "chat": {
        "file_name": "chat.jsonl",
        "formatting": "sharegpt",
        "columns": {"messages": "dialog", "tools": "apis"},
        "tags": {
            "role_tag": "who", "content_tag": "says", "user_tag": "U", "assistant_tag": "A",
            "observation_tag": "O", "function_tag": "F", "system_tag": "S",
        },
    },
    "openai": {"file_name": "openai.jsonl", "formatting": "openai"},
    "pairs": {
        "file_name": "pairs.json",
        "ranking": True,
        "columns": {"prompt": "q", "chosen": "good", "rejected": "poor"},
    },
    "chat_pairs": {
        "file_name": "chat_pairs.json",
        "ranking": True,
        "formatting": "sharegpt",
        "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"},
    },
    "corpus": {"file_name": "corpus.txt", "columns": {"prompt": "text"}},
    "scripted": {"script_url": "load_me"},
    "pictures": {"file_name": "p.json", "columns": {"images": "images"}},
}  # fmt: skip
FILES = {
    "alpaca.json": [{"instruction": "a", "input": "b", "output": "c"}] * 2,
    "renamed.json": [{"q": "a", "ctx": "b", "a": "c", "sys": "d"}],
    "chat.jsonl": {"dialog": [{"who": "U", "says": "a"}, {"who": "A", "says": "c"}], "apis": "[]"},
    "openai.jsonl": {
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "c"}]
    },
    "pairs.json": [{"q": "a", "good": "c", "poor": "d"}],
    "chat_pairs.json": [
        {
            "conversations": [{"from": "human", "value": "a"}],
            "chosen": {"from": "gpt", "value": "c"},
            "rejected": {"from": "gpt", "value": "d"},
        }
    ],
    "corpus.txt": "c",
}


@pytest.fixture
def factory(tmp_path) -> Path:
    for name, content in FILES.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / name).write_text(text)
    (tmp_path / "dataset_info.json").write_text(json.dumps(INFO))
    return tmp_path


def said(example):
    """What is asked (None: nothing) and what is answered."""
    example = getattr(example, "chosen", example)
    if hasattr(example, "messages"):
        asked = [turn["content"] for turn in example.messages if turn["role"] == "user"]
        return asked[-1], example.messages[-1]["content"]
    return getattr(example, "prompt", None), getattr(example, "completion", None) or example.text


@pytest.mark.parametrize("name", [name for name in INFO if name not in ("scripted", "pictures")])
def test_dataset_info_as_it_is(factory, name):
    source = resolve(SourceSpec(path=name, dataset_info=str(factory)))
    raws = [raw for block in source.blocks(1 << 20) for _, raw in source.read(block)]
    assert len(raws) == 1
    asked, answered = said(source.layout.parse(raws[0].row))
    assert answered == "c"
    assert asked in (("a", "a\nb") if name != "corpus" else (None,))


def test_dataset_info_refusals(factory):
    info = str(factory / "dataset_info.json")
    for name, reason in {
        "alpca": "did you mean 'alpaca'",
        "scripted": "loading script",
        "pictures": "does not use the column 'images'",
    }.items():
        with pytest.raises(ConfigError, match=reason):
            resolve(SourceSpec(path=name, dataset_info=info))
