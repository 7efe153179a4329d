"""Small random models and batches for the tests."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rayft.core.batch import IGNORE, Batch

VOCAB = 160


def llama(*, tied: bool = False, seed: int = 0, **more) -> LlamaForCausalLM:
    """Two layers, hidden 32, grouped-query attention; weights large enough to matter."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        use_cache=False,
        **more,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


def saved_llama(folder: Path, **more) -> Path:
    """The same on disk."""
    llama(**more).save_pretrained(folder)
    return folder


def batch(rows: int = 3, length: int = 12, seed: int = 1, trained: float = 0.6) -> Batch:
    """Random tokens, a random part of them trained, the last row shorter."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB, (rows, length), generator=draw)
    labels = torch.where(torch.rand(rows, length, generator=draw) < trained, ids, IGNORE)
    labels[:, 0] = IGNORE
    labels[-1, length // 2 :] = IGNORE
    return Batch(
        input_ids=ids,
        labels=labels,
        position_ids=torch.arange(length).repeat(rows, 1),
        lengths=torch.tensor([length] * (rows - 1) + [length // 2]),
        task=torch.zeros(rows, dtype=torch.int64),
        trial=torch.zeros(rows, dtype=torch.int64),
        packed=False,
    )
