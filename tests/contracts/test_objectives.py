"""Every objective through the same suite."""

from __future__ import annotations

import dataclasses
from typing import get_args

import pytest
import torch

from rayft.config.objectives import LmSpec, ObjectiveSpec, SftSpec
from rayft.core.batch import IGNORE, Batch
from rayft.core.protocols import LossContext
from rayft.core.reduce import counts, reduce_rows, scales
from rayft.models.policy import CausalPolicy
from rayft.objectives import IMPLEMENTATIONS, build
from tests.small import batch, llama

SPECS = [SftSpec(), LmSpec()]


def rows_of(whole: Batch, part: slice) -> Batch:
    tensors, numbers = whole.inputs()
    return Batch.of(({name: tensor[part] for name, tensor in tensors.items()}, numbers))


def gradient(model, objective, window: list[Batch]) -> tuple[float, torch.Tensor]:
    """Loss and flat gradient of one step over `window`, as the loop computes them."""
    policy = CausalPolicy(model)
    totals = counts(objective, [each.facts() for each in window])
    model.zero_grad()
    total = 0.0
    for each in window:
        scale = scales(objective, each, totals)
        loss = reduce_rows(objective.loss(policy, each, scale, LossContext()), scale)
        loss.backward()
        total += float(loss.detach())
    return total, torch.cat([param.grad.flatten() for param in model.parameters()])


def test_every_spec_of_the_menu_has_its_implementation_and_a_row():
    menu = set(get_args(get_args(ObjectiveSpec)[0]))
    assert menu == set(IMPLEMENTATIONS) == {type(spec) for spec in SPECS}


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.kind)
def test_counts_come_from_the_facts_and_match_the_terms(spec):
    objective, rows = build(spec), batch()
    counted = objective.count(rows.facts())
    assert tuple(counted) == tuple(objective.terms)
    assert counted["nll"].tolist() == (rows.labels != IGNORE).sum(dim=1).tolist()
    ones = dict.fromkeys(objective.terms, torch.ones(rows.rows))
    sums = objective.loss(CausalPolicy(llama()), rows, ones, LossContext())
    assert tuple(sums) == tuple(objective.terms)
    assert all(value.shape == (3,) and value.dtype == torch.float32 for value in sums.values())


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.kind)
def test_measures_begin_with_the_terms_of_the_loss(spec):
    objective, rows, policy = build(spec), batch(), CausalPolicy(llama())
    assert objective.metrics == spec.metrics and objective.metrics[0] == "loss"
    with torch.no_grad():
        found = objective.measure(policy, rows, LossContext())
        ones = dict.fromkeys(objective.terms, torch.ones(rows.rows))
        sums = objective.loss(policy, rows, ones, LossContext())
    assert tuple(found)[: len(objective.terms)] == tuple(objective.terms)
    for term, counted in objective.count(rows.facts()).items():
        assert torch.equal(found[term][0], sums[term]) and torch.equal(found[term][1], counted)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.kind)
def test_any_split_into_micro_batches_gives_the_same_step(spec):
    objective, model, whole = build(spec), llama(), batch(rows=4)
    loss, grad = gradient(model, objective, [whole])
    for cuts in ([0, 1, 4], [0, 1, 2, 3, 4], [0, 3, 4]):
        window = [rows_of(whole, slice(a, b)) for a, b in zip(cuts, cuts[1:], strict=False)]
        other_loss, other_grad = gradient(model, objective, window)
        assert other_loss == pytest.approx(loss, rel=1e-6)
        assert torch.allclose(other_grad, grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.kind)
def test_ignored_labels_change_nothing(spec):
    objective, rows = build(spec), batch()
    policy, ones = CausalPolicy(llama()), {"nll": torch.ones(3)}
    with torch.no_grad():
        before = objective.loss(policy, rows, ones, LossContext())["nll"]
        masked = rows.labels.clone()
        masked[0] = IGNORE
        after = objective.loss(
            policy, dataclasses.replace(rows, labels=masked), ones, LossContext()
        )["nll"]
    assert before[0] > 0 and after[0] == 0
    # fewer positions reach the head: a matrix product of another shape may add in another order
    torch.testing.assert_close(before[1:], after[1:], rtol=1e-6, atol=0)
