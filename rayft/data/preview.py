"""A document as people can read it: pieces of text, and whether they are trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import numpy as np

from rayft.data.table import TokenTable

if TYPE_CHECKING:  # transformers takes a second to import
    from transformers import PreTrainedTokenizerBase


def pieces(
    table: TokenTable, tokenizer: PreTrainedTokenizerBase, document: int
) -> list[tuple[str, bool]]:
    """(text, trained) runs of one document, special tokens written out."""
    ids, mask = table.document(document)
    borders = [0, *(np.flatnonzero(np.diff(mask)) + 1).tolist(), len(ids)]
    return [
        (_text(tokenizer, ids[start:stop].tolist()), bool(mask[start]))
        for start, stop in zip(borders, borders[1:], strict=False)
    ]


def _text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return cast(str, tokenizer.decode(ids, skip_special_tokens=False))  # a list only for a batch
