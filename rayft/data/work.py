"""Rows -> TokenTable: split the work, tokenise each part, merge.

Pure functions without Ray, for whoever runs the parts (see tokenise.py). What a part becomes
depends on its rows, the tokenizer and `TokenRecipe` alone, and parts are merged in the order of
sources, files and rows: the table is the same however the work was split.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

from rayft.config.data import DataSpec
from rayft.config.objectives import ObjectiveSpec
from rayft.core.errors import ConfigError, DataError
from rayft.data import table as tables
from rayft.data.encode import encode
from rayft.data.readers import RawRow, preview
from rayft.data.render import ExampleRenderer, RenderedText
from rayft.data.shapes import known_shapes
from rayft.data.sources import DataSource, SourceBlock, resolve
from rayft.data.table import BadRowEntry, TableCounts, TokenTable
from rayft.data.turns import BadRow

if TYPE_CHECKING:  # transformers takes a second to import
    from transformers import PreTrainedTokenizerBase

SHARD_BYTES = 8 << 20
_BATCH = 256  # documents tokenised at a time
_PEEKED = 20  # first rows looked at before the work starts


@dataclass(frozen=True)
class TokenRecipe:
    """What decides about tokens, besides rows and tokenizer."""

    max_length: int
    overflow: str  # cut | drop
    train_all: bool  # every token is trained, not completions only
    text_only_fails: bool  # plain text has no completion: refuse it
    chat_template: str | None = None  # replaces the tokenizer's own


@dataclass(frozen=True)
class DataShard:
    """A part of the work: one block of one source."""

    index: int  # of the source
    sources: int  # how many there are
    source: DataSource
    block: SourceBlock


def recipe(
    data: DataSpec, objective: ObjectiveSpec, chat_template: str | None = None
) -> TokenRecipe:
    """The recipe of a run; `chat_template` is jinja text, or None for the tokenizer's own."""
    return TokenRecipe(
        max_length=data.max_length,
        overflow=data.overflow,
        train_all=objective.trains_prompts,
        text_only_fails=objective.reads != "text",
        chat_template=chat_template,
    )


def task_names(data: DataSpec) -> tuple[str, ...]:
    """Every task of the run, sorted; Batch.task is an index into it."""
    return tuple(sorted({spec.task for spec in (*data.train, *data.eval)}))


def sources_of(data: DataSpec, *, heldout: bool = False) -> list[DataSource]:
    """The sources of data.train, or of data.eval. Raises ConfigError, DataError."""
    return [resolve(spec, heldout=heldout) for spec in (data.eval if heldout else data.train)]


def split_work(
    sources: Sequence[DataSource],
    tokenizer: PreTrainedTokenizerBase,
    how: TokenRecipe,
    shard_bytes: int = SHARD_BYTES,
) -> list[DataShard]:
    """The parts, in order. Looks at the first rows of every source first, so that a wrong mapping
    or objective is refused in seconds.

    Raises:
        ConfigError: text for sft, or conversations without a chat template.
        DataError: no row at the start of a source fits a shape.
    """
    renderer = _renderer(tokenizer, how)
    for source in sources:
        _check(source, renderer)
    return [
        DataShard(index, len(sources), source, block)
        for index, source in enumerate(sources)
        for block in source.blocks(shard_bytes)
    ]


