"""What is trainable: the specs. Their implementations live in rayft/methods/, one file each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from rayft.config.traits import MethodTraits, Quant, Site


class FullSpec(MethodTraits):
    """Every parameter trains."""

    site: ClassVar[Site] = "weights"
    keeps_base: ClassVar[bool] = False
    claims_all: ClassVar[bool] = True
    export_as: ClassVar[Literal["peft", "model"]] = "model"

    kind: Literal["full"] = "full"

    def quant_refusals(self) -> Mapping[Quant, str]:
        why = (
            "full fine-tuning trains the weights themselves, but model.quant: {run.model.quant} "
            "keeps them frozen in few bits; use a lora method, or model.quant: none"
        )
        return {"int8": why, "nf4": why}


class LoraSpec(MethodTraits):
    """Low-rank adapters beside linear layers (Hu et al. 2021); with lr_ratio it is LoRA+, on a
    quantised base QLoRA."""

    site: ClassVar[Site] = "linear"
    merges: ClassVar[bool] = True
    packs: ClassVar[bool] = True
    pack_free: ClassVar[tuple[str, ...]] = (
        "rank",
        "alpha",
        "dropout",
        "rslora",
        "dora",
        "lr_ratio",
    )

    kind: Literal["lora"] = "lora"
    rank: int = Field(default=16, ge=1, le=4096)
    """Rank r of the update B @ A."""
    alpha: float = Field(default=32.0, gt=0)
    """The update is scaled by alpha / rank (rslora: alpha / sqrt(rank))."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapter's input."""
    targets: str | tuple[str, ...] = "all-linear"
    """`all-linear` (all but the output head), a list of module-name endings, or one regular
    expression for full names."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) (Kalajdzievski 2023)."""
    dora: bool = False
    """Train magnitude and direction apart (Liu et al. 2024)."""
    lr_ratio: float = Field(default=1.0, gt=0)
    """Learning rate of B over that of A (LoRA+, Hayou et al. 2024); 1 is plain LoRA."""

    @property
    def deltas(self) -> bool:
        return not self.dora

    @property
    def reads_base(self) -> bool:
        return self.dora

    def quant_refusals(self) -> Mapping[Quant, str]:
        if not self.dora:
            return {}
        return {
            "int8": "dora cannot see the scales of int8 weights (bitsandbytes keeps them "
            "elsewhere); use model.quant: nf4, or dora: false"
        }


MethodSpec = Annotated[FullSpec | LoraSpec, Field(discriminator="kind")]
