"""The memory of a pack: what does not fit is refused or waits, and leaves nothing behind."""

from __future__ import annotations

import pytest
import torch

from rayft.core.errors import InfeasibleError
from rayft.trials.memory import MemoryBudget, MemoryClaim, MemoryLoad, host_memory, memory_limit
from rayft.trials.types import NoRoom
from tests.packs import CPU, Lab, home_of, losses

PLAIN, DROPS, DORA = (False, False), (True, False), (False, True)


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Lab:
    return Lab(tmp_path_factory.mktemp("lab"), "train.eval_every=4", steps=8)


@pytest.fixture(scope="module")
def known(lab) -> tuple[int, int]:
    """(bytes of base and one adapter, bytes of one trial's activations)."""
    pack = lab.pack(lab.run("known"))
    claim = MemoryClaim(next(iter(pack._table.all.values())).adapter.layout.size, 4, 64, 4, PLAIN)
    whole, budget = pack._budget.need(MemoryLoad([claim])), pack._budget
    fixed = MemoryBudget(CPU, budget.base, 0).need(MemoryLoad([claim]))
    pack.close()
    return fixed, whole - fixed


def test_the_model_is_that_of_its_text():
    budget = MemoryBudget(CPU, base=1000, limit=0, per_token=10.0)
    claims = [MemoryClaim(5, 2, 30, 4, PLAIN), MemoryClaim(7, 1, 50, 4, PLAIN)]
    assert budget.need(MemoryLoad([])) == 1000
    assert (
        budget.need(MemoryLoad(claims)) == 1000 + 16 * 12 + 10 * 3 * 50
    )  # all rows padded to the longest


def test_the_first_trial_is_refused_when_its_activations_do_not_fit(lab, known):
    """Nothing is known of activations before it: it is measured before it is in."""
    fixed, activations = known
    pack = lab.pack(memory=fixed + activations // 2)
    run = lab.run("first-big")
    with pytest.raises(InfeasibleError, match="GiB"):
        pack.admit(lab.job(run))
    assert pack.trials == () and not pack._model.buckets.places()
    assert not home_of(run).exists("run.json")
    small = lab.run("first-small", "train.global_batch=1", "train.micro_batch=1")
    assert pack.admit(lab.job(small)) == 0  # the pack goes on
    pack.close()


@pytest.mark.parametrize("change", ["methods.0.dropout=0.1", "methods.0.dora=true"])
def test_who_keeps_more_than_those_before_is_measured_anew(lab, known, change):
    pack = lab.pack(lab.run(f"plain-{change[10:12]}"))
    before = pack._budget.per_token
    pack.admit(lab.job(lab.run(f"more-{change[10:12]}", change)))
    assert pack._budget.per_token > 1.05 * before
    pack.close()


def test_a_neighbour_that_turns_out_too_large_waits(lab, known):
    """It seemed to fit by what was known; the one that is in goes on as if nothing had been."""
    fixed, activations = known
    alone = lab.run("stays", where="alone")
    done = lab.pack(alone)
    run, wide = lab.run("stays"), lab.run("masks", "methods.0.dropout=0.1")
    pack = lab.pack(run)
    pack._budget.limit = pack._budget.need(MemoryLoad([c := _claim(pack), c])) + 1000
    with pytest.raises(NoRoom, match="GiB"):
        pack.admit(lab.job(wide))
    assert pack.trials == ("stays",)
    for one in (pack, done):
        one.step()
        one.close()
    assert losses(run) == losses(alone)


@pytest.mark.parametrize(("others", "error"), [(0, InfeasibleError), (1, NoRoom)])
def test_running_out_while_measuring_is_a_refusal(lab, others, error):
    pack = lab.pack(*[lab.run(f"in{index}-{others}") for index in range(others)])

    def fails(module, args, output):
        raise torch.OutOfMemoryError("allocation refused")

    hook = pack._model.step.register_forward_hook(fails)
    with pytest.raises(error, match="out of memory"):
        pack.admit(lab.job(lab.run(f"more-{others}", "methods.0.rank=8")))
    hook.remove()
    assert len(pack.trials) == others
    pack.step()
    pack.admit(lab.job(lab.run(f"more-{others}", "methods.0.rank=8")))
    pack.close()


def _claim(pack) -> MemoryClaim:
    size = next(iter(pack._table.all.values())).adapter.layout.size
    return MemoryClaim(size, 4, pack._longest, 4, PLAIN)


def test_a_kind_is_known_up_to_the_rank_that_was_measured():
    budget = MemoryBudget(CPU, 0, 0)
    budget.measure(MemoryClaim(1, 1, 1, 8, DROPS), lambda: 1)
    asked = [MemoryClaim(1, 1, 1, rank, kind) for rank, kind in ((8, DROPS), (9, DROPS), (8, DORA))]
    assert [budget.knows(claim) for claim in asked] == [True, False, False]


def test_the_memory_of_the_container_counts(tmp_path):
    machine = host_memory(tmp_path)
    assert machine > 1 << 28
    (tmp_path / "memory.max").write_text("max\n")
    assert host_memory(tmp_path) == machine
    (tmp_path / "memory.max").write_text("1000000\n")
    assert host_memory(tmp_path) == 1_000_000
    assert memory_limit(CPU, 0.25) == host_memory() // 4
