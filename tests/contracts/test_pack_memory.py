"""The memory of a pack: what does not fit is refused or waits, and leaves nothing behind."""

from __future__ import annotations

import pytest
import torch

from rayft.core.errors import InfeasibleError
from rayft.trials.room import Claim, Room, everything, host_memory
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
    claim = Claim(next(iter(pack._slots.values())).row.layout.size, 4, 64, 4, PLAIN)
    whole, room = pack._room.need([claim]), pack._room
    fixed = Room(CPU, room.base, 0).need([claim])
    pack.close()
    return fixed, whole - fixed


def test_the_model_is_that_of_its_text():
    room = Room(CPU, base=1000, limit=0, per_token=10.0)
    claims = [Claim(5, 2, 30, 4, PLAIN), Claim(7, 1, 50, 4, PLAIN)]
    assert room.need([]) == 1000
    assert room.need(claims) == 1000 + 16 * 12 + 10 * 3 * 50  # all rows padded to the longest


def test_the_first_trial_is_refused_when_its_activations_do_not_fit(lab, known):
    """Nothing is known of activations before it: it is measured before it is in."""
    fixed, activations = known
    pack = lab.pack(memory=fixed + activations // 2)
    run = lab.run("first-big")
    with pytest.raises(InfeasibleError, match="GiB"):
        pack.admit(lab.job(run))
    assert pack.trials == () and not pack._model.shelves.places()
    assert not home_of(run).exists("run.json")
    small = lab.run("first-small", "train.global_batch=1", "train.micro_batch=1")
    assert pack.admit(lab.job(small)) == 0  # the pack goes on
    pack.close()


@pytest.mark.parametrize("change", ["methods.0.dropout=0.1", "methods.0.dora=true"])
def test_who_keeps_more_than_those_before_is_measured_anew(lab, known, change):
    pack = lab.pack(lab.run(f"plain-{change[10:12]}"))
    before = pack._room.per_token
    pack.admit(lab.job(lab.run(f"more-{change[10:12]}", change)))
    assert pack._room.per_token > 1.05 * before
    pack.close()


def test_a_neighbour_that_turns_out_too_large_waits(lab, known):
    """It seemed to fit by what was known; the one that is in goes on as if nothing had been."""
    fixed, activations = known
    alone = lab.run("stays", where="alone")
    done = lab.pack(alone)
    run, wide = lab.run("stays"), lab.run("masks", "methods.0.dropout=0.1")
    pack = lab.pack(run)
    pack._room.limit = pack._room.need([c := _claim(pack), c]) + 1000
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


def _claim(pack) -> Claim:
    size = next(iter(pack._slots.values())).row.layout.size
    return Claim(size, 4, int(pack._corpus.train.lengths.max()), 4, PLAIN)


def test_a_kind_is_known_up_to_the_rank_that_was_measured():
    room = Room(CPU, 0, 0)
    room.measure(Claim(1, 1, 1, 8, DROPS), lambda: 1)
    asked = [Claim(1, 1, 1, rank, kind) for rank, kind in ((8, DROPS), (9, DROPS), (8, DORA))]
    assert [room.knows(claim) for claim in asked] == [True, False, False]


def test_the_memory_of_the_container_counts(tmp_path):
    machine = host_memory(tmp_path)
    assert machine > 1 << 28
    (tmp_path / "memory.max").write_text("max\n")
    assert host_memory(tmp_path) == machine
    (tmp_path / "memory.max").write_text("1000000\n")
    assert host_memory(tmp_path) == 1_000_000
    assert everything(CPU, 0.25) == host_memory() // 4
