"""The data of a run: tokenised once before any process group exists, then opened by every rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from rayft.compose.job import Prepared
from rayft.config.run import ModelSpec, Run
from rayft.core.errors import DataError
from rayft.core.storage import Storage
from rayft.data import Recipe, Shard, TokenTable, prepare, task_names, tokenise_shard
from rayft.data.table import load
from rayft.models.load import load_tokenizer

Mapper = Callable[[Callable[[Any], Any], Sequence[Any]], list[Any]]
SEPARATOR = "+"  # between the hashes of training and held-out data


@dataclass(frozen=True)
class Corpus:
    """Tokenised training and held-out documents."""

    train: TokenTable
    eval: TokenTable | None
    tasks: tuple[str, ...]


def cache_of(run: Run) -> Storage:
    """Where tokenised data is kept."""
    return Storage.open(run.data.cache or f"{run.storage.rstrip('/')}/.cache")


def prepare_data(run: Run, mapper: Mapper) -> Prepared:
    """Tokenise what is not in the cache yet; `mapper` applies a function to work items anywhere.

    Raises:
        ConfigError, DataError: before anything is trained.
    """
    tokenizer = load_tokenizer(run.model)

    def spread(shards: Sequence[Shard], how: Recipe) -> list[TokenTable]:
        return mapper(_tokenise, [(shard, how, run.model) for shard in shards])

    tables = {"train": _prepared(run, tokenizer, spread, heldout=False)}
    if run.data.eval:
        tables["eval"] = _prepared(run, tokenizer, spread, heldout=True)
    return Prepared(
        uri=cache_of(run).uri,
        hash=SEPARATOR.join(table.digest for table in tables.values()),
        stats={split: table.summary() for split, table in tables.items()},
        bad_rows=b"".join(table.bad_rows_jsonl() for table in tables.values()),
    )


def open_corpus(run: Run, uri: str, hashes: str) -> Corpus:
    """What `prepare_data` left in the cache `uri`.

    Raises:
        DataError: it is not there any more.
    """
    cache, digests = Storage.open(uri), hashes.split(SEPARATOR)
    tasks = task_names(run.data)
    tables = []
    for sources, digest in zip((run.data.train, run.data.eval), digests, strict=False):
        names = [source.path for source in sources]
        table = load(cache.child(digest), names, digest, [tasks.index(s.task) for s in sources])
        if table is None:
            raise DataError(
                f"the tokenised data {digest} is gone from {cache.uri}",
                fix="run the same command again; it is made anew",
            )
        tables.append(table)
    return Corpus(tables[0], tables[1] if len(tables) > 1 else None, tasks)


def _prepared(
    run: Run, tokenizer: PreTrainedTokenizerBase, spread: Any, *, heldout: bool
) -> TokenTable:
    return prepare(run.data, run.objective, tokenizer, cache_of(run), heldout=heldout, run=spread)


def _tokenise(item: tuple[Shard, Recipe, ModelSpec]) -> TokenTable:
    """One work item; runs in a task of its own."""
    shard, how, model = item
    return tokenise_shard(shard, _tokenizer(model), how)


@lru_cache(maxsize=1)
def _tokenizer(model: ModelSpec) -> PreTrainedTokenizerBase:
    return load_tokenizer(model)
