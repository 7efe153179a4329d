"""Columns and parts of a batch reach the objective unchanged: from the table through the cache, the
stream, the join of a pack and the wrappers."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from rayft.compose.evaluate import EvalTally, evaluate
from rayft.config.run import OptimSpec
from rayft.core.batch import IGNORE, Batch, Column, joined_batch
from rayft.core.protocols import LossContext, ParamGroup
from rayft.core.reduce import counts, reduce_rows, scales
from rayft.core.row_facts import RowFacts
from rayft.data import cache
from rayft.data.collate import collate, dummy
from rayft.data.stream import EvalSet
from rayft.data.table import TokenTable, joined
from rayft.storage.folder import Storage
from rayft.strategies.ddp import DdpStrategy
from tests.contracts.test_data_stream import stream, table

REFERENCE = Column("reference", "row", "float32", 0.0)
SCORE = Column("score", "token", "int16", -1)


def with_columns(corpus: TokenTable) -> TokenTable:
    """A row's reference is its document number and a half; a token's score is its place."""
    places = np.concatenate([np.arange(length) for length in corpus.lengths])
    values = {
        "reference": (np.arange(corpus.documents) + 0.5).astype(np.float32),
        "score": places.astype(np.int16),
    }
    return dataclasses.replace(corpus, columns=(REFERENCE, SCORE), values=values)


def check(batch: Batch) -> None:
    """What `with_columns` made, wherever there are tokens (ids name their documents); else fill."""
    real = torch.arange(batch.input_ids.shape[1])[None] < batch.lengths[:, None]
    score, reference = batch.columns["score"], batch.columns["reference"]
    assert score.dtype == torch.int16 and reference.dtype == torch.float32
    assert torch.equal(score[real].long(), batch.position_ids[real])
    assert (score[~real] == -1).all()
    for row, value in enumerate(reference.tolist()):
        assert value == (0 if batch.lengths[row] == 0 else int(batch.input_ids[row, 0]) - 0.5)


def test_the_stream_and_the_evaluation_carry_them():
    corpus, seen = with_columns(table()), 0
    for rank in (0, 1, 2):
        for batch in stream(corpus, global_batch=7, epochs=1).window(14, rank, 3):
            check(batch)
            seen += int((batch.lengths > 0).sum())
    assert seen == 97 - 13 * 7  # the last step, with rows for some ranks only
    for batch in EvalSet(corpus, batch=5, pad_id=0).batches(1, 2):
        check(batch)
    check(dummy(pad_id=0, packed=False, columns=corpus.columns))


def test_a_packed_row_has_values_per_token_alone():
    corpus = with_columns(table())
    with pytest.raises(ValueError, match="several documents"):
        collate(corpus, [[0, 1]], pad_id=0, packed=True)
    tokens = dataclasses.replace(corpus, columns=(SCORE,))
    batch = collate(tokens, [[0, 1], [2]], pad_id=0, packed=True)
    real = torch.arange(batch.input_ids.shape[1])[None] < batch.lengths[:, None]
    assert torch.equal(batch.columns["score"][real].long(), batch.position_ids[real])


def test_the_cache_and_joined_tables_hold_them(tmp_path):
    corpus = with_columns(table(documents=5))
    both = joined([corpus, corpus], [0, 5])
    assert both.values["reference"].tolist() == [0.5, 1.5, 2.5, 3.5, 4.5] * 2
    assert len(both.values["score"]) == len(both.ids)
    storage = Storage.open(str(tmp_path))
    cache.save(corpus, {"hash": "h"}, storage)
    again = cache.load(storage, corpus.sources, "h", [0, 1])
    assert again is not None and again.columns == corpus.columns
    for name, values in corpus.values.items():
        assert again.values[name].dtype == values.dtype
        assert np.array_equal(again.values[name], values)


def test_an_entry_without_columns_opens_as_before(tmp_path):
    storage = Storage.open(str(tmp_path))
    cache.save(table(documents=5), {"hash": "h"}, storage)
    again = cache.load(storage, ("s0", "s1"), "h", [0, 1])
    assert again is not None and again.columns == () and dict(again.values) == {}


def test_a_pack_joins_rows_of_several_lengths():
    corpus = with_columns(table())
    short, long = np.argsort(corpus.lengths)[[0, -1]].tolist()
    batches = [collate(corpus, [[one]], pad_id=0, packed=False) for one in (short, long)]
    whole = joined_batch(batches)
    check(whole)
    assert whole.trial.tolist() == [0, 1] and whole.declared == corpus.columns
    again = Batch.of(whole.to(torch.device("cpu")).inputs())
    assert again.part == 0 and torch.equal(again.columns["score"], whole.columns["score"])
    other = dataclasses.replace(batches[1], part=1)
    with pytest.raises(ValueError, match="several parts"):
        joined_batch([batches[0], other])
    plain = collate(table(), [[0]], pad_id=0, packed=False)
    with pytest.raises(ValueError, match="other columns"):
        joined_batch([batches[0], plain])


def check_facts(batch: Batch) -> RowFacts:
    """Of a batch in host memory that a wrapper has carried."""
    return dataclasses.replace(batch, declared=(REFERENCE, SCORE)).facts()


def test_the_facts_of_a_step_hold_those_per_row():
    corpus = with_columns(table())
    one = stream(corpus, global_batch=7)
    facts, seen = one.facts(2), []
    for rank in (0, 1):
        for batch in one.window(2, rank, 2):
            assert list(batch.facts().columns) == ["reference"]
            seen += batch.facts().columns["reference"][batch.lengths > 0].tolist()
    assert sorted(facts.columns["reference"].tolist()) == sorted(seen) and len(seen) == 7


def test_batches_that_were_moved_before_they_are_joined_predict_in_the_right_places():
    batches = [collate(table(), [[0], [1]], pad_id=0, packed=False).to(torch.device("cpu"))] * 2
    whole = joined_batch(batches)
    assert whole.predicting is None and whole.rows == 4
    found = whole.to(torch.device("cpu")).predicting
    following = torch.nn.functional.pad(whole.labels[:, 1:], (0, 1), value=IGNORE).flatten()
    assert found is not None and torch.equal(found, (following != IGNORE).nonzero().squeeze(1))


def test_a_column_of_truth_values_comes_back(tmp_path):
    corpus, liked = table(documents=5), Column("liked", "row", "bool", False)
    values = {"liked": np.array([True, False, True, True, False])}
    corpus = dataclasses.replace(corpus, columns=(liked,), values=values)
    storage = Storage.open(str(tmp_path))
    cache.save(corpus, {"hash": "h"}, storage)
    again = cache.load(storage, corpus.sources, "h", [0, 1])
    assert again is not None and again.values["liked"].tolist() == values["liked"].tolist()
    batch = collate(again, [[0], [1]], pad_id=0, packed=False)
    assert batch.columns["liked"].tolist() == [True, False]


class Linear:
    """A toy objective of two terms: squares of (w - reference) per row, weighted 1, and the sum of
    w times scores per token, weighted 0.25; it also measures how many rows are above 3."""

    metrics = ("loss", "above")
    terms = {"square": 1.0, "tokens": 0.25}

    def head(self, width):
        return None

    def count(self, rows):
        assert rows.columns["reference"].shape == rows.trial.shape
        tokens = rows.lengths.to(torch.float64)
        return {"square": (tokens > 0).to(torch.float64), "tokens": tokens}

    def loss(self, policy, batch, scale, context):
        assert batch.part == 3
        real = torch.arange(batch.input_ids.shape[1])[None] < batch.lengths[:, None]
        scores = (batch.columns["score"] * real).sum(dim=1).float()
        square = (policy.w - batch.columns["reference"]) ** 2 * (batch.lengths > 0)
        return {"square": square, "tokens": policy.w * scores}

    def measure(self, policy, batch, context):
        sums, count = self.loss(policy, batch, {}, context), self.count(check_facts(batch))
        above = (batch.columns["reference"] > 3).double() * count["square"]
        return {term: (sums[term], count[term]) for term in self.terms} | {
            "above": (above, count["square"])
        }


class Toy(nn.Module):
    """As compose.step.TrainStep, around one number."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(2.0))

    def forward(self, inputs, scale):
        batch, context = Batch.of(inputs), LossContext()
        if scale is None:
            return Linear().measure(self, batch, context)
        return Linear().loss(self, batch, scale, context)


