"""Earlier sweeps as a prior: ledgers that rayft's own state has written, and what is drawn then."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import median

import pytest

from rayft.config.load import load
from rayft.core.errors import ConfigError, StorageError
from rayft.records.ledger import LedgerContents, read_ledger
from rayft.search.searcher import SpaceSearcher
from rayft.storage.folder import Storage
from rayft.sweeps.prior import PRIOR, learned
from rayft.sweeps.state import SweepState
from rayft.sweeps.trial import tune_result
from rayft.trials.types import TrialReport

SPACE = {"optim.lr": {"loguniform": [1e-5, 1e-2]}}
BEST = -3.3  # log10 of the best rate


def run_in(folder: Path, name: str, **sweep):
    config = {
        "name": name, "storage": str(folder), "model": "builtin:tiny",
        "data": {"train": "builtin:docstrings", "eval": [{"path": "held.jsonl"}]},
        "train": {"steps": 90, "eval_every": 10},
        "sweep": {"trials": 8, "space": SPACE, **sweep},
    }  # fmt: skip
    return load(config)


def open_state(run) -> SweepState:
    return SweepState(Storage.open(run.storage).child(run.name), run)


def earlier(folder: Path, name: str, offset: float = 0.0, **sweep) -> str:
    """A sweep over twenty rates with a bowl for a loss; its address."""
    state = open_state(run_in(folder, name, trials=20, search="random", **sweep))
    state.begin()
    for number in range(20):
        rate = 10 ** (-5 + 3 * number / 19)
        params = {"optim.lr": rate, "methods.0.rank": 8}
        loss = 3.0 + offset + abs(math.log10(rate) - BEST)
        state.started(f"t{number + 1:04d}", params)
        far = loss > 4.0 + offset
        for step in (10, 30, 90)[: 1 if far else 3]:
            done = step == 90
            told = TrialReport(
                "t", step, {"eval_loss": loss + 1 / step}, "done" if done else "running"
            )
            tell = state.ended if done else state.reported
            tell(f"t{number + 1:04d}", params, tune_result(told, "eval_loss", "min"))
        if far:
            state.stop(f"t{number + 1:04d}")
    state.close()
    return state.home.uri


def distance(folder: Path, name: str, prior: list[str], **sweep) -> float:
    """How far the first eight draws are from the best rate: the median, in decades."""
    run = run_in(folder, name, search={"kind": "optuna", "prior": prior}, **sweep)
    search = SpaceSearcher(run, LedgerContents(), prior=learned(open_state(run)))
    drawn = [search.suggest(f"a{number}") for number in range(8)]
    return median(abs(math.log10(params["optim.lr"]) - BEST) for params in drawn)


def test_an_earlier_sweep_makes_the_first_draws_better_whatever_its_losses(tmp_path):
    near = distance(tmp_path, "with", [earlier(tmp_path, "old")])
    assert near < 0.4 < distance(tmp_path, "without", [])
    # the same sweep on a model with twice the loss: not one draw differs
    assert distance(tmp_path, "moved", [earlier(tmp_path, "high", offset=3.0)]) == near


def test_two_sweeps_with_an_offset_do_not_hide_each_other(tmp_path):
    """Values as they are would leave only trials of the lower sweep among the good ones."""
    low, high = earlier(tmp_path, "low"), earlier(tmp_path, "high", offset=3.0)
    run = run_in(tmp_path, "new", search={"kind": "optuna", "prior": [low, high]})
    search = SpaceSearcher(run, LedgerContents(), prior=learned(open_state(run)))
    search.suggest("a")
    told = search._sampler._prior
    best = sorted(range(len(told)), key=lambda index: told[index].value)[:4]
    assert len(told) == 40 and sorted(index // 20 for index in best) == [0, 0, 1, 1]


def test_what_does_not_fit_is_left_out_and_counted(tmp_path):
    old = earlier(tmp_path, "old")
    narrow = {"optim.lr": {"loguniform": [1e-4, 1e-2]}, "train.global_batch": {"choice": [8, 16]}}
    run = run_in(tmp_path, "new", space=narrow, search={"kind": "optuna", "prior": [old]})
    state = open_state(run)
    (found,) = learned(state)
    inside = [
        t for t in read_ledger(Storage.open(old)).trials.values() if t.params["optim.lr"] >= 1e-4
    ]
    assert len(found.trials) == len(inside) < 20 and found.skipped == 20 - len(inside)
    batch = load(run_in(tmp_path, "old").resolved()).train.global_batch  # of its config
    assert {trial.params["train.global_batch"] for trial in found.trials} == {batch}
    said = state.record.prior[old]
    assert (said["taken"], said["skipped"]) == (len(found.trials), found.skipped)
    assert f"{len(found.trials)} trials of {old}, {found.skipped} left out" in state.news[-1]
    state.begin()
    state.close()
    assert json.loads((tmp_path / "new/sweep.json").read_text())["prior"] == {old: said}


def test_a_sweep_that_goes_on_learns_from_what_it_began_with(tmp_path):
    old = earlier(tmp_path, "old")
    run = run_in(tmp_path, "new", search={"kind": "optuna", "prior": [old]})
    state = open_state(run)
    first = learned(state)
    state.begin()
    state.close()
    (tmp_path / "old/trials.jsonl").unlink()
    assert learned(open_state(run)) == first
    whole = SpaceSearcher(run, LedgerContents(), prior=first)
    again = SpaceSearcher(run, LedgerContents(), prior=learned(open_state(run)))
    assert [whole.suggest(f"a{n}") for n in range(4)] == [again.suggest(f"a{n}") for n in range(4)]
    (tmp_path / "new" / PRIOR).write_text("{")
    with pytest.raises(StorageError, match="gone or damaged"):
        learned(open_state(run))


def test_what_cannot_be_a_prior_is_refused(tmp_path):
    def asked(*prior: str, **sweep) -> None:
        search = {"kind": "optuna", "prior": list(prior)}
        learned(open_state(run_in(tmp_path, "new", search=search, **sweep)))

    with pytest.raises(ConfigError, match="there is no sweep in .*nowhere"):
        asked(f"{tmp_path}/nowhere")
    with pytest.raises(ConfigError, match="its own prior"):
        asked(f"{tmp_path}/new")
    old = earlier(tmp_path, "old")
    with pytest.raises(ConfigError, match="went by eval_loss min, this sweep goes by eval_ppl min"):
        asked(old, metric="eval_ppl")
    lines = (tmp_path / "old/trials.jsonl").read_text().splitlines()
    lines[3] = lines[3].replace("0.", "1.")
    (tmp_path / "old/trials.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(StorageError, match="trials.jsonl.*damaged"):
        asked(old)
    for kind in ("random", "grid"):
        with pytest.raises(ConfigError) as refused:
            run_in(tmp_path, "new", search={"kind": kind, "prior": [old]})
        assert "prior" in str(refused.value)
        print(refused.value)
