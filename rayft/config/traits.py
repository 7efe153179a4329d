"""What a technique can do, said on its spec: the traits that rules, packs, data, the grid of all
combinations and the README's table of support go by. Nobody asks a spec for its type.

A trait is a class variable; what depends on a spec's own fields (DoRA on int8) is a method.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from rayft.config.base import Spec

Quant = Literal["none", "int8", "nf4"]
QUANTS: tuple[Quant, ...] = ("none", "int8", "nf4")

Site = Literal["weights", "linear", "block", "attention", "input", "head"]
"""Where a method acts. Methods are applied in this order, the weights first: what is built around a
layer comes after what changes the layer."""
SITES: tuple[Site, ...] = ("weights", "linear", "block", "attention", "input", "head")

Reads = Literal["text", "completion", "pair", "rated", "label"]
"""Rows of an objective: every token, an answer after a prompt, two answers of one prompt, an answer
that somebody liked or not, a class or a value."""


class MethodTraits(Spec):
    """Of what is trainable."""

    site: ClassVar[Site]
    keeps_base: ClassVar[bool] = True
    """The base's weights never change: it can be had back, and others can share it."""
    starts_as_base: ClassVar[bool] = True
    """Before the first step the model computes what the base computes."""
    claims_all: ClassVar[bool] = False
    """Trains every weight there is, so that nothing can stand beside it."""
    merges: ClassVar[bool] = False
    """What it has learnt can become part of the base's own weights."""
    packs: ClassVar[bool] = False
    """Many trials of it can share a base (rayft/trials)."""
    pack_free: ClassVar[tuple[str, ...]] = ()
    """Fields that the trials of one pack may differ in."""
    export_as: ClassVar[Literal["peft", "model"]] = "peft"
    """What it leaves to take away: an adapter in PEFT's layout, or a whole model."""

    @property
    def deltas(self) -> bool:
        """What it adds to each weight, W - W0, can be had without W0: weight penalties work on
        it."""
        return False

    @property
    def reads_base(self) -> bool:
        """Its forward pass reads the weights that it adapts, not only what they compute."""
        return False

    def quant_refusals(self) -> Mapping[Quant, str]:
        """{model.quant: why this spec cannot train on such a base, and what to do}."""
        return {}


class ObjectiveTraits(Spec):
    """Of what is minimised."""

    reads: ClassVar[Reads]
    metrics: ClassVar[tuple[str, ...]] = ("loss",)
    """What an evaluation reports, each as eval_<name>; the loss comes first."""
    new_head: ClassVar[bool] = False
    """Puts a head of its own where the vocabulary's was."""
    reference: ClassVar[bool] = False
    """Needs a second model to compare with."""
    packs: ClassVar[bool] = False
    """Looks at a trial's own rows alone, so that trials can share a base."""
    row_packing: ClassVar[bool] = True
    """Several documents may stand in one row (data.packing)."""

    @property
    def trains_prompts(self) -> bool:
        """Every token of a document is a target, not those of its answers alone."""
        return self.reads == "text"


class StrategyTraits(Spec):
    """Of how a step happens."""

    elastic: ClassVar[bool] = False
    """The number of workers may change on the way."""
    packs: ClassVar[bool] = False
    """Its run may be a trial of a pack."""
    block_optimizers: ClassVar[bool] = False
    """Takes optimizers that keep their state in blocks (8 bits)."""

    @property
    def shards(self) -> int:
        """What is cut over the workers: 0 nothing, 1 optimizer state, 2 gradients too, 3 parameters
        too."""
        return 0

    @property
    def offloads(self) -> Literal["none", "cpu", "nvme"]:
        """Where optimizer state lives."""
        return "none"
