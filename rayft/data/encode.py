"""Rendered text -> (token ids, loss mask), with the token borders where inference has them.

The text is tokenised once, and spans of characters become spans of tokens by the tokenizer's
offsets. A token that crosses the border of a span (the prompt ends in a blank that the first word
swallows) would be one that the model never sees when it is prompted: such a text is cut at the
borders and its pieces are tokenised apart. The same is done for tokenizers without offsets.

Legend: N tokens of a document, S spans.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

from rayft.data.render import RenderedText

if TYPE_CHECKING:  # transformers takes a second to import
    from transformers import PreTrainedTokenizerBase

Ids = NDArray[np.int32]  # (N,)
Mask = NDArray[np.bool_]  # (N,) True: this token is trained


def encode(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[RenderedText]
) -> list[tuple[Ids, Mask]]:
    """Token ids and loss mask of each document, in order. The first token is never a target."""
    pairs: dict[int, tuple[Ids, Mask]] = {}
    for special in (False, True):
        chosen = [index for index, item in enumerate(documents) if item.special is special]
        if not chosen:
            continue
        batch = [documents[index] for index in chosen]
        pairs.update(zip(chosen, _encode(tokenizer, batch, special), strict=True))
    return [_closed(tokenizer, *pairs[index], item) for index, item in enumerate(documents)]


def _encode(
    tokenizer: PreTrainedTokenizerBase, batch: list[RenderedText], special: bool
) -> list[tuple[Ids, Mask]]:
    if not tokenizer.is_fast:
        return [_pieces(tokenizer, item, special) for item in batch]
    encoded = tokenizer(
        [item.text for item in batch],
        add_special_tokens=special,
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # the length is checked later
    )
    out = []
    for item, ids, offsets in zip(
        batch, encoded["input_ids"], encoded["offset_mapping"], strict=True
    ):
        mask = _aligned(np.asarray(offsets, dtype=np.int64).reshape(-1, 2), item)
        pair = (np.asarray(ids, dtype=np.int32), mask)
        out.append(_pieces(tokenizer, item, special) if mask is None else pair)
    return out


def _aligned(offsets: NDArray[np.int64], item: RenderedText) -> Mask | None:
    """(N,) mask; None when a token crosses the border of a span.

    Offsets may leave out the blank that a token begins with, and are (0, 0) for added tokens: a
    token really begins where the one before it ended, unless both are bytes of one character.
    """
    mask = np.zeros(len(offsets), dtype=np.bool_)
    if not len(offsets):
        return mask
    ends = np.maximum.accumulate(offsets[:, 1])
    before = np.concatenate([[0], ends[:-1]])
    added = offsets[:, 1] == 0
    starts = np.where(added, before, np.minimum(offsets[:, 0], before))
    for start, stop in item.spans:
        for border in (start, stop):
            last = int(np.searchsorted(starts, border, side="left")) - 1
            if last >= 0 and ends[last] > border:
                return None
        first = int(np.searchsorted(starts, start, side="left"))
        mask[first : int(np.searchsorted(ends, stop, side="right"))] = True
    return mask


def _pieces(
    tokenizer: PreTrainedTokenizerBase, item: RenderedText, special: bool
) -> tuple[Ids, Mask]:
    """Tokenise between the borders of the spans; the first piece gets the special tokens."""
    borders = sorted({0, len(item.text), *(border for span in item.spans for border in span)})
    ids: list[int] = []
    mask: list[bool] = []
    for start, stop in zip(borders, borders[1:], strict=False):
        piece = tokenizer(
            item.text[start:stop], add_special_tokens=special and start == 0, verbose=False
        )["input_ids"]
        if special and start == 0 and stop < len(item.text) and piece[-1:] == _end(tokenizer):
            piece = piece[:-1]
        ids += piece
        mask += [any(a <= start and stop <= b for a, b in item.spans)] * len(piece)
    return np.asarray(ids, dtype=np.int32), np.asarray(mask, dtype=np.bool_)


def _end(tokenizer: PreTrainedTokenizerBase) -> list[object]:
    return [tokenizer.eos_token_id]


def _closed(
    tokenizer: PreTrainedTokenizerBase, ids: Ids, mask: Mask, item: RenderedText
) -> tuple[Ids, Mask]:
    """With the end-of-sequence token where the document wants one; its mask is that of the end."""
    if item.eos:
        if not len(ids) or ids[-1] != tokenizer.eos_token_id:
            eos = cast(int, tokenizer.eos_token_id)  # one token, so no list
            ids = np.append(ids, np.int32(eos))
            mask = np.append(mask, False)
        mask = mask.copy()
        mask[-1] = True
    if len(mask):
        mask[0] = False
    return ids, mask
