"""Packs and runs of their own are asked the same questions."""

from __future__ import annotations

import inspect

import pytest

from rayft.hosts.pack_actor import PackActor
from rayft.hosts.train_run_actor import TrainRunActor
from rayft.hosts.trial_host import TrialHost

QUESTIONS = [name for name in vars(TrialHost) if not name.startswith("_")]


@pytest.mark.parametrize("host", [PackActor, TrainRunActor], ids=["pack", "own run"])
def test_a_host_answers_every_question(host) -> None:
    assert set(QUESTIONS) == {"next", "save", "leave"}
    actor = host.__ray_metadata__.modified_class
    for name in QUESTIONS:
        wanted = list(inspect.signature(vars(TrialHost)[name]).parameters)
        found = inspect.signature(inspect.getattr_static(actor, name)).parameters
        assert [each for each in found if not each.startswith("_ray")] == wanted, name
