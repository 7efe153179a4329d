"""Every shape of row: what it becomes, what of it is trained, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers.processors import ByteLevel
from transformers import AutoTokenizer

import rayft
from rayft.core.errors import ConfigError
from rayft.data.encode import encode
from rayft.data.render import ExampleRenderer
from rayft.data.shapes import ChatExample, PreferencePair, PromptPair, RowLayout, TextExample
from rayft.data.turns import BadRow

TINY = Path(rayft.__file__).parent / "models" / "tiny"

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# like Qwen3: thoughts of turns before the last user turn are dropped, the last one has one
THINKING = (
    "{% set ns = namespace(last=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
    "{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY)


def trained(tokenizer, row, layout=None, *, template=None, train_all=False):
    """What is trained of a row, decoded run by run."""
    renderer = ExampleRenderer(
        tokenizer, train_all=train_all, text_only_fails=not train_all, chat_template=template
    )
    [(ids, mask)] = encode(tokenizer, [renderer((layout or RowLayout()).parse(row))])
    runs, open_ = [], False
    for token, on in zip(ids.tolist(), mask.tolist(), strict=True):
        if on and not open_:
            runs.append([])
        open_ = on
        if on:
            runs[-1].append(token)
    return [tokenizer.decode(run) for run in runs]


TURNS = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "2"},
]

SHAPES = {
    "alpaca": (
        {"instruction": "Add", "input": "1 1", "output": "2", "history": [["a", "b"]]},
        ["b<|end|>", "2<|end|>"],
    ),
    "sharegpt": (
        {
            "conversations": [
                {"from": "human", "value": "One?"},
                {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                {"from": "observation", "value": "1"},
                {"from": "gpt", "value": "It is 1."},
            ],
            "system": "Be short.",
            "tools": '[{"name": "f"}]',
        },
        ['{"name": "f", "arguments": {"x": 1}}<|end|>', "It is 1.<|end|>"],
    ),
    "messages": ({"messages": TURNS}, ["1<|end|>", "2<|end|>"]),
    "messages in table form": ({"messages": json.dumps(TURNS)}, ["1<|end|>", "2<|end|>"]),
    "messages with a switch": (
        {"messages": [*TURNS[:2], {**TURNS[2], "loss": False}, *TURNS[3:]]},
        ["2<|end|>"],
    ),
    "messages with weights": (
        {"messages": [*TURNS[:2], {**TURNS[2], "weight": 1}, TURNS[3], {**TURNS[4], "weight": 0}]},
        ["1<|end|>"],
    ),
    "a trained user turn": (
        {"messages": [TURNS[1], TURNS[2], {**TURNS[3], "train": True}, TURNS[4]]},
        ["1<|end|><|user|>Two?<|end|>", "2<|end|>"],
    ),
    "assistant first": (
        {"messages": [{"role": "assistant", "content": "Hi"}, TURNS[1], TURNS[2]]},
        ["Hi<|end|>", "1<|end|>"],
    ),
    "tool_calls": (
        {
            "messages": [
                TURNS[1],
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1}'}}],
                },
            ]
        },
        ['{"name": "f", "arguments": {"x": 1}}<|end|>'],
    ),
    "content in parts": (
        {"messages": [TURNS[1], {"role": "assistant", "content": [{"type": "text", "text": "1"}]}]},
        ["1<|end|>"],
    ),
    "prompt_completion": ({"prompt": "One?", "completion": "1"}, ["1<|end|>"]),
    "a completion that is JSON": ({"prompt": "[]", "completion": '{"a": 1}'}, ['{"a": 1}<|end|>']),
    "prompt_completion of turns": (
        {"prompt": TURNS[:4], "completion": TURNS[4:]},
        ["2<|end|>"],
    ),
    "preference": ({"prompt": "One?", "chosen": "1", "rejected": "2"}, ["1<|end|>"]),
    "preference of turns": (
        {"prompt": TURNS[1:2], "chosen": TURNS[2:3], "rejected": TURNS[4:]},
        ["1<|end|>"],
    ),
    "preference without prompt": (
        {"chosen": TURNS, "rejected": [*TURNS[:4], {"role": "assistant", "content": "3"}]},
        ["2<|end|>"],
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_trained_parts(tokenizer, name):
    row, expected = SHAPES[name]
    assert trained(tokenizer, row) == expected


def test_kinds():
    parse = RowLayout().parse
    assert parse({"text": "a"}) == TextExample("a")
    assert parse({"prompt": "a", "completion": "b"}) == PromptPair("a", "b")
    both = parse({"prompt": "a", "chosen": "b", "rejected": "c"})
    assert both == PreferencePair(PromptPair("a", "b"), PromptPair("a", "c"))
    chat = parse({"instruction": "a", "input": "b", "output": "c", "system": None})
    assert isinstance(chat, ChatExample)
    assert chat.messages[0] == {"role": "user", "content": "a\nb"}


def test_text_is_trained_whole_with_eos(tokenizer):
    assert trained(tokenizer, {"text": "Hello"}, train_all=True) == ["Hello<|eos|>"]


def test_train_on_prompt_keeps_what_a_switch_turns_off(tokenizer):
    row = {"messages": [*TURNS[:2], {**TURNS[2], "loss": False}, *TURNS[3:]]}
    first, second = trained(tokenizer, row, train_all=True)
    assert first == "<|system|>Be short.<|end|><|user|>One?<|end|><|assistant|>"
    assert second == "<|user|>Two?<|end|><|assistant|>2<|end|>"


def test_mapped_columns(tokenizer):
    layout = RowLayout("auto", {"prompt": "question", "completion": "answer"})
    layout.check()
    assert trained(tokenizer, {"question": "One?", "answer": "1"}, layout) == ["1<|end|>"]
    turned = RowLayout("messages", {"messages": "dialog", "role": "who", "content": "says"})
    row = {"dialog": [{"who": "human", "says": "One?"}, {"who": "bot", "says": "1"}]}
    assert trained(tokenizer, row, turned) == ["1<|end|>"]


def test_unknown_column_name_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'completion'"):
        RowLayout("prompt_completion", {"complection": "answer"}).check()


BAD = {
    "columns found: answer, question; they fit no shape": {"question": "a", "answer": "b"},
    "no assistant turn": {"messages": TURNS[:2]},
    "empty completion": {"prompt": "a", "completion": " "},
    "every trained turn is empty": {
        "messages": [TURNS[1], {"role": "assistant", "content": ""}],
    },
    "empty conversation": {"messages": []},
    "has no role": {"messages": [{"content": "a"}]},
    "has no content": {"messages": [{"role": "user"}]},
    "is not a list": {"messages": "hello"},
    "is not an object": {"messages": ["hello"]},
    "part that is not text": {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
    "output is not a string": {"instruction": "a", "output": 3},
    "loss of a turn must be": {"messages": [TURNS[1], {**TURNS[2], "loss": 0.5}]},
    "the chat template refuses it": {"messages": [{"role": "wizard", "content": "a"}, *TURNS[1:3]]},
    "invalid UTF-8": {"prompt": "a", "completion": "\udcff"},
}


@pytest.mark.parametrize("reason", BAD)
def test_bad_rows_say_why(tokenizer, reason):
    with pytest.raises(BadRow, match=reason):
        trained(tokenizer, BAD[reason])


def test_no_template_is_an_error_for_chats_only(tokenizer):
    bare = AutoTokenizer.from_pretrained(TINY)
    bare.chat_template = None
    with pytest.raises(ConfigError, match="no chat template"):
        trained(bare, {"messages": TURNS})
    assert trained(bare, {"prompt": "One? ", "completion": "Two"}) == ["Two<|eos|>"]
    with pytest.raises(ConfigError, match="have none"):
        trained(bare, {"text": "Hello"})


@pytest.mark.parametrize("trims", [False, True])
def test_prompt_tokens_are_those_of_the_prompt_alone(trims):
    """A blank at the end of the prompt must not melt into the first word of the completion, also
    where the tokenizer's offsets leave out the blank of a token (GPT-2's and Llama 3's do)."""
    bare = AutoTokenizer.from_pretrained(TINY)
    bare.chat_template = None
    if trims:
        bare.backend_tokenizer.post_processor = ByteLevel(trim_offsets=True)
    renderer = ExampleRenderer(bare, train_all=False, text_only_fails=True)
    for prompt in ("The answer is ", "The answer is", "a\n", "é"):
        [(ids, mask)] = encode(bare, [renderer(PromptPair(prompt, "the\n same"))])
        alone = bare(prompt)["input_ids"]
        assert ids[: len(alone)].tolist() == alone
        assert mask.tolist() == [False] * len(alone) + [True] * (len(ids) - len(alone))


@pytest.mark.parametrize("template", [CHATML, THINKING])
def test_other_templates(tokenizer, template):
    row = {"messages": TURNS}
    parts = trained(tokenizer, row, template=template)
    think = "<think>\n\n</think>\n\n" if template == THINKING else ""
    assert parts == ["1<|im_end|>\n", f"{think}2<|im_end|>\n"]


def test_a_template_without_an_end_gets_eos(tokenizer):
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    assert trained(tokenizer, {"messages": TURNS}, template=template)[-1] == "2\n<|eos|>"


def test_a_template_that_rewrites_the_past_is_refused(tokenizer):
    template = "{{ messages | length }}{% for m in messages %}{{ m.content }}!{% endfor %}"
    with pytest.raises(BadRow, match="in another way"):
        trained(tokenizer, {"messages": TURNS}, template=template)
