"""How a step happens: the specs. Their implementations live in rayft/strategies/."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from rayft.config.traits import StrategyTraits

PRESETS: dict[str, dict[str, Any]] = {
    "ddp": {"kind": "ddp"},
    "zero0": {"kind": "zero", "stage": 0},
    "zero1": {"kind": "zero", "stage": 1},
    "zero2": {"kind": "zero", "stage": 2},
    "zero2_offload": {"kind": "zero", "stage": 2, "offload": "cpu"},
    "zero3": {"kind": "zero", "stage": 3},
    "zero3_offload": {"kind": "zero", "stage": 3, "offload": "cpu"},
}


class DdpSpec(StrategyTraits):
    """torch DistributedDataParallel: every worker holds everything (one worker: no wrapper)."""

    elastic: ClassVar[bool] = True
    packs: ClassVar[bool] = True
    block_optimizers: ClassVar[bool] = True

    kind: Literal["ddp"] = "ddp"


class ZeroSpec(StrategyTraits):
    """DeepSpeed ZeRO (Rajbhandari et al. 2019): optimizer state (1), gradients (2) and parameters
    (3) sharded."""

    kind: Literal["zero"] = "zero"
    stage: Literal[0, 1, 2, 3] = 2
    """What is sharded over the workers."""
    offload: Literal["none", "cpu", "nvme"] = "none"
    """Where optimizer state (stage 3: parameters too) lives."""
    nvme_path: str | None = None
    """Folder on a local NVMe disk, for offload: nvme."""
    deepspeed: dict[str, Any] | str | None = None
    """A DeepSpeed config (dict, or JSON file) merged under the typed fields; a contradiction is an
    error."""

    @property
    def shards(self) -> int:
        return self.stage

    @property
    def offloads(self) -> Literal["none", "cpu", "nvme"]:
        return self.offload


StrategySpec = Annotated[DdpSpec | ZeroSpec, Field(discriminator="kind")]
