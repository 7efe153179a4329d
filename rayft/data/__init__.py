"""Rows in, token batches out.

SourceSpec -> sources -> readers -> shapes -> render -> encode -> table -> stream -> Batch
"""

from rayft.data.collate import collate, dummy
from rayft.data.packing import pack
from rayft.data.preview import pieces
from rayft.data.stream import EvalSet, TrainStream
from rayft.data.table import Bad, Counts, TokenTable
from rayft.data.tokenise import (
    Recipe,
    Shard,
    check_bad,
    data_hash,
    fingerprint,
    merge,
    prepare,
    recipe,
    sources_of,
    split_work,
    task_names,
    tokenise_shard,
)

__all__ = [
    "Bad",
    "Counts",
    "EvalSet",
    "Recipe",
    "Shard",
    "TokenTable",
    "TrainStream",
    "check_bad",
    "collate",
    "data_hash",
    "dummy",
    "fingerprint",
    "merge",
    "pack",
    "pieces",
    "prepare",
    "recipe",
    "sources_of",
    "split_work",
    "task_names",
    "tokenise_shard",
]
