"""Sweeps that lose what they stand on: a node, Ray itself; and bases that no trials can share."""

import signal
import threading
from pathlib import Path

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util import list_named_actors
from test_driver import free_port, until
from test_sweep import BASE, config, home, started, told
from transformers import LlamaConfig, LlamaForCausalLM

from rayft.cluster.connect import connected
from rayft.cluster.driver_context import DriverContext
from rayft.compose.data import prepare_data
from rayft.compose.job import AttemptJob
from rayft.config.load import load
from rayft.core.errors import ClusterLostError
from rayft.hosts.pack_actor import PackActor, PackOpening
from rayft.hosts.train_run import TrainRun
from rayft.records.ledger import read_ledger
from rayft.records.run_record import SweepRecord
from rayft.storage.folder import Storage
from rayft.sweeps.driver import sweep

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]


@pytest.fixture
def ray_here(quiet):
    """A local Ray with its dashboard."""
    with connected(dashboard=True):
        yield


@pytest.fixture
def cluster(quiet):
    """A head without CPUs and two nodes of one CPU, which this process has joined."""
    made = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "include_dashboard": True, "dashboard_port": free_port()},
    )
    for _ in range(2):
        made.add_node(num_cpus=1, object_store_memory=80 * 2**20)
    made.wait_for_nodes()
    ray.init(address=made.address, namespace="rayft", log_to_driver=False)
    yield made
    ray.shutdown()
    made.shutdown()


def test_a_lost_node_costs_its_pack_and_nothing_else(cluster, tmp_path):
    """No other node has room for another pack: its trials go on in the one that is left."""
    block = {"trials": 4, "packs": 2, "slots": 2, "scheduler": "none"}
    run = load(config(tmp_path, block, train=BASE["train"] | {"steps": 40}))
    mine = ray.get_runtime_context().get_node_id()
    spare = [n for n in cluster.worker_nodes if n.node_id != mine]
    lost = []

    def lose():
        """A node, once both packs have a trial that has reported."""
        trials = lambda: read_ledger(home(tmp_path)).trials.values()  # noqa: E731
        until(lambda: len({t.pack for t in trials() if t.reports}) == 2, 200)
        cluster.remove_node(spare[0], allow_graceful=False)
        lost.append({t.id: t.step for t in trials() if not t.over})

    thread = threading.Thread(target=lose, daemon=True)
    thread.start()
    record = sweep(run)
    thread.join(1)
    assert lost and lost[0] and record.status == "done"
    for trial in read_ledger(home(tmp_path)).trials.values():
        assert trial.status == "done"
        assert [report.step for report in trial.reports] == list(range(4, 41, 4))


def test_a_pack_that_breaks_is_started_again(ray_here, tmp_path, capsys):
    """Its process lives, but a step failed: its trials go on from their commits in a new one."""
    block = {"trials": 4, "packs": 2, "slots": 2, "scheduler": "none"}
    done = []

    def sabotage():
        """In the first pack, the next step."""
        until(lambda: any(told(tmp_path).values()), 200)
        name = next(n for n in list_named_actors() if n.startswith("rayft-s-pack-0"))
        done.append(ray.get(ray.get_actor(name).call.remote(break_once)))

    thread = threading.Thread(target=sabotage, daemon=True)
    thread.start()
    record = sweep(load(config(tmp_path, block, train=BASE["train"] | {"steps": 40})))
    thread.join(1)
    assert done and record.status == "done"
    trials = read_ledger(home(tmp_path)).trials.values()
    assert [trial.status for trial in trials] == ["done"] * 4
    assert all([r.step for r in t.reports] == list(range(4, 41, 4)) for t in trials)
    assert "pack-0 is started again: RuntimeError: broken on purpose" in capsys.readouterr().err


def test_a_lost_placer_fails_no_trial(ray_here, tmp_path):
    """All hosts go with it: the driver stops (75), and the same command goes on."""
    block = {"trials": 4, "packs": 2, "slots": 2, "scheduler": "none"}
    run = load(config(tmp_path, block, train=BASE["train"] | {"steps": 40}))
    killed = []

    def kill():
        until(lambda: any(told(tmp_path).values()), 200)
        name = next(n for n in list_named_actors() if n.startswith("rayft-s-placer"))
        ray.kill(ray.get_actor(name))
        killed.append(name)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    with pytest.raises(ClusterLostError, match="process that places trials died"):
        sweep(run)
    thread.join(1)
    assert killed
    assert SweepRecord.from_json(home(tmp_path).read_bytes("sweep.json")).status == "interrupted"
    trials = read_ledger(home(tmp_path)).trials.values()
    assert {trial.status for trial in trials} <= {"running", "done"}
    assert sweep(run).status == "done"
    trials = read_ledger(home(tmp_path)).trials.values()
    assert [trial.status for trial in trials] == ["done"] * 4
    assert all([r.step for r in t.reports] == list(range(4, 41, 4)) for t in trials)


