"""Documents -> Batch: right padding, labels, positions.

A document's first token is never a label, so nothing is predicted across a border. In packed rows
positions restart with every document, and the padding counts as one more document of its own: no
document can attend to it or be disturbed by it. Unpacked rows count through; causal attention never
sees the padding on the right.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from rayft.core.batch import IGNORE, Batch, Column
from rayft.data.table import TokenTable

DUMMY_LENGTH = 8  # tokens of a row that trains nothing


def collate(
    table: TokenTable,
    rows: Sequence[Sequence[int]],
    *,
    pad_id: int,
    packed: bool,
    multiple: int = 1,
) -> Batch:
    """One micro-batch.

    Args:
        table: the documents.
        rows: document numbers of each row, at least one row; several per row only if `packed`.
        pad_id: id of padding tokens (their labels are IGNORE).
        packed: whether rows may hold several documents.
        multiple: T is rounded up to a multiple of it.

    Returns:
        Batch of (B, T) with T the longest row. At least 2 tokens, so that there is a target.

    Raises:
        ValueError: the table has a column per row, and a row several documents.
    """
    lengths = [sum(table.length(document) for document in row) for row in rows]
    width = -(-max(2, *lengths) // multiple) * multiple
    ids = np.full((len(rows), width), pad_id, dtype=np.int64)
    labels = np.full((len(rows), width), IGNORE, dtype=np.int64)
    positions = np.tile(np.arange(width, dtype=np.int64), (len(rows), 1))
    columns = {column.name: column.empty(len(rows), width) for column in table.columns}
    if any(column.per == "row" for column in table.columns) and max(map(len, rows)) > 1:
        raise ValueError("a column per row, and several documents in one row")
    for index, row in enumerate(rows):
        at = 0
        for document in row:
            tokens, mask = table.document(document)
            end = at + len(tokens)
            for column in table.columns:
                where = index if column.per == "row" else (index, slice(at, end))
                columns[column.name].numpy()[where] = table.column(column, document)
            ids[index, at:end] = tokens
            labels[index, at + 1 : end] = np.where(mask, tokens, IGNORE)[1:]
            positions[index, at:] -= positions[index, at]
            at = end
        if packed and at < width:
            positions[index, at:] -= positions[index, at]
    return Batch(
        input_ids=torch.from_numpy(ids),
        labels=torch.from_numpy(labels),
        position_ids=torch.from_numpy(positions),
        lengths=torch.tensor(lengths, dtype=torch.int64),
        task=torch.tensor([int(table.task[row[0]]) for row in rows], dtype=torch.int64),
        trial=torch.zeros(len(rows), dtype=torch.int64),
        packed=packed,
        columns=columns,
        declared=table.columns,
    )


def dummy(*, pad_id: int, packed: bool, columns: Sequence[Column] = ()) -> Batch:
    """(1, DUMMY_LENGTH): a row that trains nothing, for a rank that has no rows left."""
    ids = torch.full((1, DUMMY_LENGTH), pad_id, dtype=torch.int64)
    return Batch(
        input_ids=ids,
        labels=torch.full_like(ids, IGNORE),
        position_ids=torch.arange(DUMMY_LENGTH, dtype=torch.int64)[None],
        lengths=torch.zeros(1, dtype=torch.int64),
        task=torch.zeros(1, dtype=torch.int64),
        trial=torch.zeros(1, dtype=torch.int64),
        packed=packed,
        columns={column.name: column.empty(1, DUMMY_LENGTH) for column in columns},
        declared=tuple(columns),
    )
