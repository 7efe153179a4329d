"""Packed and unpacked rows give the same logits and the same gradients: attention never crosses a
document, positions restart, padding disturbs nothing."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from rayft.core.batch import IGNORE, Batch
from rayft.data.collate import collate
from rayft.data.stream import TrainStream
from rayft.data.table import TableCounts, TokenTable

VOCAB = 64


def table(documents=24, longest=30) -> TokenTable:
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, longest + 1, documents)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = rng.integers(1, VOCAB, offsets[-1]).astype(np.int32)
    zeros = np.zeros(documents, np.int32)
    mask = rng.random(len(ids)) < 0.7
    return TokenTable(
        ids, mask, offsets, zeros, np.arange(documents), zeros, ("s",), (TableCounts(),)
    )


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        attn_implementation="sdpa",
    )  # fmt: skip
    return LlamaForCausalLM(config)


def logits_of(llama, batch: Batch) -> torch.Tensor:
    return llama(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits


def gradients(llama, batches: list[Batch]) -> dict[str, torch.Tensor]:
    """Of the summed loss over all targets, in the way objectives sum it."""
    llama.zero_grad()
    for batch in batches:
        logits = logits_of(llama, batch)[:, :-1]
        loss = cross_entropy(
            logits.reshape(-1, VOCAB), batch.targets().reshape(-1),
            ignore_index=IGNORE, reduction="sum",
        )  # fmt: skip
        loss.backward()
    return {name: parameter.grad.clone() for name, parameter in llama.named_parameters()}


def test_logits_of_a_document_do_not_depend_on_its_row():
    corpus, llama = table(), model()
    rows = [[0, 1, 2], [3], [4, 5], [6, 7, 8, 9]]
    with torch.no_grad():
        packed = logits_of(llama, collate(corpus, rows, pad_id=0, packed=True, multiple=8))
        for index, row in enumerate(rows):
            at = 0
            for document in row:
                end = at + corpus.length(document)
                alone = collate(corpus, [[document]], pad_id=0, packed=False)
                torch.testing.assert_close(
                    packed[index, at:end], logits_of(llama, alone)[0], atol=2e-5, rtol=1e-5
                )
                at = end


def test_gradients_of_an_epoch_are_equal():
    corpus, llama = table(), model()
    settings = {
        "table": corpus, "weights": (1.0,), "seed": 0, "micro_batch": 3, "global_batch": 500,
        "max_length": 64, "pad_id": 0, "epochs": 1.0,
    }  # fmt: skip
    packed = TrainStream(packing=True, **settings).window(1, 0, 1)
    plain = TrainStream(packing=False, **settings).window(1, 0, 1)
    assert sum(batch.rows for batch in packed) < sum(batch.rows for batch in plain)
    assert sum(batch.tokens().sum() for batch in packed) == sum(
        batch.tokens().sum() for batch in plain
    )
    mine, reference = gradients(llama, packed), gradients(llama, plain)
    for name, gradient in reference.items():
        scale = gradient.abs().max()
        torch.testing.assert_close(mine[name] / scale, gradient / scale, atol=1e-5, rtol=0)


def test_the_check_would_notice_a_leak():
    """The same rows without restarting positions give other logits."""
    corpus, llama = table(), model()
    batch = collate(corpus, [[0, 1, 2]], pad_id=0, packed=True)
    running = torch.arange(batch.input_ids.shape[1])[None]
    with torch.no_grad():
        leaked = llama(input_ids=batch.input_ids, position_ids=running, use_cache=False).logits
        assert (leaked - logits_of(llama, batch)).abs().max() > 0.05
