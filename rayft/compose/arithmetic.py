"""What `train.precision: auto` computes in where a CPU has no bf16 arithmetic of its own.

Such a CPU (no AMX, no AVX512-BF16) emulates bf16: a product takes 2.5 times as long as in fp32 with
AVX512, 4.5 to 6 times with AVX2, up to 19 times below that (its transpose worse); with AVX512-BF16
it takes half as long (AMD Zen 4, one thread; `bf16_slowdown` under ONEDNN_MAX_CPU_ISA).
"""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from rayft.config.run import Run

SLOW = 1.2  # times fp32; CPUs measure 0.5 or above 2
_SHAPE = (128, 256, 256)  # rows, d_in, d_out: large enough to be arithmetic, a millisecond at most
_REPEATS = 7


def bf16_slowdown() -> float:
    """Time of a linear layer in bf16 over its time in fp32, on the CPU with this process's threads.
    Measured, not read from flags: what counts is what torch's libraries make of the CPU. 5 to 50
    ms."""
    rows, d_in, d_out = _SHAPE
    x, weight = torch.ones(rows, d_in), torch.ones(d_out, d_in)

    def best(dtype: torch.dtype) -> float:
        one, two = x.to(dtype), weight.to(dtype)
        seconds = []
        for _ in range(_REPEATS):  # the first ones also choose a kernel
            began = time.perf_counter()
            torch.nn.functional.linear(one, two)
            seconds.append(time.perf_counter() - began)
        return min(seconds)

    with torch.no_grad():
        return best(torch.bfloat16) / best(torch.float32)


def settled(run: Run, device: torch.device) -> tuple[Run, str]:
    """`run` as it is computed on this device, and one line for the user (or ""). Collective where
    it computes in bf16 on CPUs: the slowest rank decides for all.

    `train.precision: auto` follows model.dtype, but not to bf16 on a CPU that is slow at it: there
    the base is loaded and exported in fp32, at twice the memory. What the user asked for by name
    stays.
    """
    bf16 = "bf16" in (run.model.dtype, run.train.precision)
    if not bf16 or device.type != "cpu":
        return run, ""
    slowdown = torch.tensor(bf16_slowdown())
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(slowdown, op=dist.ReduceOp.MAX)
    if slowdown < SLOW:
        return run, ""
    said = f"bf16 is {slowdown:.1f} times as slow as fp32 on this CPU"
    if run.train.precision != "auto":
        return run, f"{said}; model.dtype: fp32 with train.precision: auto would be faster"
    model = run.model.model_copy(update={"dtype": "fp32"})
    said += ": train.precision auto computes in fp32, with the base in fp32 (twice the memory)"
    return run.model_copy(
        update={"model": model}
    ), f"{said}; to insist on bf16: train.precision=bf16"
