"""builtin:* corpora and the builtin:tiny assets: counts, splits, tokenizer, template, weights."""

import itertools
import random
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import rayft.data.builtin as builtin

FOLDER = Path(builtin.__file__).parents[1] / "models" / "tiny"
CORPORA = list(itertools.product(builtin.NAMES, builtin.SPLITS))
HELDOUT_LOSS_BOUND = 4.2  # nats per token; ln 2048 = 7.62 is what fresh weights give


@pytest.fixture(scope="module")
def corpora():
    return {key: list(builtin.rows(*key)) for key in CORPORA}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


# --- corpora ---


@pytest.mark.parametrize(
    ("name", "split", "keys", "least", "most"),
    [
        ("pydocs", "train", {"text"}, 12_000, 16_000),
        ("pydocs", "heldout", {"text"}, 1_200, 2_000),
        ("docstrings", "train", {"prompt", "completion"}, 4_200, 5_500),
        ("docstrings", "heldout", {"prompt", "completion"}, 400, 800),
        ("arith", "train", {"prompt", "completion", "answer"}, 24_256, 24_256),
        ("arith", "heldout", {"prompt", "completion", "answer"}, 2_678, 2_678),
    ],
)
def test_counts_and_columns(corpora, name, split, keys, least, most):
    made = corpora[name, split]
    assert least <= len(made) <= most
    assert all(row.keys() == keys and all(row.values()) for row in made)


@pytest.mark.parametrize("name", builtin.NAMES)
def test_rows_depend_on_the_seed_only_by_order(corpora, name):
    first = corpora[name, "heldout"]
    again = list(builtin.rows(name, "heldout", seed=0))
    other = list(builtin.rows(name, "heldout", seed=1))
    assert first == again
    assert first != other

    def identity(row):
        return tuple(row.values())

    assert sorted(first, key=identity) == sorted(other, key=identity)


@pytest.mark.parametrize("name", builtin.NAMES)
def test_samples_is_a_prefix(corpora, name):
    assert list(builtin.rows(name, "heldout", samples=7)) == corpora[name, "heldout"][:7]
    assert list(builtin.rows(name, "heldout", samples=0)) == []


@pytest.mark.parametrize("name", ["docstrings", "arith"])
def test_no_prompt_is_in_both_splits(corpora, name):
    train = [row["prompt"] for row in corpora[name, "train"]]
    heldout = [row["prompt"] for row in corpora[name, "heldout"]]
    assert len(set(train)) == len(train)
    assert set(train).isdisjoint(heldout)


def test_pydocs_splits_share_only_licence_texts(corpora):
    train = {row["text"] for row in corpora["pydocs", "train"]}
    heldout = [row["text"] for row in corpora["pydocs", "heldout"]]
    shared = [text for text in heldout if text in train and len(text) > 100]
    assert all(line.startswith("#") for text in shared for line in text.split("\n"))
    assert len(shared) < 5


def test_heldout_modules_are_absent_from_pydocs(corpora):
    """The code of a held-out pair's module is in no pydocs row, in either split.

    Looked for by the three longest lines of every such module.
    """
    pattern = re.compile(r"of the module (\S+) do\?")
    paths = dict(builtin._modules())
    text = "\n".join(row["text"] for split in builtin.SPLITS for row in corpora["pydocs", split])

    def modules(split):
        return {pattern.search(row["prompt"])[1] for row in corpora["docstrings", split]}

    def occurs(module):
        lines = {line.strip() for line in paths[module].read_text("utf-8").split("\n")}
        return all(line in text for line in sorted(lines, key=len)[-3:])

    heldout, train = modules("heldout"), sorted(modules("train"))
    assert len(heldout) > 20
    assert [module for module in heldout if occurs(module)] == []
    assert sum(map(occurs, train[:20])) > 15  # the probe does find modules that are there
    packages = {module.split(".")[0] for module in heldout}
    assert packages.isdisjoint(module.split(".")[0] for module in train)


def test_arith_answers_are_right(corpora):
    for row in corpora["arith", "heldout"] + corpora["arith", "train"][:3000]:
        numbers = [int(number) for number in re.findall(r"\d+", row["prompt"])]
        if "+" in row["prompt"]:
            expected = sum(numbers)
        elif "-" in row["prompt"]:
            expected = numbers[0] - numbers[1]
        elif "*" in row["prompt"]:
            expected = numbers[0] * numbers[1]
        elif "larger" in row["prompt"]:
            expected = max(numbers)
        else:
            expected = 2 * numbers[-1] - numbers[-2]
        assert row["answer"] == str(expected)
        assert str(expected) in re.findall(r"\d+", row["completion"])


def test_a_few_arith_rows_show_every_kind():
    prompts = [row["prompt"] for row in builtin.rows("arith", "train", seed=5, samples=5)]
    assert len({re.sub(r"\d+", "", prompt) for prompt in prompts}) == 5


