"""The day with a GPU, tried out on a CPU: every part runs, and none can spoil another's numbers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DAY = ROOT / "experiments" / "gpu"
TINY = ("--device", "cpu", "--tiny")


def started(folder: Path, *command: str, **more: str) -> subprocess.Popen[str]:
    """In a process group of its own, with its results in `folder`."""
    env = os.environ | {"OUT": str(folder), "OMP_NUM_THREADS": "1"} | more
    env.pop("PYTHONPATH", None)  # a bare checkout
    return subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=folder,
        env=env,
    )


def day(folder: Path, *command: str, **more: str) -> tuple[int, str]:
    """Exit code and output of a whole one."""
    process = started(folder, *command, **more)
    said, _ = process.communicate(timeout=240)
    return process.returncode, said


def results(folder: Path) -> dict[str, dict]:
    """{part: its outcome} of results.json."""
    return {
        part["name"]: part for part in json.loads((folder / "results.json").read_text())["parts"]
    }


def driver(folder: Path, *parts: tuple[str, str, float]) -> str:
    """A script that runs these (name, source, limit) in place of the day's own parts."""
    made = []
    for name, source, limit in parts:
        path = folder / f"{name}.py"
        path.write_text(source)
        made.append(f"Part({name!r}, Path({str(path)!r}), {limit})")
    script = folder / "driver.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(DAY)!r})\nfrom pathlib import Path\n"
        f"import run\nfrom plan import Part\n"
        f"sys.exit(run.main(sys.argv[1:], [{', '.join(made)}]))\n"
    )
    return str(script)


NOTES = f"""
import sys
sys.path.insert(0, {str(DAY / "parts")!r})
from part import Part
part = Part()
part.note(first=1.5)
"""
HANGS = (
    NOTES
    + """
import subprocess, time
child = subprocess.Popen(["sleep", "600"])
part.note(child=child.pid)
time.sleep(600)
"""
)
BREAKS = NOTES + "raise ValueError('seven is not\\n  eight')\n"


def test_every_part_runs_from_a_bare_checkout(tmp_path: Path) -> None:
    code, said = day(tmp_path, str(DAY / "run.py"), *TINY)
    assert code == 0, said
    found = results(tmp_path)
    expected = {name: "ok" for name in found} | {"gpu tests": "skipped"}
    assert {name: part["status"] for name, part in found.items()} == expected and len(found) == 7
    assert found["gpu tests"]["reason"] == "needs a CUDA device"
    assert found["gpu tests"]["numbers"]["skipped"] >= 8
    (case,) = found["packing, 8B nf4"]["numbers"].values()
    assert case["tokens/s"] > 0 and case["sequential"] > 0
    assert found["32 trials under 60 GB"]["numbers"]["trials"] == 4
    losses = found["losses, CPU and GPU"]["numbers"]["packed"]
    assert losses["difference"] == 0 and losses["GPU"] == losses["CPU"]
    assert len(losses["CPU"]) == 4 and 1 < losses["CPU"][-1] < losses["CPU"][0]
    assert found["single job"]["numbers"]["full"]["tokens/s"] > 0
    assert "MFU" not in found["single job"]["numbers"]["full"]  # of a CPU: none, and said so
    assert "CPU" in found["single job"]["numbers"]["no MFU"]
    facts = json.loads((tmp_path / "results.json").read_text())
    assert {"commit", "command", "machine", "device", "versions"} <= facts.keys()
    rows = (tmp_path / "results.md").read_text().split("| --- | --- | --- | --- |\n")[1]
    assert len(rows.splitlines()) == 7


def test_a_part_that_hangs_is_cut_off_and_the_rest_runs(tmp_path: Path) -> None:
    script = driver(tmp_path, ("one", NOTES, 9), ("two", HANGS, 2), ("three", NOTES, 9))
    code, said = day(tmp_path, script, *TINY, "--seconds", "22")
    found = results(tmp_path)
    assert [found[name]["status"] for name in ("one", "two", "three")] == ["ok", "timeout", "ok"]
    assert 2 <= found["two"]["seconds"] < 3 + 3 and "cut off after" in found["two"]["reason"]
    assert found["two"]["numbers"]["first"] == 1.5  # what it had found is kept
    assert not alive(found["two"]["numbers"]["child"]), "a part's own children end with it"
    assert code == 1 and "FAILED: two; see" in said


