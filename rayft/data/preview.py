"""A document as people can read it: pieces of text, and whether they are trained."""

from __future__ import annotations

from typing import Any

import numpy as np

from rayft.data.table import TokenTable


def pieces(table: TokenTable, tokenizer: Any, document: int) -> list[tuple[str, bool]]:
    """(text, trained) runs of one document, special tokens written out."""
    ids, mask = table.document(document)
    borders = [0, *(np.flatnonzero(np.diff(mask)) + 1).tolist(), len(ids)]
    return [
        (tokenizer.decode(ids[start:stop].tolist(), skip_special_tokens=False), bool(mask[start]))
        for start, stop in zip(borders, borders[1:], strict=False)
    ]
