"""The searcher: what it draws, what it learns from the past, and under a real Ray Tune."""

import copy
import json
import math
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import ray
from ray import tune

from rayft.cluster.connect import connected
from rayft.config.load import load
from rayft.config.space import applied, combination, params_of
from rayft.config.sweep import Domain
from rayft.core.errors import ConfigError
from rayft.records.ledger import LedgerContents, fold
from rayft.search.samplers import picks_of
from rayft.search.searcher import FixedSearcher, SpaceSearcher

RANGE = {"optim.lr": {"loguniform": [1e-5, 1e-2]}}
FINITE = {"methods.0.rank": {"choice": [4, 8, 16]}, "methods.0.alpha": {"choice": [8, 16]}}
PAIR = {
    "pair": {
        "paired": [
            {"optim.clip": None, "optim.betas": [0.9, 0.95]},
            {"optim.clip": 1.0, "optim.betas": [0.9, 0.999]},
        ]
    }
}
BEST = 10**-3.3


def swept(space, seed=0, **sweep):
    """A run whose sweep searches `space`."""
    config = {
        "name": "s", "seed": seed, "model": "builtin:tiny", "data": {"train": "a", "eval": "b"},
        "train": {"steps": 90, "eval_every": 10},
        "sweep": {"trials": 8, "search": "optuna", "space": space, **sweep},
    }  # fmt: skip
    return load(config)


def loss_of(params):
    """A bowl around lr 10^-3.3."""
    return 3 + abs(math.log10(params["optim.lr"]) - math.log10(BEST))


def line(trial, status, step, params, **metrics):
    return {
        "trial": trial, "status": status, "time": 1.0, "step": step, "params": params, **metrics
    }  # fmt: skip


def suggested(search, count=99):
    """{our id: params} until it ends."""
    found = {}
    for index in range(count):
        params = search.suggest(f"tune-{index}")
        if params == search.FINISHED:
            break
        found[search.name_of(f"tune-{index}")] = params
    return found


# --- what is drawn -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["optuna", "random"])
def test_trials_are_numbered_valid_and_follow_from_the_seed(kind):
    space = RANGE | PAIR | {"methods.0.rank": {"int": [2, 5]}, "optim.eps": {"uniform": [0.1, 1]}}
    run = swept(space, search=kind, trials=12)
    found = suggested(SpaceSearcher(run, LedgerContents()))
    assert list(found) == [f"t{n:04d}" for n in range(1, 13)]
    for name, params in found.items():
        assert set(params) == set(run.sweep.paths())
        trial = applied(run, params, name=name)
        assert 1e-5 <= trial.optim.lr <= 1e-2 and 2 <= trial.methods[0].rank <= 5
        assert (trial.optim.clip is None) == (trial.optim.betas[1] == 0.95)
    assert len({params["optim.lr"] for params in found.values()}) == 12
    assert suggested(SpaceSearcher(run, LedgerContents())) == found
    assert (
        suggested(SpaceSearcher(swept(space, seed=1, search=kind, trials=12), LedgerContents()))
        != found
    )


def test_a_grid_is_every_valid_combination_once_in_order():
    run = swept(FINITE, search="grid", trials=None)
    found = list(suggested(SpaceSearcher(run, LedgerContents())).values())
    ranks = [(params["methods.0.rank"], params["methods.0.alpha"]) for params in found]
    assert ranks == [(4, 8), (4, 16), (8, 8), (8, 16), (16, 8), (16, 16)]

    refused = {"methods": {"choice": ["full", "lora"]}, "model.quant": {"choice": ["none", "nf4"]}}
    search = SpaceSearcher(swept(refused, search="grid", trials=None), LedgerContents())
    assert [tuple(params.values()) for params in suggested(search).values()] == [
        ("full", "none"), ("lora", "none"), ("lora", "nf4"),
    ]  # fmt: skip
    assert search.exhausted


@pytest.mark.parametrize("kind", ["optuna", "random"])
def test_a_finite_space_is_never_repeated_and_ends(kind):
    search = SpaceSearcher(swept(FINITE, search=kind, trials=50), LedgerContents())
    found = list(suggested(search).values())
    assert len(found) == 6 == len({json.dumps(params) for params in found})
    assert search.exhausted
    assert not SpaceSearcher(swept(FINITE, search=kind, trials=3), LedgerContents()).exhausted


