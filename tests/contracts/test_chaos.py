"""A short seeded part of `make chaos`, and proof that it can fail (experiments/chaos)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHAOS = ROOT / "experiments" / "chaos"
SHORT = ("--storm", "single:1", "--storm", "damage:17", "--storm", "leases:2", "--set", "kills=4")


@pytest.fixture
def chaos(monkeypatch):
    """Its modules can be imported."""
    monkeypatch.syspath_prepend(str(CHAOS))


def storms(*argv: str, path: Path = CHAOS) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(CHAOS / "run.py"), *argv],
        capture_output=True,
        text=True,
        timeout=400,
        env=os.environ | {"PYTHONPATH": str(path)},
    )


def test_a_short_storm_keeps_every_promise(tmp_path):
    """4 kills, 17 damaged files (one of each kind), a race of drivers and a stolen lease."""
    done = storms("--seed", "1", "--json", "--folder", str(tmp_path), *SHORT)
    assert done.returncode == 0, done.stderr[-6000:]
    single, damage, leases = json.loads(done.stdout)
    assert sum(single["faults"].values()) == 4 and single["kept"]["no checkpoint was torn"] == 4
    assert single["kept"]["the same bits as uninterrupted"] >= 1
    assert len(damage["faults"]) == 17
    assert leases["faults"] == {"race": 1, "stolen": 1}
    assert not any(storm["skipped"] for storm in (single, damage, leases))
    assert not list(tmp_path.iterdir())


def test_a_broken_promise_is_exit_1_with_the_command_that_repeats_it(chaos, tmp_path, capsys):
    (tmp_path / "clock.py").write_text(
        textwrap.dedent("""
        CASES = 2
        def prepare(lab): pass
        def run(case, lab):
            case.faults["bad luck"] += 1
            case.check("all is well", case.number == 0, f"draw {lab.rng(case).random():.6f}")
        """)
    )
    argv = ["--seed", "5", "--storm", "clock", "--folder", str(tmp_path)]
    code = "import sys; sys.argv[0] = 'run.py'; import clock, run; sys.exit(run.main(sys.argv[1:]))"
    path = os.pathsep.join([str(tmp_path), str(CHAOS)])
    done = [
        subprocess.run(
            [sys.executable, "-c", code, *argv, *more],
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": path},
        )
        for more in ([], ["--only", "1"], ["--only", "0"])
    ]
    assert [one.returncode for one in done] == [1, 1, 0], done[0].stderr
    assert "run.py --seed 5 --storm clock --only 1" in done[0].stderr
    draws = [one.stderr.partition("all is well: draw ")[2][:8] for one in done]
    assert draws[0] == draws[1] != "" and not draws[2]
    assert "| clock | 2      | 1    | 1 " in done[0].stdout


def test_one_wrong_bit_is_a_difference(chaos):
    """What finished runs are compared by."""
    from lab import Evidence

    rows = {("train", 1): {"loss": 5.5, "tokens": 10}, ("eval", 1): {"loss": 5.0}}
    whole = Evidence(rows, ("ab",), "cd")
    assert whole.differs(whole) == "" and whole.lacks_only(whole)
    changed = rows | {("train", 1): {"loss": 5.500000000000001, "tokens": 10}}
    assert replace(whole, series=changed).differs(whole).startswith("train step 1: ")
    assert not replace(whole, series=changed).lacks_only(whole)
    fewer = {("eval", 1): {"loss": 5.0}}
    assert replace(whole, series=fewer).differs(whole).startswith("train step 1: None")
    assert replace(whole, series=fewer).lacks_only(whole)
    for other in (replace(whole, state=("aa",)), replace(whole, export="cc")):
        assert "differ" in other.differs(whole) and not other.lacks_only(whole)


def test_steps_are_read_while_they_are_written(chaos, tmp_path):
    """A torn last line, and a log that was written anew."""
    from lab import added, committed, lines, trained

    step = b'{"step": %d, "split": "train", "loss": 1.0}\n'
    (tmp_path / "metrics.jsonl").write_bytes(step % 1 + step % 2 + (step % 3)[:9])
    before = lines(tmp_path)
    assert trained(before) == [1, 2] and committed(tmp_path) == 0
    (tmp_path / "metrics.jsonl").write_bytes(step % 1 + step % 3 + b"damage\n")
    assert trained(added(before, lines(tmp_path))) == [3]
    (tmp_path / "checkpoints/step-12-1xab").mkdir(parents=True)
    assert committed(tmp_path) == 0
    (tmp_path / "checkpoints/step-12-1xab/COMMIT.json").touch()
    assert committed(tmp_path) == 12
