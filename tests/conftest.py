"""Fixtures of every room."""

from __future__ import annotations

import pytest


@pytest.fixture(params=[0, 1], ids=["no-avx512bf16", "avx512bf16"])
def cpu_reading(request, monkeypatch) -> int | None:
    """What bitsandbytes finds out about the CPU whenever it makes a 4-bit layer: one answer, then
    the other, whatever CPU runs the tests. None (by `indirect`) leaves it its own."""
    if request.param is not None:
        monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: request.param)
    return request.param
