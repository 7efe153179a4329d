"""bf16 on CPUs: what is slow is said, and precision auto avoids it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from rayft.compose.arithmetic import SLOW, bf16_slowdown, settled
from rayft.compose.job import ProgressEvent
from tests.packs import CPU, Lab, Silent, finish, losses

BF16 = "model.dtype=bf16"
CODE = "from rayft.compose.arithmetic import bf16_slowdown as slow; print(slow())"


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return Lab(tmp_path_factory.mktemp("lab"), steps=6)


@pytest.fixture
def takes(monkeypatch):
    """Lets this CPU take so many times as long in bf16; None: it must not be measured."""

    def install(times: float | None) -> None:
        def measured() -> float:
            assert times is not None
            return times

        monkeypatch.setattr("rayft.compose.arithmetic.bf16_slowdown", measured)

    return install


def test_auto_avoids_slow_bf16_and_says_so(lab, takes):
    takes(3.0)
    run, said = settled(lab.run("a", BF16), CPU)
    assert run.model.dtype == run.arithmetic == "fp32"
    assert "3.0 times as slow as fp32" in said and "\n" not in said
    assert "train.precision auto computes in fp32" in said


@pytest.mark.parametrize("changes", [(BF16, "train.precision=bf16"), ("train.precision=bf16",)])
def test_bf16_by_name_stays_and_is_told(changes, lab, takes):
    takes(3.0)
    asked = lab.run("a", *changes)
    run, said = settled(asked, CPU)
    assert run == asked and "3.0 times as slow" in said and "model.dtype: fp32" in said


def test_nothing_is_said_where_bf16_is_fast_or_not_used(lab, takes):
    asked, plain = lab.run("a", BF16), lab.run("a")
    takes(0.5)
    assert settled(asked, CPU) == (asked, "")
    takes(None)
    assert settled(asked, torch.device("cuda")) == (asked, "")
    assert settled(plain, CPU) == (plain, "")


class Heard(Silent):
    """Keeps what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[ProgressEvent] = []

    def progress(self, event: dict) -> None:
        self.events.append(event)


def test_a_run_and_a_pack_begin_with_the_line_and_compute_in_fp32(lab, takes, caplog):
    takes(3.0)
    plain, solo, packed = (
        lab.run(name, *more)
        for name, more in (("plain", ()), ("solo", (BF16,)), ("packed", (BF16,)))
    )
    heard = Heard()
    lab.solo(plain)
    lab.solo(solo, signals=heard)
    first = heard.events[0]
    assert first.kind == "warn" and "3.0 times as slow" in first.text
    assert [event.kind for event in heard.events].count("warn") == 1
    assert losses(solo) == losses(plain)  # the base is stored in fp32
    finish(lab.pack(packed))
    assert losses(packed) == pytest.approx(losses(plain), rel=1e-5)
    assert "3.0 times as slow" in caplog.text


def test_by_name_a_run_computes_in_bf16(lab, takes):
    takes(3.0)
    runs = [lab.run("named", BF16, "train.precision=bf16"), lab.run("fp32")]
    for run in runs:
        lab.solo(run)
    assert losses(runs[0]) != losses(runs[1])


@pytest.mark.skipif(
    not torch.cpu._is_avx512_supported(),
    reason="instructions are taken away from a CPU with AVX512",
)
def test_what_is_measured_is_what_the_libraries_can_do():
    """oneDNN without AVX512 emulates bf16, on every CPU: 4.5 to 6 times fp32 where this was
    written."""
    env = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CODE], env=env, capture_output=True, text=True, check=True
    )
    assert float(done.stdout) > SLOW


@pytest.mark.skipif(
    not torch.cpu._is_avx512_bf16_supported(), reason="needs a CPU with bf16 of its own"
)
def test_a_cpu_with_bf16_is_not_called_slow():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert min(bf16_slowdown() for _ in range(3)) < SLOW
    finally:
        torch.set_num_threads(threads)
