"""The token table of a run: from the cache if its content is known, else tokenised and cached.

The cache is a folder per content hash: over the bytes of the files, the tokenizer, and the options
that decide about tokens. A byte changed anywhere gives another hash; moving a file, a weight or a
task tag does not.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, TypedDict, cast

from rayft.config.data import DataSpec
from rayft.config.objectives import ObjectiveSpec
from rayft.core.errors import DataError
from rayft.data.cache import DamagedCache, listing, load, save
from rayft.data.sources import DataSource
from rayft.data.table import TokenTable
from rayft.data.work import (
    DataShard,
    TokenRecipe,
    merge,
    recipe,
    sources_of,
    split_work,
    task_names,
    tokenise_shard,
)
from rayft.storage.folder import Storage

if TYPE_CHECKING:  # transformers takes a second to import
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "TokenRecipe",
    "DataShard",
    "check_bad",
    "data_hash",
    "fingerprint",
    "merge",
    "prepare",
    "recipe",
    "sources_of",
    "split_work",
    "task_names",
    "tokenise_shard",
]

log = logging.getLogger(__name__)

VERSION = 1  # raise it when the same rows would become other tokens
_NAMED = 6  # bad rows that an error names


class SourceFingerprint(TypedDict):
    """What decides about the rows of one source."""

    content: dict[str, str]  # {file: hash of its bytes}
    layout: dict[str, object]
    samples: int | None


class TableFingerprint(TypedDict):
    """Everything that decides about a table, as meta.json keeps it."""

    version: int
    recipe: dict[str, object]
    tokenizer: str  # hash
    sources: list[SourceFingerprint]


def prepare(
    data: DataSpec,
    objective: ObjectiveSpec,
    tokenizer: PreTrainedTokenizerBase,
    cache: Storage,
    *,
    heldout: bool = False,
    chat_template: str | None = None,
    run: Callable[[Sequence[DataShard], TokenRecipe], Iterable[TokenTable]] | None = None,
) -> TokenTable:
    """The token table of data.train (or, `heldout`, of data.eval): from the cache if it is there,
    else tokenised by `run` (shards, recipe -> a table per shard, in order; default: here) and
    cached.

    Raises:
        ConfigError, DataError: see split_work, merge and check_bad. StorageError: the cache.
    """
    sources, how = sources_of(data, heldout=heldout), recipe(data, objective, chat_template)
    names = task_names(data)
    tasks = [names.index(source.task) for source in sources]
    prints = fingerprint(sources, tokenizer, how)
    digest = data_hash(prints)
    folder, called = cache.child(digest), [source.name for source in sources]
    table = _cached(folder, called, digest, tasks)
    if table is not None:
        listed = listing(folder)
    else:
        shards = split_work(sources, tokenizer, how)
        parts = run(shards, how) if run else (tokenise_shard(s, tokenizer, how) for s in shards)
        made = merge(called, shards, list(parts), digest)
        listed = save(made, {"hash": digest, "fingerprint": prints}, folder)
        table = made.with_tasks(tasks)
    check_bad(table, data.bad_rows, listed=listed)
    return table


def _cached(
    folder: Storage, sources: Sequence[str], digest: str, tasks: Sequence[int]
) -> TokenTable | None:
    """The table as it lies in the cache; None where it must be made, which a damaged one must."""
    try:
        return load(folder, sources, digest, tasks)
    except DamagedCache as error:
        log.warning("token cache %s cannot be used (%s): made anew", folder.shown(), error)
        return None


def check_bad(table: TokenTable, share: float, listed: str = "") -> None:
    """Refuse a table with too many bad rows (all of them are in the file `listed`), or a source
    without documents.

    Raises:
        DataError: naming the first bad rows.
    """
    total = table.total
    first = "\n".join(f"  {item.place}: {item.reason}" for item in table.bad[:_NAMED])
    if total.bad and total.bad > share * total.rows:
        more = f"\n  ... and {total.bad - _NAMED} more" if total.bad > _NAMED else ""
        raise DataError(
            f"{total.bad} of {total.rows} rows are bad, data.bad_rows allows {share:.2%}:\n"
            f"{first}{more}",
            where=f"all are in {listed}" if listed else "",
            fix="mend the rows, or raise data.bad_rows",
        )
    for name, count in zip(table.sources, table.counts, strict=True):
        if not count.documents:
            raise DataError(
                f"data source {name} gives no document: {count.rows} rows, {count.bad} bad, "
                f"{count.dropped} longer than max_length" + (f"\n{first}" if first else "")
            )


def fingerprint(
    sources: Sequence[DataSource], tokenizer: PreTrainedTokenizerBase, how: TokenRecipe
) -> TableFingerprint:
    """Everything that decides about the table, by name: {"sources": [{"content": {file: hash},
    "layout": ...}], "tokenizer": hash, "recipe": ..., "version": ...}. Two of them can be compared
    to say what changed. Local files count by their bytes; objects by size and time of change."""
    return {
        "version": VERSION,
        "recipe": asdict(how),
        "tokenizer": _tokenizer_hash(tokenizer),
        "sources": [
            {
                "content": source.rows.digests(),
                "layout": asdict(source.layout),
                "samples": source.samples,
            }
            for source in sources
        ],
    }


def data_hash(prints: TableFingerprint) -> str:
    """sha256 (16 hex digits) of a fingerprint; where the files lie does not matter."""
    bare = {**prints, "sources": [_nameless(source) for source in prints["sources"]]}
    text = json.dumps(bare, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _nameless(source: SourceFingerprint) -> dict[str, object]:
    return {**source, "content": list(source["content"].values())}


def _tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of what turns text into ids: the Rust tokenizer as JSON where there is one, else the
    vocabulary; the chat template and the special tokens."""
    if tokenizer.is_fast:
        rust = cast("Tokenizer", tokenizer.backend_tokenizer)  # transformers gives it no type
        core = json.loads(rust.to_str())
        del core["truncation"], core["padding"]  # set anew by every call
    else:
        core = tokenizer.get_vocab()
    facts = [core, tokenizer.chat_template, str(tokenizer.special_tokens_map)]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
