"""Peak rate of a device in dense bf16, by its name; unknown ones get no MFU."""

from __future__ import annotations

import torch

# TFLOP/s without sparsity, from NVIDIA's data sheets. The first name that occurs is taken: special
# boards stand before what their names contain.
DENSE_BF16 = (
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("GH200", 990.0),
    ("H200", 989.0),
    ("H100", 989.0),
    ("A100", 312.0),
    ("L40S", 362.0),
    ("A10G", 70.0),
    ("A10", 125.0),
    ("L4", 121.0),
    ("RTX 4090", 165.2),
)


def peak_of(device: str) -> tuple[float | None, str]:
    """(TFLOP/s or None, why there is none)."""
    if device != "cuda":
        return None, "a CPU has no peak that is known here"
    name = torch.cuda.get_device_name()
    for known, peak in DENSE_BF16:
        if known in name:
            return peak, ""
    return None, f"the peak of {name} is not known here"
