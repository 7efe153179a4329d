"""What is trainable: the specs. Their implementations live in rayft/methods/, one file each."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from rayft.config.base import Spec


class FullSpec(Spec):
    """Every parameter trains."""

    kind: Literal["full"] = "full"


class LoraSpec(Spec):
    """Low-rank adapters beside linear layers (Hu et al. 2021); with lr_ratio it is LoRA+, on a
    quantised base QLoRA."""

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


MethodSpec = Annotated[FullSpec | LoraSpec, Field(discriminator="kind")]
