"""Load and freeze the base model; the policy that objectives see."""

from __future__ import annotations

from rayft.models.generate import generate
from rayft.models.load import (
    ModelFacts,
    check_vocabulary,
    load_model,
    load_tokenizer,
    model_facts,
)
from rayft.models.policy import CausalPolicy

__all__ = [
    "CausalPolicy",
    "ModelFacts",
    "check_vocabulary",
    "generate",
    "load_model",
    "load_tokenizer",
    "model_facts",
]
