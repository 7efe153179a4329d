"""The order of data: a pure function of (seed, step), the same for every cut into micro-batches."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rayft import objectives
from rayft.config.objectives import LmSpec, SftSpec
from rayft.core.batch import IGNORE
from rayft.core.reduce import counts
from rayft.data.collate import collate
from rayft.data.stream import EvalSet, TrainStream, split_rows
from rayft.data.table import TableCounts, TokenTable


def table(documents=97, tasks=2, longest=40, seed=0) -> TokenTable:
    """Documents whose every token names its document; source = task."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, longest + 1, documents)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.repeat(np.arange(documents, dtype=np.int32), lengths) + 1
    mask = rng.random(len(ids)) < 0.6
    source = (np.arange(documents) % tasks).astype(np.int32)
    names = tuple(f"s{index}" for index in range(tasks))
    return TokenTable(
        ids, mask, offsets, source, np.arange(documents), source, names, (TableCounts(),) * tasks
    )


def stream(corpus=None, **changes) -> TrainStream:
    plain = {
        "table": corpus or table(),
        "weights": (1.0, 1.0),
        "seed": 3,
        "global_batch": 8,
        "micro_batch": 3,
        "max_length": 40,
        "packing": False,
        "pad_id": 0,
    }
    return TrainStream(**{**plain, **changes})


def documents_of(batches) -> Counter:
    """{document: times}, read from the tokens themselves."""
    seen: Counter = Counter()
    for batch in batches:
        starts = (batch.position_ids == 0) & (batch.input_ids > 0)
        seen.update((batch.input_ids[starts] - 1).tolist())
    return seen


def tokens_of(batches) -> Counter:
    seen: Counter = Counter()
    for batch in batches:
        seen.update(batch.input_ids[batch.input_ids > 0].tolist())
    return seen


CUTS = {
    "world": st.integers(1, 5),
    "micro": st.integers(1, 9),
    "size": st.integers(1, 20),
}


def all_ranks(source, step, world):
    windows = [source.window(step, rank, world) for rank in range(world)]
    assert len({len(window) for window in windows}) == 1
    return [batch for window in windows for batch in window]


@pytest.mark.parametrize("packing", [False, True])
@settings(deadline=None)  # machines under load
@given(
    **CUTS,
    step=st.integers(1, 9),
)
def test_any_split_sees_the_same_step(packing, world, micro, size, step):
    alone = stream(packing=packing, global_batch=size, micro_batch=size)
    split = stream(packing=packing, global_batch=size, micro_batch=micro)
    mine = all_ranks(split, step, world)
    assert all(batch.rows <= micro for batch in mine)
    assert documents_of(mine) == documents_of(alone.window(step, 0, 1))
    assert tokens_of(mine) == tokens_of(alone.window(step, 0, 1))
    targets = sum(float(batch.tokens().sum()) for batch in mine)
    assert targets == float(alone.window(step, 0, 1)[0].tokens().sum())


@pytest.mark.parametrize("packing", [False, True])
@settings(deadline=None)  # machines under load
@given(
    **CUTS,
    step=st.integers(1, 14),
    weights=st.sampled_from([(1.0, 1.0), (0.5, 1.25)]),
    epochs=st.sampled_from([None, 0.3, 1.0]),
)
def test_the_facts_of_a_step_are_those_of_the_batches_of_all_ranks(
    packing, world, micro, size, step, weights, epochs
):
    """Row by row, and so every count; a step at the end of the data, and none after it, too."""
    source = stream(
        packing=packing, global_batch=size, micro_batch=micro, weights=weights, epochs=epochs
    )
    facts = source.facts(step)
    batches = [batch.facts() for batch in all_ranks(source, step, world)]

    def by_row(some) -> zip:
        fields = (some.trained, some.lengths, some.task, some.trial)
        return zip(*(values.tolist() for values in fields), strict=True)

    wanted: Counter = Counter()
    for each in batches:
        wanted.update(by_row(each))
    dummies = {row: wanted.pop(row) for row in list(wanted) if not row[1]}
    assert all(row == (0, 0, 0, 0) for row in dummies)  # they count nothing
    assert Counter(by_row(facts)) == wanted
    for kind in (LmSpec, SftSpec):
        objective = objectives.build(kind())
        assert torch.equal(counts(objective, [facts]), counts(objective, batches))


@pytest.mark.parametrize("packing", [False, True])
def test_an_epoch_is_every_document_once(packing):
    source = stream(packing=packing, epochs=2.0)
    for epoch in (0, 1):
        assert sorted(source.plan(epoch).documents) == list(range(97))
    steps = source.steps_for(2.0)
    seen = Counter()
    for step in range(1, steps + 1):
        seen += documents_of(source.window(step, 0, 1))
    assert seen == Counter(dict.fromkeys(range(97), 2))
    assert documents_of(all_ranks(source, steps + 1, 2)) == Counter()


def test_the_last_step_of_epochs_may_be_small():
    source = stream(epochs=1.0)
    assert source.steps_for(1.0) == 13
    assert source.step_plan(13).rows == 97 - 12 * 8
    assert stream(epochs=0.5).steps_for(0.5) == 6


