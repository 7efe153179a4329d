"""Runs on a real local Ray: faults inside an attempt, refusals before the first."""

import io
import re
import threading
import time
from pathlib import Path

import pytest
import ray
import stub
from ray.util import list_named_actors, placement_group_table

from rayft.cluster import preflight
from rayft.cluster.connect import Node, _WithoutRaylet, ceiling, connected, nodes
from rayft.core.errors import DivergedError, InfeasibleError, RayftError, StorageError
from rayft.training.driver import train

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


@pytest.fixture(scope="module", autouse=True)
def cluster(quiet):
    with connected():
        yield


def go(run, fault=""):
    work = Path(run.storage) / "work"
    work.mkdir(exist_ok=True)
    (work / "fault").write_text(fault)
    return train(run, engine=stub.execute, prepare=stub.prepare)


def starts(run):
    """[(rank, step, attempt, threads, cwd)] of every start of a rank."""
    lines = (Path(run.storage) / "work/starts").read_text().splitlines()
    return sorted((int(line.split()[1]), int(line.split()[0]), *line.split()[2:]) for line in lines)


def test_a_run_from_start_to_end(a_run, capfd):
    run = a_run(scale={"workers": 2, "gpus": 0, "cpus": 0.5})
    record = go(run)
    # Two attempts: seen once under heavy load, Ray took the placement group away while the last
    # worker was leaving, and the run continued from its last commit, as it should.
    assert (record.status, record.steps) == ("done", 40) and record.attempts <= 2
    assert record.hardware["nodes"] == 1
    began = starts(run)
    assert [one[:2] for one in began] == [(0, 0), (0, 1)]
    assert all(one[3:] == ("1", str(Path.cwd())) for one in began)  # threads, working directory
    said = capfd.readouterr()
    assert "step 40/40" in said.err and "TrainController" not in said.out + said.err
    assert len(said.err.splitlines()) < 15 and not said.out
    named = list_named_actors(all_namespaces=True)
    assert not [actor for actor in named if actor["name"].startswith("rayft")]
    states = {group["state"] for group in placement_group_table().values()}
    assert states <= {"REMOVED"}


def test_killed_workers_continue_from_the_last_commit(a_run, capfd):
    run = a_run()
    record = go(run, "kill 1 15 1\nkill all 35 2\n")
    # Four: seen once on a busy machine, Ray failed an attempt before any of its workers ran.
    assert (record.status, record.steps) == ("done", 40) and record.attempts in (3, 4)
    assert [one[:2] for one in starts(run)] == [(0, 0), (0, 1), (10, 0), (10, 1), (30, 0), (30, 1)]
    assert len({one[2] for one in starts(run)}) == 3  # every attempt has its own id
    traces = [file.read_text() for file in (Path(run.storage) / "r/errors").iterdir()]
    assert [one for one in traces if one.startswith("rank 1, step 1") and "WorkerDied" in one]
    said = capfd.readouterr()
    assert " failed (rank 1" in said.err


def test_a_bug_at_one_step_ends_with_a_diagnosis(a_run):
    run = a_run(
        train={"steps": 40, "save_every": 50}, scale={"workers": 2, "gpus": 0, "retries": 9}
    )
    with pytest.raises(RayftError) as caught:
        go(run, "bug 1 3 *")
    text = str(caught.value)
    assert "rank 1, step 3" in text and "ValueError: boom" in text
    assert "same error at the same step 3 times" in text and re.search(
        r"errors/attempt-[34]\.txt", text
    )
    assert len(text.splitlines()) <= 15 and caught.value.exit_code == 1
    assert len(starts(run)) == 6


def test_divergence_is_not_tried_again(a_run):
    run = a_run()
    with pytest.raises(DivergedError, match="rank 0, step 5"):
        go(run, "nan all 5 *")
    assert len(starts(run)) == 2


def test_too_many_workers_are_refused_in_seconds(a_run):
    run = a_run(scale={"workers": 2, "cpus": 64, "gpus": 1, "resources": {"fpga": 1}})
    began = time.monotonic()
    with pytest.raises(InfeasibleError) as caught:
        go(run)
    assert time.monotonic() - began < 10
    text = str(caught.value)
    assert "2 workers of 64 CPU, 1 fpga, 1 GPU" in text and "room for 0" in text
    assert "scale.workers" in text and "scale.gpus" in text and "scale.resources.fpga" in text
    assert len(text.splitlines()) <= 15 and caught.value.exit_code == 4
    assert not (Path(run.storage) / "r").exists()


def test_ray_still_says_whether_there_is_an_autoscaler():
    assert ceiling() is None


def test_room_on_nodes():
    small, large = Node("a", "a", {"CPU": 2}), Node("b", "b", {"CPU": 8, "GPU": 2})
    need = {"CPU": 2, "GPU": 1}
    assert preflight.fitting([small, large], {"CPU": 2}, "PACK") == 5
    assert preflight.fitting([small, large], {"CPU": 2}, "STRICT_PACK") == 4
    assert preflight.fitting([small, large], {"CPU": 2}, "STRICT_SPREAD") == 2
    assert preflight.fitting([small, large], need, "SPREAD") == 2


def test_elastic_takes_what_is_there(a_run):
    living = [Node("a", "a", {"CPU": 3})]
    for asked, workers in (([1, 8], 3), ([1, 2], 2), ([4, 8], 4), (2, 2)):
        scale = a_run(scale={"workers": asked, "gpus": 0}).scale
        assert preflight.workers_now(scale, living, 0) == workers


def test_an_autoscaler_makes_a_shortage_a_wait_unless_it_can_never_fit(a_run):
    run = a_run(scale={"workers": 4, "gpus": 1})
    preflight.feasible(run, [], 1, {"CPU": 8, "GPU": 4})
    with pytest.raises(InfeasibleError):
        preflight.feasible(run, [], 1, {"CPU": 8, "GPU": 2})


def test_every_node_probes_storage(tmp_path):
    from rayft.storage.folder import Storage

    preflight.storage_everywhere(Storage.open(str(tmp_path / "runs")), nodes())
    assert not list((tmp_path / "runs").iterdir())
    # What a process sees below /proc/self is its own: like a local disk on another machine.
    with pytest.raises(StorageError, match="not the same place on every node"):
        preflight.judge("/data", True, "token", {"10.0.0.1": "token", "10.0.0.2": ""})
    with pytest.raises(StorageError, match=r"10\.0\.0\.2: cannot write"):
        preflight.judge("/data", True, "token", {"10.0.0.1": "token", "10.0.0.2": "! cannot write"})
    with pytest.raises(StorageError, match=r"where: data\.cache"):
        preflight.judge("/data", True, "token", {"10.0.0.2": ""}, "data.cache")


def test_rays_own_listener_is_not_heard_on_stdout():
    out = io.StringIO()
    quiet = _WithoutRaylet(out)
    for name in ("ray_listen_error_messages", "anyone"):
        thread = threading.Thread(target=print, args=(name,), kwargs={"file": quiet}, name=name)
        thread.start()
        thread.join()
    assert out.getvalue() == "anyone\n"


def test_users_own_ray_is_left_alone():
    with connected():
        pass
    assert ray.is_initialized()
