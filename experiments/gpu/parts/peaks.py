"""Peak rate of a device in dense bf16, by its name; unknown ones get no MFU."""

from __future__ import annotations

# TFLOP/s without sparsity, from NVIDIA's data sheets. The first whose words are in the name is
# taken, so special boards stand before what their names contain.
DENSE_BF16 = (
    ("H200 NVL", 835.0),
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("GH200", 990.0),
    ("H200", 989.0),
    ("H100", 989.0),
    ("A100", 312.0),
    ("L40S", 362.0),
    ("A10", 125.0),
    ("L4", 121.0),
)


def peak_of(name: str) -> float | None:
    """TFLOP/s of the device that calls itself so, where it is known: whole words, as an L40 is no
    L4."""
    words = f" {name.replace('-', ' ')} "
    return next((peak for known, peak in DENSE_BF16 if f" {known} " in words), None)
