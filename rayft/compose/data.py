"""The data of a run: tokenised once before any process group exists, then opened by every rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import zip_longest

from transformers import PreTrainedTokenizerBase

from rayft.compose.job import PreparedData, TaskMapper
from rayft.config.run import ModelSpec, Run
from rayft.core.address import below
from rayft.core.errors import DataError
from rayft.data.cache import DamagedCache, load, read_meta
from rayft.data.table import TokenTable
from rayft.data.tokenise import prepare
from rayft.data.work import DataShard, TokenRecipe, task_names, tokenise_shard
from rayft.models.tokenizer import load_tokenizer
from rayft.storage.folder import Storage

SEPARATOR = "+"  # between the hashes of training and held-out data


@dataclass(frozen=True)
class Corpus:
    """Tokenised training and held-out documents."""

    train: TokenTable
    eval: TokenTable | None
    tasks: tuple[str, ...]


def cache_of(run: Run) -> Storage:
    """Where tokenised data is kept."""
    return Storage.open(run.data.cache or below(run.storage, ".cache"))


def prepare_data(run: Run, mapper: TaskMapper) -> PreparedData:
    """Tokenise what is not in the cache yet; `mapper` applies a function to work items anywhere.

    Raises:
        ConfigError, DataError: before anything is trained.
    """
    tokenizer = load_tokenizer(run.model)

    def spread(shards: Sequence[DataShard], how: TokenRecipe) -> list[TokenTable]:
        return mapper(_tokenise, [(shard, how, run.model) for shard in shards])

    tables = {"train": _prepared(run, tokenizer, spread, heldout=False)}
    if run.data.eval:
        tables["eval"] = _prepared(run, tokenizer, spread, heldout=True)
    return PreparedData(
        uri=cache_of(run).uri,
        hash=SEPARATOR.join(table.digest for table in tables.values()),
        stats={split: table.summary() for split, table in tables.items()},
        bad_rows=b"".join(table.bad_rows_jsonl() for table in tables.values()),
    )


def open_corpus(run: Run, uri: str, hashes: str) -> Corpus:
    """What `prepare_data` left in the cache `uri`.

    Raises:
        DataError: it is not there any more, or damaged.
    """
    cache, digests = Storage.open(uri), hashes.split(SEPARATOR)
    tasks = task_names(run.data)
    tables = []
    for sources, digest in zip((run.data.train, run.data.eval), digests, strict=False):
        names = [source.path for source in sources]
        try:
            entry, of = cache.child(digest), [tasks.index(source.task) for source in sources]
            table, why = load(entry, names, digest, of), "is gone"
        except DamagedCache as error:
            table, why = None, f"is damaged ({error})"
        if table is None:
            raise DataError(
                f"the tokenised data {digest} in {cache.shown()} {why}",
                fix="run the same command again; it is made anew",
            )
        tables.append(table)
    return Corpus(tables[0], tables[1] if len(tables) > 1 else None, tasks)


def what_changed(uri: str, before: str, now: str) -> list[str]:
    """`what: before -> now` for two `PreparedData.hash`, as the cache `uri` remembers them.

    Files are named by their content, so a file that was only moved is no change.
    """
    lines: list[str] = []
    pairs = zip_longest(before.split(SEPARATOR), now.split(SEPARATOR), fillvalue="")
    for split, (old, new) in zip(("train", "eval"), pairs, strict=False):
        if old != new:
            first, second = (_facts(Storage.open(uri), digest) for digest in (old, new))
            keys = sorted(first.keys() | second.keys())
            differ = [key for key in keys if first.get(key) != second.get(key)]
            lines += [
                f"  data.{split}, {key}: {first.get(key, '(absent)')} -> "
                f"{second.get(key, '(absent)')}"
                for key in differ
            ]
    return lines


def _facts(cache: Storage, digest: str) -> dict[str, str]:
    """The fingerprint behind one digest, flat; {} when the cache has lost it."""
    try:
        meta = read_meta(cache.child(digest)) if digest else None
    except DamagedCache:
        meta = None
    if meta is None:
        return {}
    prints = meta["fingerprint"]
    facts = {f"recipe {key}": str(value) for key, value in prints["recipe"].items()}
    facts["tokenizer"] = prints["tokenizer"][:12]
    for source in prints["sources"]:
        facts |= {name: value[:12] for name, value in source["content"].items()}
        facts[f"samples of {', '.join(source['content'])}"] = str(source["samples"])
    return facts


def _prepared(
    run: Run,
    tokenizer: PreTrainedTokenizerBase,
    spread: Callable[[Sequence[DataShard], TokenRecipe], list[TokenTable]],
    *,
    heldout: bool,
) -> TokenTable:
    return prepare(run.data, run.objective, tokenizer, cache_of(run), heldout=heldout, run=spread)


def _tokenise(item: tuple[DataShard, TokenRecipe, ModelSpec]) -> TokenTable:
    """One work item; runs in a task of its own."""
    shard, how, model = item
    known = _tokenizer(model)  # pyright: ignore[reportArgumentType]  # frozen by pydantic, so hashable
    return tokenise_shard(shard, known, how)


@lru_cache(maxsize=1)
def _tokenizer(model: ModelSpec) -> PreTrainedTokenizerBase:
    return load_tokenizer(model)