def test_a_global_batch_straddles_epochs():
    source = stream()
    assert source.step_plan(13).rows == 8
    later = source.step_plan(13).documents[1:]
    assert later.tolist() == source.plan(1).documents[:7].tolist()


def test_resume_needs_the_step_alone():
    through = stream(packing=True, weights=(0.5, 1.25))
    series = [through.window(step, 1, 2) for step in range(1, 40)]
    fresh = stream(packing=True, weights=(0.5, 1.25))
    for step in (39, 17, 1):
        for one, other in zip(fresh.window(step, 1, 2), series[step - 1], strict=True):
            for name, tensor in one.inputs()[0].items():
                assert torch.equal(tensor, other.inputs()[0][name])


def test_seed_and_epoch_change_the_order():
    orders = [
        stream().plan(0), stream().plan(1), stream(seed=4).plan(0),
        stream(packing=True).plan(0), stream(packing=True).plan(1),
    ]  # fmt: skip
    assert len({tuple(plan.documents.tolist()) for plan in orders}) == len(orders)


def test_weights_are_passes_per_epoch():
    source = stream(weights=(0.5, 2.25))
    sizes = Counter((np.arange(97) % 2).tolist())
    halves = []
    for epoch in (0, 1):
        drawn = Counter(source.plan(epoch).documents.tolist())
        even = {doc: n for doc, n in drawn.items() if doc % 2 == 0}
        odd = {doc: n for doc, n in drawn.items() if doc % 2 == 1}
        assert sum(even.values()) == len(even) == round(sizes[0] / 2)
        assert set(odd.values()) == {2, 3}
        assert sum(odd.values()) == 2 * sizes[1] + round(sizes[1] / 4)
        halves.append(frozenset(even))
    assert halves[0] != halves[1]


@settings(deadline=None)  # machines under load
@given(seed=st.integers(0, 50))
def test_packed_rows_are_of_one_task_and_fit(seed):
    corpus = table(seed=seed)
    source = stream(corpus, packing=True)
    plan = source.plan(0)
    for index in range(plan.rows):
        row = plan.row(index)
        assert len(set(corpus.task[row].tolist())) == 1
        assert corpus.lengths[row].sum() <= 40


def test_rows_of_a_step_are_dealt_longest_first_and_evenly():
    parts = split_rows(np.arange(10), micro_batch=4, world=2)
    assert [len(part) for part in parts] == [3, 3, 2, 2]
    assert parts[0].tolist() == [9, 8, 7]
    assert [len(part) for part in split_rows(np.ones(1), 4, 3)] == [1, 0, 0]


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_get_similar_lengths(world):
    source = stream(global_batch=24, micro_batch=2)
    windows = [source.window(1, rank, world) for rank in range(world)]
    widths = [[batch.input_ids.shape[1] for batch in window] for window in windows]
    for earlier, later in zip(
        zip(*widths, strict=True), list(zip(*widths, strict=True))[1:], strict=False
    ):
        assert min(earlier) >= max(later)


def test_a_rank_without_rows_trains_nothing():
    source = stream(global_batch=2, micro_batch=1)
    spare = source.window(1, 2, 3)
    assert [batch.tokens().sum().item() for batch in spare] == [0.0]
    assert spare[0].lengths.tolist() == [0]
    assert (spare[0].labels == IGNORE).all()


@pytest.mark.parametrize("packed", [False, True])
def test_collate(packed):
    corpus = table(documents=5)
    rows = [[0, 2], [1]] if packed else [[0], [1]]
    batch = collate(corpus, rows, pad_id=7, packed=packed, multiple=8)
    lengths = [sum(corpus.length(document) for document in row) for row in rows]
    assert batch.lengths.tolist() == lengths
    assert batch.input_ids.shape[1] == -(-max(lengths) // 8) * 8
    for index, row in enumerate(rows):
        at = 0
        for document in row:
            ids, mask = corpus.document(document)
            end = at + len(ids)
            assert batch.input_ids[index, at:end].tolist() == ids.tolist()
            wanted = [IGNORE, *np.where(mask, ids, IGNORE)[1:].tolist()]
            assert batch.labels[index, at:end].tolist() == wanted
            assert batch.position_ids[index, at:end].tolist() == list(range(len(ids)))
            at = end
        rest = batch.position_ids[index, at:].tolist()
        start = 0 if packed else at
        assert rest == list(range(start, start + len(rest)))
        assert (batch.input_ids[index, at:] == 7).all()
        assert (batch.labels[index, at:] == IGNORE).all()


@settings(deadline=None)  # machines under load
@given(world=st.integers(1, 5), size=st.integers(1, 7))
def test_evaluation_sees_every_document_once(world, size):
    corpus = table(documents=23)
    sets = [EvalSet(corpus, size, 0).batches(rank, world) for rank in range(world)]
    assert len({len(batches) for batches in sets}) == 1
    batches = [batch for batches in sets for batch in batches]
    assert documents_of(batches) == Counter(range(23))
    for batch in batches:
        assert len(set(batch.task.tolist())) == 1
        assert not batch.packed