@pytest.mark.parametrize("kind", ["optuna", "random"])
def test_one_free_combination_among_many_is_found(kind):
    run = swept({"seed": {"int": [0, 999]}}, search=kind, trials=1000)
    taken = [line(f"t{n:04d}", "done", 90, {"seed": n}, eval_loss=3.0) for n in range(1, 1000)]
    search = SpaceSearcher(run, fold(taken))
    assert suggested(search) == {"t1000": {"seed": 0}}


def test_random_goes_through_grids_and_draws_the_rest():
    space = RANGE | {"methods.0.rank": {"grid": [4, 8]}, "seed": {"grid": [1, 2, 3]}}
    found = list(
        suggested(
            SpaceSearcher(swept(space, search="random", trials=12), LedgerContents())
        ).values()
    )
    pairs = [(params["methods.0.rank"], params["seed"]) for params in found]
    assert sorted(pairs[:6]) == [(4, 1), (4, 2), (4, 3), (8, 1), (8, 2), (8, 3)]
    assert pairs[6:] == pairs[:6]
    assert len({params["optim.lr"] for params in found}) == 12


@pytest.mark.parametrize("kind", ["optuna", "random"])
def test_what_makes_no_valid_config_is_drawn_again_and_not_for_ever(kind):
    mixed = RANGE | {"methods": {"choice": ["full", "lora"]}}
    run = swept(mixed, search=kind, trials=10)
    run = run.model_copy(update={"model": run.model.model_copy(update={"quant": "nf4"})})
    found = suggested(SpaceSearcher(run, LedgerContents()))
    assert [params["methods"] for params in found.values()] == ["lora"] * 10

    run = swept(RANGE | {"methods": {"choice": ["full"]}}, search=kind)
    run = run.model_copy(update={"model": run.model.model_copy(update={"quant": "nf4"})})
    with pytest.raises(ConfigError, match="in a row made no valid config.*full fine-tuning"):
        SpaceSearcher(run, LedgerContents()).suggest("a")


def test_listed_values_keep_their_types():
    values = [1, 1.5, None, [0.9, 0.95], {"a": 1}, "1", True]
    space = {"x": {"choice": values}}
    domains = {"x": Domain.model_validate(space["x"])}
    for index, value in enumerate(values):
        picks = combination(domains, index)
        params = params_of(domains, picks)
        again = picks_of(domains, json.loads(json.dumps(params)))
        assert again == {"x": value} and type(again["x"]) is type(value)
    assert picks_of(domains, {"x": 1.0}) is None and picks_of(domains, {}) is None


# --- what the past says --------------------------------------------------------------------------


def finished(lrs, start=1):
    return [
        line(f"t{n:04d}", "done", 90, {"optim.lr": lr}, eval_loss=loss_of({"optim.lr": lr}))
        for n, lr in enumerate(lrs, start)
    ]


def test_unfinished_trials_come_first_with_their_own_ids_and_params():
    rows = [
        line("t0001", "done", 90, {"optim.lr": 1e-4}, eval_loss=3.5),
        line("t0002", "running", 20, {"optim.lr": 2e-4}, eval_loss=3.6),
        line("t0004", "running", 0, {"optim.lr": 4e-4}),
        line("t0001-s1", "running", 5, {"optim.lr": 1e-4, "seed": 1}, origin="t0001"),
    ]
    for kind in ("optuna", "random"):
        found = suggested(SpaceSearcher(swept(RANGE, search=kind, trials=6), fold(rows)))
        assert list(found) == ["t0002", "t0004", "t0003", "t0005", "t0006"]
        assert found["t0002"] == {"optim.lr": 2e-4} and found["t0004"] == {"optim.lr": 4e-4}


