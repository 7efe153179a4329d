"""Completions of held-out prompts by base and tuned model, and the text of `rayft eval`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rayft.data.table import TokenTable
from rayft.models.generate import generate

LONGEST = 64  # tokens of a completion
TOGETHER = 16  # prompts generated in one batch
SHOWN = 3  # samples printed in full


@dataclass(frozen=True)
class HeldOutPrompt:
    """A held-out document cut where its first trained token stands."""

    prompt: str
    reference: str


@dataclass(frozen=True)
class ModelAnswers:
    """One model's evaluation."""

    metrics: dict[str, float]
    answers: list[str]

    def exact(self, questions: Sequence[HeldOutPrompt]) -> float:
        """Share of answers equal to the reference, blanks at the ends aside."""
        pairs = zip(self.answers, questions, strict=True)
        hits = sum(given.strip() == question.reference.strip() for given, question in pairs)
        return hits / len(questions)


def ask(table: TokenTable, tokenizer: PreTrainedTokenizerBase, count: int) -> list[HeldOutPrompt]:
    """`count` documents spread evenly over the table. The reference is the first trained stretch:
    in a conversation, the first answer."""
    chosen = np.unique(np.linspace(0, table.documents - 1, num=min(count, table.documents)))
    questions = []
    for index in chosen.astype(int):
        ids, mask = table.document(index)
        start = int(mask.argmax())
        rest = np.flatnonzero(~mask[start:])
        end = start + int(rest[0]) if len(rest) else len(ids)
        questions.append(
            HeldOutPrompt(
                cast(str, tokenizer.decode(ids[:start])),  # a list only for a batch
                cast(str, tokenizer.decode(ids[start:end], skip_special_tokens=True)),  # as above
            )
        )
    return questions


def answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: Sequence[HeldOutPrompt]
) -> list[str]:
    """Greedy completions."""
    out: list[str] = []
    for start in range(0, len(questions), TOGETHER):
        prompts = [question.prompt for question in questions[start : start + TOGETHER]]
        out += generate(model, tokenizer, prompts, LONGEST)
    return out


def report(
    tuned_is: str, questions: Sequence[HeldOutPrompt], base: ModelAnswers, tuned: ModelAnswers
) -> str:
    """A table of metrics, then a few samples."""
    lines = [f"{'held-out':<24}{'base':>12}{'tuned':>12}   ({tuned_is})"]
    for name, value in base.metrics.items():
        if name != "eval_tokens":
            lines.append(f"{name:<24}{value:>12.4f}{tuned.metrics[name]:>12.4f}")
    if questions:
        scores = (f"{measured.exact(questions):>12.1%}" for measured in (base, tuned))
        lines.append(f"{'exact match':<24}{''.join(scores)}   (of {len(questions)} generated)")
    for index, question in enumerate(questions[:SHOWN]):
        lines += [
            "",
            f"sample {index + 1}",
            f"  prompt     {_flat(question.prompt)}",
            f"  reference  {_flat(question.reference)}",
            f"  base       {_flat(base.answers[index])}",
            f"  tuned      {_flat(tuned.answers[index])}",
        ]
    return "\n".join(lines)


def _flat(text: str, width: int = 300) -> str:
    """One line, cut in the middle of nowhere but marked."""
    flat = " ".join(text.split())
    return flat if len(flat) <= width else flat[: width - 3] + "..."