def test_terms_weights_and_measures_reach_the_numbers():
    """By hand: loss = mean (w - r)^2 + w / 4 * mean score, and its gradient."""
    corpus, toy, objective = with_columns(table(documents=9)), Toy(), Linear()
    engine = DdpStrategy(OptimSpec(), "fp32", torch.device("cpu")).prepare(
        toy, [ParamGroup("w", (toy.w,))]
    )
    one = collate(corpus, [[n] for n in range(6)], pad_id=0, packed=False)
    two = collate(corpus, [[n] for n in range(6, 9)], pad_id=0, packed=False)
    window = [dataclasses.replace(batch, part=3) for batch in (one, two)]
    totals = counts(objective, [batch.facts() for batch in window])
    total = 0.0
    for batch in window:
        scale = scales(objective, batch, totals)
        loss = reduce_rows(engine.forward(batch, scale), scale)
        engine.backward(loss, last=True)
        total += float(loss.detach())
    reference, scores = corpus.values["reference"], corpus.values["score"]
    square, mean = float(((2.0 - reference) ** 2).mean()), float(scores.mean())
    assert total == pytest.approx(square + 0.25 * 2.0 * mean, rel=1e-6)
    expected = float((2 * (2.0 - reference)).mean()) + 0.25 * mean
    assert float(toy.w.grad) == pytest.approx(expected, rel=1e-6)
    found = evaluate(engine, objective, window, ("a", "b"))
    assert found["eval_loss"] == pytest.approx(total, rel=1e-6)
    assert found["eval_above"] == pytest.approx(float((reference > 3).mean()))
    assert found["eval_tokens"] == 9 and "eval_ppl" not in found
    odd = reference[1::2]  # the documents of task b
    assert found["eval_above/b"] == pytest.approx(float((odd > 3).mean()))
    tally = EvalTally(objective, ("a", "b"), trials=2)  # as a pack counts: the second trial alone
    with engine.evaluating():
        for batch in window:
            rows = {name: (s[None], c[None]) for name, (s, c) in engine.measure(batch).items()}
            tally.add(rows, batch.task, first=1)
    assert tally.metrics(1) == found and tally.metrics(0)["eval_tokens"] == 0


def test_labels_are_not_touched_by_columns():
    plain = collate(table(), [[0], [1]], pad_id=0, packed=False)
    more = collate(with_columns(table()), [[0], [1]], pad_id=0, packed=False)
    assert torch.equal(plain.labels, more.labels) and (plain.labels != IGNORE).any()