@pytest.mark.parametrize("kind", ["grid", "random"])
def test_a_continued_sweep_draws_what_it_would_have_drawn(kind):
    space = FINITE if kind == "grid" else RANGE
    run = swept(space, search=kind, trials=6)
    whole = suggested(SpaceSearcher(run, LedgerContents()))
    rows = [line(name, "done", 90, whole[name], eval_loss=3.0) for name in ("t0001", "t0004")]
    rest = suggested(SpaceSearcher(run, fold(rows)))
    assert rest == {name: whole[name] for name in ("t0002", "t0003", "t0005", "t0006")}


def test_a_continued_optuna_draws_nothing_twice():
    run = swept(RANGE, trials=30, search={"kind": "optuna", "startup": 50})
    whole = suggested(SpaceSearcher(run, LedgerContents()), 10)
    rows = [line(n, "done", 90, params, eval_loss=loss_of(params)) for n, params in whole.items()]
    rest = suggested(SpaceSearcher(run, fold(rows)))
    assert len(rest) == 20
    assert not {p["optim.lr"] for p in rest.values()} & {p["optim.lr"] for p in whole.values()}


def test_optuna_uses_the_past():
    """With 20 known trials the next are near the best; with none they are everywhere."""
    lrs = [10 ** (-5 + 3 * n / 19) for n in range(20)]

    def distance(book):
        search = SpaceSearcher(swept(RANGE, trials=40), book)
        drawn = []
        for index in range(20):
            params = search.suggest(f"tune-{index}")
            drawn.append(loss_of(params) - 3)
            search.on_trial_complete(
                f"tune-{index}",
                {"eval_loss": loss_of(params), "step": 90, "status": "done"},
            )
        return sorted(drawn[:8])[4]

    assert distance(fold(finished(lrs))) < 0.35 < distance(LedgerContents())


@pytest.mark.parametrize("status", ["diverged", "stopped", "failed"])
def test_where_trials_go_wrong_optuna_goes_no_more(status):
    """Everything above 1e-3 goes wrong early. A failed
    trial says nothing about its params, so there the searcher stays."""

    def share(live):
        rows = []
        for n in range(1, 31):
            lr = 10 ** (-5 + 3 * n / 30)
            wrong = lr > 1e-3
            step = 10 if status == "stopped" else 0
            metrics = {"base_loss": 6.0} | ({"eval_loss": 7.0} if step else {})
            metrics = metrics if wrong else {"eval_loss": 4.0 - n / 30, "base_loss": 6.0}
            rows.append(
                line(
                    f"t{n:04d}", status if wrong else "done", step if wrong else 90,
                    {"optim.lr": lr}, **metrics,
                )
            )  # fmt: skip
        run = swept(RANGE, trials=60)
        search = SpaceSearcher(run, LedgerContents() if live else fold(rows))
        if live:  # the same, told one after another by Tune
            search = SpaceSearcher(
                run, fold([row | {"status": "running", "step": 0} for row in rows])
            )
            for index, row in enumerate(rows):
                assert search.suggest(f"old-{index}") == row["params"]
            for index, row in enumerate(rows):
                seen = {k: row[k] for k in ("eval_loss", "base_loss", "step") if k in row}
                ended = "running" if row["status"] == "stopped" else row["status"]
                search.on_trial_complete(f"old-{index}", seen | {"status": ended})
        found = suggested(search)
        assert len(found) == 30
        return sum(params["optim.lr"] > 1e-3 for params in found.values()) / 30

    for live in (False, True):
        if status == "failed":
            assert share(live) > 0.3
        else:
            assert share(live) < 0.35


def test_a_sweep_that_only_diverges_goes_on():
    search = SpaceSearcher(swept(RANGE, trials=15), LedgerContents())
    for index in range(15):
        assert search.suggest(f"a{index}") != search.FINISHED
        search.on_trial_result(f"a{index}", {"eval_loss": math.nan, "step": 10})
        search.on_trial_complete(f"a{index}", {"status": "diverged", "step": 10})
    assert search.suggest("b") == search.FINISHED


def test_errors_and_trials_without_a_word_block_nothing():
    search = SpaceSearcher(swept(RANGE, trials=4), LedgerContents())
    for index in range(4):
        search.suggest(f"a{index}")
    search.on_trial_complete("a0", error=True)
    search.on_trial_complete("a1")
    search.on_trial_complete("a2", {"status": "done", "step": 90, "eval_loss": math.inf})
    search.on_trial_complete("a3", {"status": "failed", "step": 0})
    assert search.suggest("b") == search.FINISHED