def tokenise_shard(
    shard: DataShard, tokenizer: PreTrainedTokenizerBase, how: TokenRecipe
) -> TokenTable:
    """The documents and bad rows of one part; row numbers count from 0 in it.

    Raises:
        DataError: a file cannot be read at all.
    """
    renderer = _renderer(tokenizer, how)
    bad: list[BadRowEntry] = []
    documents, numbers, cut, dropped, rows = [], [], 0, 0, 0
    source = shard.source
    numbered = enumerate(source.read(shard.block))
    for batch in _batches(numbered, _BATCH):
        rows += len(batch)
        kept = list(_rendered(batch, source, renderer, bad))
        encoded = encode(tokenizer, [rendered for _, _, _, rendered in kept])
        for (number, file, raw, _), (ids, mask) in zip(kept, encoded, strict=True):
            long = len(ids) > how.max_length
            if long and how.overflow == "drop":
                dropped += 1
                continue
            ids, mask = ids[: how.max_length], mask[: how.max_length]
            if not mask.any():
                why = f"nothing to train on after cutting to max_length {how.max_length}"
                bad.append(_bad(source, number, file, raw, why if long else "nothing to train on"))
                continue
            cut += long
            documents.append((ids, mask))
            numbers.append(number)
    count = TableCounts(
        rows=rows,
        documents=len(documents),
        tokens=sum(len(ids) for ids, _ in documents),
        trained=int(sum(mask.sum() for _, mask in documents)),
        cut=cut,
        dropped=dropped,
        bad=len(bad),
    )
    counts = [count if index == shard.index else TableCounts() for index in range(shard.sources)]
    names = [source.name if index == shard.index else "" for index in range(shard.sources)]
    bad.sort(key=lambda item: item.row)
    return tables.from_documents(
        documents, numbers, source=shard.index, counts=counts, sources=names, bad=bad
    )


def merge(
    names: Sequence[str], shards: Sequence[DataShard], parts: Sequence[TokenTable], digest: str = ""
) -> TokenTable:
    """The parts as one table, in the order of `shards`; `names` are those of all sources. All
    documents have task 0 until TokenTable.with_tasks.

    Raises:
        DataError: there is no part at all.
    """
    if not parts:
        raise DataError("the data is empty: " + ", ".join(names))
    seen, bases = [0] * len(names), []
    for shard, part in zip(shards, parts, strict=True):
        bases.append(seen[shard.index])
        seen[shard.index] += part.counts[shard.index].rows
    return replace(tables.joined(parts, bases), sources=tuple(names), digest=digest)


# --- parts ---


def _renderer(tokenizer: PreTrainedTokenizerBase, how: TokenRecipe) -> ExampleRenderer:
    return ExampleRenderer(
        tokenizer,
        train_all=how.train_all,
        text_only_fails=how.text_only_fails,
        chat_template=how.chat_template,
    )


def _check(source: DataSource, renderer: ExampleRenderer) -> None:
    """Refuse a source none of whose first rows can be used."""
    first: BadRow | ConfigError | None = None
    for raw in source.peek(_PEEKED):
        if raw.row is None:
            continue
        try:
            renderer(source.layout.parse(raw.row))
            return
        except (BadRow, ConfigError) as error:
            first = first or error
    if isinstance(first, ConfigError):
        raise ConfigError(first.what, where=f"data source {source.name}", fix=first.fix)
    if first is not None:
        unfit = "columns found" in str(first)
        raise DataError(
            f"data source {source.name}: none of its first rows can be used\n  {first}",
            cause=f"known shapes: {known_shapes()}" if unfit else "",
            fix="map columns, ours: theirs, e.g. columns: {prompt: question, completion: answer}"
            if unfit
            else "",
        )


Item = TypeVar("Item")


def _batches(items: Iterator[Item], size: int) -> Iterator[list[Item]]:
    while batch := list(itertools.islice(items, size)):
        yield batch


def _rendered(
    batch: Sequence[tuple[int, tuple[str, RawRow]]],
    source: DataSource,
    renderer: ExampleRenderer,
    bad: list[BadRowEntry],
) -> Iterator[tuple[int, str, RawRow, RenderedText]]:
    """The rows that can be rendered; the others go to `bad`."""
    for number, (file, raw) in batch:
        if raw.row is None:
            bad.append(_bad(source, number, file, raw, raw.reason))
            continue
        try:
            yield number, file, raw, renderer(source.layout.parse(raw.row))
        except BadRow as error:
            bad.append(_bad(source, number, file, raw, str(error)))
        except ConfigError as error:  # one row of another shape among usable ones
            bad.append(_bad(source, number, file, raw, error.what))


def _bad(source: DataSource, number: int, file: str, raw: RawRow, reason: str) -> BadRowEntry:
    shown = raw.preview or preview(raw.row)
    return BadRowEntry(source.name, number, file, raw.line, preview(reason)[:300], shown)
