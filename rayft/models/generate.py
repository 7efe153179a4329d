"""Greedy completions, for samples and for exact match."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rayft.models.load import input_embeddings
from rayft.models.tokenizer import pad_id


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int,
) -> list[str]:
    """One greedy completion per prompt, without the prompt and without special tokens.

    Prompts are taken as they are (a chat template has written its special tokens already) and
    padded on the left in one batch. The key-value cache is on here and nowhere else.
    """
    if not prompts:
        return []
    rows = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    width = max(len(row) for row in rows)
    device = input_embeddings(model).device
    ids = torch.full((len(rows), width), pad_id(tokenizer), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, width - len(row) :] = torch.tensor(row)
        mask[index, width - len(row) :] = 1
    training = model.training
    model.eval()
    try:
        # every causal model has `generate`; the type of PreTrainedModel does not say so
        out = model.generate(  # pyright: ignore[reportCallIssue]  # see above
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=tokenizer.pad_token_id,
        )
    finally:
        model.train(training)
    return tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