def test_max_is_better_when_mode_says_so():
    lrs = [10 ** (-5 + 3 * n / 19) for n in range(20)]
    run = swept(RANGE, trials=40, mode="max")
    found = suggested(SpaceSearcher(run, fold(finished(lrs))))
    near = sum(loss_of(params) - 3 < 0.5 for params in found.values())
    assert near < 6  # the worst of the bowl is what is wanted


def test_given_trials():
    search = FixedSearcher({"t0003-s1": {"seed": 1}, "t0003-s2": {"seed": 2}})
    assert suggested(search) == {"t0003-s1": {"seed": 1}, "t0003-s2": {"seed": 2}}
    search.on_trial_complete("tune-0", {"eval_loss": 1.0})


def test_the_searcher_travels_and_needs_no_torch():
    search = SpaceSearcher(swept(RANGE), LedgerContents())
    search.suggest("a")
    for again in (pickle.loads(pickle.dumps(search)), copy.deepcopy(search)):
        assert again.name_of("a") == "t0001" and again.suggest("b") == search.suggest("b")
        search = SpaceSearcher(swept(RANGE), LedgerContents())
        search.suggest("a")
    code = "import sys, rayft.search.searcher; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


# --- under Ray Tune ------------------------------------------------------------------------------


class Toy(tune.Trainable):
    """One step; says its own name, and fails or diverges where its params say so."""

    def setup(self, config):
        self.config = config

    def step(self):
        lr = self.config["optim.lr"]
        if 3e-4 < lr < 4e-4:
            raise RuntimeError("boom")
        status = "diverged" if lr > 5e-3 else "done"
        score = math.nan if status == "diverged" else loss_of(self.config)
        return {
            "eval_loss": score, "step": self.iteration + 1, "status": status, "done": True,
            "name": self.trial_name, "lr": lr,
        }  # fmt: skip

    def reset_config(self, new_config):
        self.config = new_config
        return True


class Names:
    """Tune copies and pickles what it is given."""

    def __init__(self, search):
        self.search = search

    def __deepcopy__(self, memo):
        return self

    def __call__(self, trial):
        return self.search.name_of(trial.trial_id)


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_under_ray_tune_names_are_ours_and_none_is_lost(quiet, tmp_path, monkeypatch):
    monkeypatch.setenv("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")
    monkeypatch.setenv("RAY_AIR_NEW_OUTPUT", "0")
    rows = [
        line("t0001", "done", 1, {"optim.lr": 1e-4}, eval_loss=3.2),
        line("t0002", "running", 0, {"optim.lr": 3.5e-4}),  # raises
        line("t0003", "running", 0, {"optim.lr": 9e-3}),  # diverges
    ]
    search = SpaceSearcher(swept(RANGE, trials=12), fold(rows))
    before = signal.getsignal(signal.SIGTERM)
    with connected():
        place = tune.PlacementGroupFactory(
            [{"CPU": 0, f"node:{ray.util.get_node_ip_address()}": 0.001}]
        )
        tuner = tune.Tuner(
            tune.with_resources(Toy, place),
            tune_config=tune.TuneConfig(
                search_alg=search, num_samples=50, max_concurrent_trials=3, reuse_actors=True,
                trial_name_creator=Names(search), trial_dirname_creator=Names(search),
            ),
            run_config=tune.RunConfig(name="x", storage_path=str(tmp_path), verbose=0),
        )  # fmt: skip
        results = tuner.fit()
    signal.signal(signal.SIGTERM, before)  # ray.init took it
    said = {
        r.metrics["name"]: r.metrics["lr"] for r in results if r.metrics and "name" in r.metrics
    }
    names = {f"t{n:04d}" for n in range(2, 13)}
    assert {path.name for path in (tmp_path / "x").iterdir()} >= names
    assert len(results) == 11 and len(results.errors) >= 1
    assert names - set(said) <= {"t0002", *failed(results)}
    assert said["t0003"] == 9e-3


def failed(results):
    return {Path(result.path).name for result in results if result.error}