def break_once():
    """Runs in a pack's process."""
    from rayft.trials import pack

    def broken(*_):
        raise RuntimeError("broken on purpose")

    pack.step_trials = broken
    return True


def test_ray_itself_is_killed_then_the_same_command(tmp_path, quiet, monkeypatch):
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "5")  # a minute by default
    block = {"trials": 4, "packs": 2, "slots": 1, "scheduler": "none"}
    first = started(tmp_path, block)
    until(lambda: any(len(steps) == 3 for steps in told(tmp_path).values()), 120)
    servers = [
        process
        for process in psutil.Process(first.pid).children(recursive=True)
        if process.name() in ("raylet", "gcs_server")
    ]
    assert len(servers) == 2
    for process in servers:
        process.send_signal(signal.SIGKILL)
    said = first.communicate(timeout=200)[0]
    assert first.returncode not in (0, None), said
    before = told(tmp_path)
    again = started(tmp_path, block)
    said = again.communicate(timeout=200)[0]
    assert again.returncode == 0, said
    now = told(tmp_path)
    assert [list(steps) for steps in now.values()] == [[4, 8, 12]] * 4
    for name, steps in before.items():
        assert steps == pytest.approx({s: now[name][s] for s in steps}, rel=1e-5)


def test_a_base_with_dropout_of_its_own_is_trained_apart(ray_here, tmp_path, capsys):
    """Only the loaded model shows it; the sweep goes on, and says so."""
    folder = small_with_dropout(tmp_path / "model")
    space = {"methods.0.rank": {"grid": [2, 4]}}
    block = {"space": space, "search": "grid", "scheduler": "none", "trials": None}
    short = BASE["train"] | {"steps": 4, "eval_every": 2}
    record = sweep(load(config(tmp_path, block, train=short, model={"path": str(folder)})))
    trials = read_ledger(home(tmp_path)).trials.values()
    assert record.status == "done" and {trial.pack for trial in trials} == {""}
    assert [trial.status for trial in trials] == ["done"] * 2
    assert [[r.step for r in trial.reports] for trial in trials] == [[2, 4]] * 2
    assert "dropout of its own (attention_dropout)" in capsys.readouterr().err
    assert (tmp_path / "s/best/export/adapter_model.safetensors").exists()


def small_with_dropout(folder: Path) -> Path:
    """The embedded model's tokenizer over one layer whose attention has dropout."""
    import shutil

    config = LlamaConfig(
        vocab_size=2048, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, attention_dropout=0.1, pad_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    source = Path(__file__).parents[2] / "rayft/models/tiny"
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(source / name, folder / name)
    return folder


def test_a_pack_says_where_the_state_of_a_trial_is_that_has_ended(ray_here, tmp_path):
    """Population-based training may ask for it after the trial's last report."""
    train = BASE["train"] | {"steps": 4}
    run = load(BASE | {"name": "t1", "storage": str(tmp_path), "train": train})
    prepared = prepare_data(run, lambda function, items: [function(item) for item in items])
    data = (prepared.uri, prepared.hash)
    host = PackActor.remote(DriverContext.here(), 1.0, 0.0)
    ray.get(host.open.remote(PackOpening(run.resolved(), *data, 1, 9.0, {})))
    job = AttemptJob(run.resolved(), run.digest(), "1x1", *data, insist=False)
    ray.get(host.join.remote(job, None, 0))
    assert ray.get(host.next.remote("t1")).status == "done"
    place = Storage.open(ray.get(host.save.remote("t1")))
    assert place.exists("COMMIT.json") and "step-4-" in place.uri
    ray.kill(host)


def test_a_run_of_its_own_goes_on_from_the_state_of_another(ray_here, tmp_path):
    """What population-based training asks of it; Ray's own bridge from Train to Tune would begin
    anew, silently."""
    train = BASE["train"] | {"steps": 80, "eval_every": 20}
    common = BASE | {"storage": str(tmp_path), "train": train}
    donor = load(common | {"name": "donor", "optim": {"lr": 3e-3, "warmup": 0}})
    clone = load(common | {"name": "clone", "optim": {"lr": 1e-7, "warmup": 0}})
    prepared = prepare_data(donor, lambda function, items: [function(item) for item in items])
    how = {"divergence": 9.0, "heard": 0}
    train_run = TrainRun(donor, prepared, source=None, **how)
    first = train_run.next()
    folder = train_run.save()
    train_run.leave(keep=True)
    assert first.step == 20 and first.metrics["eval_loss"] < 5.5
    train_run = TrainRun(clone, prepared, source=folder, **how)
    try:
        told = train_run.next()
    finally:
        train_run.leave(keep=True)
    assert told.step > 20  # its own rate changes nothing: alone it would stand at 6.1
    assert told.metrics["eval_loss"] < first.metrics["eval_loss"] + 0.02
