"""What is minimised: the specs. Their implementations live in rayft/objectives/."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from rayft.config.traits import ObjectiveTraits, Reads


class SftSpec(ObjectiveTraits):
    """Supervised fine-tuning: next-token loss on completions (assistant turns) only."""

    reads: ClassVar[Reads] = "completion"
    metrics: ClassVar[tuple[str, ...]] = ("loss", "ppl")
    packs: ClassVar[bool] = True

    kind: Literal["sft"] = "sft"
    train_on_prompt: bool = False
    """Also train on prompts and user turns."""

    @property
    def trains_prompts(self) -> bool:
        return self.train_on_prompt


class LmSpec(ObjectiveTraits):
    """Language modelling on plain text: next-token loss on every token (continued pre-training)."""

    reads: ClassVar[Reads] = "text"
    metrics: ClassVar[tuple[str, ...]] = ("loss", "ppl")
    packs: ClassVar[bool] = True

    kind: Literal["lm"] = "lm"


ObjectiveSpec = Annotated[SftSpec | LmSpec, Field(discriminator="kind")]