def test_a_part_that_fails_is_told(tmp_path: Path) -> None:
    skips = NOTES + "part.skip('no such thing here')"
    script = driver(tmp_path, ("one", BREAKS, 9), ("two", skips, 9), ("three", NOTES, 9))
    code, said = day(tmp_path, script, *TINY)
    found = results(tmp_path)
    assert code == 1 and "FAILED: one; see" in said
    assert found["one"]["status"] == "failed" and found["one"]["numbers"] == {"first": 1.5}
    assert found["one"]["reason"] == "ValueError: seven is not"
    assert (found["two"]["status"], found["two"]["reason"]) == ("skipped", "no such thing here")
    assert found["three"]["status"] == "ok"
    assert "| one | failed |" in (tmp_path / "results.md").read_text()


@pytest.mark.parametrize("signal", ["SIGTERM", "SIGKILL"])
def test_a_day_that_is_cut_off_keeps_what_it_has(tmp_path: Path, signal: str) -> None:
    script = driver(tmp_path, ("one", NOTES, 9), ("two", HANGS, 60))
    process = started(tmp_path, script, *TINY)
    deadline = time.monotonic() + 60
    while "child" not in told(tmp_path).get("two", {}).get("numbers", {}):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    (process.terminate if signal == "SIGTERM" else process.kill)()
    process.wait(20)
    process.stdout.close()
    found = results(tmp_path)
    assert found["one"]["status"] == "ok" and found["two"]["status"] == "running"
    assert found["two"]["numbers"]["first"] == 1.5
    if signal == "SIGTERM":
        assert not alive(found["two"]["numbers"]["child"])
    else:  # nobody was left to end them
        os.killpg(os.getpgid(found["two"]["numbers"]["child"]), 9)


def test_what_is_missing_is_listed_and_nothing_runs(tmp_path: Path) -> None:
    """A Python that has torch, transformers and safetensors by name, and nothing else."""
    for name in ("torch", "transformers", "safetensors"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    bare = f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\n"
    script = Path(driver(tmp_path, ("one", NOTES, 9)))
    script.write_text(bare + script.read_text())
    code, said = day(tmp_path, "-S", str(script), *TINY)  # no site-packages
    assert code == 2 and "nothing ran: these are needed: pydantic," in said
    assert "bitsandbytes" in said and "optional" in said and "--wheels FOLDER" in said
    total = float(said.split("together, but for optional ones")[1].split("MiB")[0])
    assert 0 < total <= 60
    assert not (tmp_path / "results.json").exists()


def test_time_left_over_goes_to_the_next_part_within_reason(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(DAY))
    import plan
    import run
    import wheels

    assert run.allowed(10, 100, 50) == 15  # half of it more, at most
    assert run.allowed(10, 62, 50) == 12
    assert run.allowed(10, 55, 50) == 10  # its own limit, even where earlier ones were late
    assert run.allowed(10, 4, 50) == 4
    assert sum(part.limit for part in plan.PARTS) < run.WHOLE < 9 * 60
    assert all(wheels.pinned(need.package) for need in wheels.NEEDS)


def test_the_peak_is_that_of_the_whole_name(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(DAY / "parts"))
    from peaks import peak_of

    assert peak_of("NVIDIA H200") == peak_of("NVIDIA H100 80GB HBM3") == 989
    assert peak_of("NVIDIA A100-SXM4-80GB") == 312 and peak_of("NVIDIA A10") == 125
    assert peak_of("NVIDIA H100 PCIe") == 756 and peak_of("NVIDIA L40S") == 362
    assert peak_of("NVIDIA L40") is peak_of("NVIDIA H20") is peak_of("a CPU") is None


def told(folder: Path) -> dict[str, dict]:
    return results(folder) if (folder / "results.json").exists() else {}


def alive(pid: int) -> bool:
    """A zombie that nobody has collected is not."""
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"