@pytest.mark.parametrize(
    ("name", "split", "nearest"),
    [("pydoc", "train", "pydocs"), ("aritmetic", "train", "arith"), ("arith", "held", "heldout")],
)
def test_unknown_names_are_refused_with_the_nearest(name, split, nearest):
    with pytest.raises(ValueError, match=f"did you mean '{nearest}'"):
        builtin.rows(name, split)


def test_negative_samples_are_refused():
    with pytest.raises(ValueError, match="samples"):
        builtin.rows("arith", "train", samples=-1)


# --- tokenizer and chat template ---


@pytest.mark.parametrize(
    "text",
    [
        "def f(x):\n    return x + 12345\n\n\n\ttab  two",
        "h\u00e9llo \u2713 \u6f22\u5b57 \U0001f600 e\u0301 \u200b\u00a0 \r\n",
        " leading and trailing ",
        "",
    ],
)
def test_text_survives_the_tokenizer(tokenizer, text):
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == text


def test_random_unicode_survives_the_tokenizer(tokenizer):
    draw = random.Random(0)
    for _ in range(200):
        points = (draw.randrange(1, 0xD800) for _ in range(20))
        text = "".join(chr(point) for point in points)
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_vocabulary_and_special_tokens(tokenizer):
    config = AutoConfig.from_pretrained(FOLDER)
    assert len(tokenizer) == config.vocab_size == 2048
    assert tokenizer.bos_token_id == config.bos_token_id == 0
    assert tokenizer.eos_token_id == config.eos_token_id == 1
    assert tokenizer.pad_token_id == config.pad_token_id == 2
    assert len(tokenizer("<|system|><|user|><|assistant|><|tool|><|end|>").input_ids) == 6


MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi \n"},
    {"role": "assistant", "content": "\n\nHello there"},
    {"role": "user", "content": [{"type": "text", "text": "1 + "}, {"type": "text", "text": "2?"}]},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}],
    },
    {"role": "tool", "content": "3"},
    {"role": "assistant", "content": "It is 3."},
]


@pytest.mark.parametrize("tokenize", [False, True], ids=["text", "tokens"])
@pytest.mark.parametrize("tools", [None, [{"type": "function", "function": {"name": "add"}}]])
def test_a_prefix_of_the_messages_renders_to_a_prefix(tokenizer, tokenize, tools):
    def render(messages, **more):
        return tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=tokenize, return_dict=False, **more
        )

    whole = render(MESSAGES)
    for count in range(1, len(MESSAGES)):
        begun = render(MESSAGES[:count])
        assert whole[: len(begun)] == begun
        if MESSAGES[count]["role"] == "assistant":
            asked = render(MESSAGES[:count], add_generation_prompt=True)
            assert len(asked) > len(begun)
            assert whole[: len(asked)] == asked


def test_assistant_mask_is_the_reply_and_its_end(tokenizer):
    made = tokenizer.apply_chat_template(
        MESSAGES[:3], return_dict=True, return_assistant_tokens_mask=True
    )
    chosen = [i for i, keep in zip(made.input_ids, made.assistant_masks, strict=True) if keep]
    assert tokenizer.decode(chosen) == "\n\nHello there<|end|>"


def test_an_unknown_role_is_refused(tokenizer):
    with pytest.raises(Exception, match="unknown role robot"):
        tokenizer.apply_chat_template([{"role": "robot", "content": "x"}], tokenize=False)


# --- weights ---


def _heldout_loss(model, tokenizer, texts):
    """Nats per token over `texts`, each row read alone: <|bos|> text <|eos|>."""
    total = count = 0
    for text in texts:
        ids = torch.tensor([[*tokenizer(text).input_ids, tokenizer.eos_token_id]])  # (1, T)
        with torch.no_grad():
            loss = model(input_ids=ids, labels=ids).loss
        total += loss.item() * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    return total / count


def test_the_weights_are_trained(tokenizer):
    config = AutoConfig.from_pretrained(FOLDER)
    texts = [row["text"] for row in builtin.rows("pydocs", "heldout", samples=48)]
    torch.manual_seed(0)
    fresh = AutoModelForCausalLM.from_config(config)
    assert _heldout_loss(fresh, tokenizer, texts) > HELDOUT_LOSS_BOUND
    model = AutoModelForCausalLM.from_pretrained(FOLDER)
    assert model.dtype == torch.float32
    assert 1.9e6 < sum(parameter.numel() for parameter in model.parameters()) < 2.1e6
    assert _heldout_loss(model, tokenizer, texts) < HELDOUT_LOSS_BOUND
    assert (FOLDER / "model.safetensors").stat().st_size < 5_000_000


def test_generation_stops_at_either_end_token():
    model = AutoModelForCausalLM.from_pretrained(FOLDER)
    assert model.generation_config.eos_token_id == [1, 7]
