"""What is minimised: the specs. Their implementations live in rayft/objectives/."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from rayft.config.base import Spec


class SftSpec(Spec):
    """Supervised fine-tuning: next-token loss on completions (assistant turns) only."""

    kind: Literal["sft"] = "sft"
    train_on_prompt: bool = False
    """Also train on prompts and user turns."""


class LmSpec(Spec):
    """Language modelling on plain text: next-token loss on every token (continued pre-training)."""

    kind: Literal["lm"] = "lm"


ObjectiveSpec = Annotated[SftSpec | LmSpec, Field(discriminator="kind")]
