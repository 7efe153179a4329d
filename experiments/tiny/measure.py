"""Held-out losses of builtin:tiny, by plain transformers: the numbers in its model card.

    python experiments/tiny/measure.py [FOLDER]        (default: rayft/models/tiny; about 1 minute)

Nats per token, every row read alone, fp32. Two models are measured: FOLDER, and fresh weights from
the same config. pydocs: every token after <|bos|>, <|eos|> included. docstrings and arith: the
tokens of the completion and its <|end|>, after the chat template's prompt.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rayft.data.builtin import NAMES, rows

FOLDER = Path("rayft/models/tiny")
ROWS = 514  # of each held-out split: all of docstrings on Python 3.11, a seeded draw of the others


def encoded(name: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[list[int], int]]:
    """(tokens, how many of them are given and not scored) for each held-out row."""
    for row in rows(name, "heldout", samples=ROWS):
        if name == "pydocs":
            yield [*tokenizer(row["text"]).input_ids, tokenizer.eos_token_id], 1
            continue
        turns = [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["completion"]},
        ]
        given = tokenizer.apply_chat_template(
            turns[:1], add_generation_prompt=True, return_dict=False
        )
        yield tokenizer.apply_chat_template(turns, return_dict=False), len(given)


@torch.no_grad()
def heldout_loss(model: PreTrainedModel, samples: list[tuple[list[int], int]]) -> float:
    """Nats per scored token: one sum over all samples divided by one count."""
    total, count = 0.0, 0
    for tokens, given in samples:
        ids = torch.tensor([tokens])  # (1, T)
        logits = model(input_ids=ids).logits[0, given - 1 : -1]  # (T - given, V)
        total += torch.nn.functional.cross_entropy(logits, ids[0, given:], reduction="sum").item()
        count += len(tokens) - given
    return total / count


def main(folder: Path) -> None:
    """Print one line per corpus: fresh weights, then the weights in `folder`."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    fresh = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).eval()
    trained = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    print("corpus      fresh   trained  (nats per token)")
    for name in NAMES:
        samples = list(encoded(name, tokenizer))
        losses = heldout_loss(fresh, samples), heldout_loss(trained, samples)
        print(f"{name:10}  {losses[0]:.3f}   {losses[1]:.3f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
