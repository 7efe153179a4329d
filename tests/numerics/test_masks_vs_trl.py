"""Token ids and loss masks against TRL's own preparation of the same rows."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
import trl
from datasets import Dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

import rayft
from rayft.core.batch import IGNORE
from rayft.data.encode import encode
from rayft.data.render import ExampleRenderer
from rayft.data.shapes import RowLayout
from rayft.data.turns import BadRow

SHIPPED = Path(trl.__file__).parent / "chat_templates"  # with generation tags: a second opinion
TINY = Path(rayft.__file__).parent / "models" / "tiny"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = ["the", "quick", "fox,", "naïve", "café", "東京", "1234", "\n\n", "def f(x):", "", "end"]


def said(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(1, 30))).strip() or "ok"


def chats(count: int, *, turns: int) -> list[list[dict[str, str]]]:
    rng = random.Random(0)
    roles = ["user", "assistant"] * turns
    out = []
    for _ in range(count):
        opening = [{"role": "system", "content": said(rng)}] if rng.random() < 0.5 else []
        out.append([*opening, *({"role": role, "content": said(rng)} for role in roles)])
    return out


def theirs(rows, tokenizer, tmp_path, **options):
    """(ids, labels) of TRL's SFTTrainer for each row."""
    tiny = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_attention_heads=1, **tiny))
    args = SFTConfig(
        output_dir=str(tmp_path), report_to="none", max_length=None, use_cpu=True, bf16=False,
        **options,
    )  # fmt: skip
    trainer = SFTTrainer(
        model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    batches = [trainer.data_collator([row]) for row in trainer.train_dataset]
    return [(batch["input_ids"][0], batch["labels"][0]) for batch in batches]


def ours(rows, tokenizer, *, train_all=False):
    renderer = ExampleRenderer(tokenizer, train_all=train_all, text_only_fails=not train_all)
    pairs = encode(tokenizer, [renderer(RowLayout().parse(row)) for row in rows])
    tensors = [(torch.from_numpy(ids).long(), torch.from_numpy(mask)) for ids, mask in pairs]
    return [(ids, torch.where(mask, ids, IGNORE)) for ids, mask in tensors]


def assert_same(mine, reference):
    assert len(mine) == len(reference) > 0
    for (ids, labels), (their_ids, their_labels) in zip(mine, reference, strict=True):
        assert ids.tolist() == their_ids.tolist()
        # the first token is never a target; TRL leaves it in the labels, where nothing reads it
        assert labels[1:].tolist() == their_labels[1:].tolist()
        assert (labels[1:] != IGNORE).any()


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY)


def test_assistant_only(tokenizer, tmp_path):
    rows = [{"messages": chat} for chat in chats(40, turns=3)]
    reference = theirs(rows, tokenizer, tmp_path, assistant_only_loss=True)
    assert_same(ours(rows, tokenizer), reference)


@pytest.mark.parametrize(
    "name",
    [
        "cohere2",
        "gemma3",
        "glm4moe",
        "lfm2",
        "llama3",
        "qwen2_5_vl",
        "qwen3",
        "qwen3_instruct_2507",
    ],
)
def test_prefix_rendering_finds_what_generation_tags_mark(tokenizer, name):
    """Templates of real models, as TRL tags them."""
    tokenizer.chat_template = (SHIPPED / f"{name}_training.jinja").read_text()
    for chat in chats(20, turns=3):
        marked = tokenizer.apply_chat_template(
            chat, return_assistant_tokens_mask=True, return_dict=True
        )
        [(ids, labels)] = ours([{"messages": chat}], tokenizer)
        assert ids.tolist() == marked["input_ids"]
        assert (labels[1:] != IGNORE).int().tolist() == marked["assistant_masks"][1:]


@pytest.mark.parametrize(
    ("name", "parts"),
    {
        "phi3": ["1<|end|>\n", "2<|end|>\n<|eos|>"],
        "gptoss": ["<|channel|>final<|message|>1<|end|>", "<|channel|>final<|message|>2<|return|>"],
        "qwen3": ["1<|im_end|>\n", "<think>\n\n</think>\n\n2<|im_end|>\n"],
        "deepseekv3": ["1<｜end▁of▁sentence｜>", "2<｜end▁of▁sentence｜>"],
    }.items(),
)
def test_templates_that_render_the_past_in_another_way(tokenizer, name, parts):
    template = (SHIPPED / f"{name}.jinja").read_text()
    turns = [("user", "One?"), ("assistant", "1"), ("user", "Two?"), ("assistant", "2")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    render = ExampleRenderer(
        tokenizer, train_all=False, text_only_fails=True, chat_template=template
    )
    rendered = render(RowLayout().parse(row))
    assert [rendered.text[start:stop] for start, stop in rendered.spans] == parts


def test_a_template_that_drops_the_words_is_refused(tokenizer):
    template = (SHIPPED / "smolvlm.jinja").read_text()  # wants content in parts
    render = ExampleRenderer(
        tokenizer, train_all=False, text_only_fails=True, chat_template=template
    )
    with pytest.raises(BadRow, match="leaves out what turn 1 says"):
        render(RowLayout().parse({"prompt": "One?", "completion": "1"}))


@pytest.mark.parametrize("template", [None, CHATML])
def test_completion_only_of_turns(tokenizer, tmp_path, template):
    tokenizer.chat_template = template or tokenizer.chat_template
    rows = [{"prompt": chat[:-1], "completion": chat[-1:]} for chat in chats(40, turns=2)]
    reference = theirs(rows, tokenizer, tmp_path, completion_only_loss=True)
    assert_same(ours(rows, tokenizer), reference)


def test_completion_only_of_strings(tokenizer, tmp_path):
    tokenizer.chat_template = None  # with a template we make turns of strings, TRL does not
    rng = random.Random(1)
    rows = [{"prompt": said(rng) + "\nAnswer:", "completion": " " + said(rng)} for _ in range(40)]
    reference = theirs(rows, tokenizer, tmp_path, completion_only_loss=True)
    assert_same(ours(rows, tokenizer), reference)


def test_whole_text(tokenizer, tmp_path):
    rng = random.Random(2)
    rows = [{"text": said(rng)} for _ in range(40)]
    assert_same(ours(rows, tokenizer, train_all=True), theirs(rows, tokenizer, tmp_path))
