"""What next-token objectives share: one term, the summed nll of a row over its trained tokens."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from rayft.config.traits import ObjectiveTraits
from rayft.core.batch import Batch
from rayft.core.protocols import LossContext, Policy
from rayft.core.row_facts import RowFacts

NLL = "nll"


class NextToken:
    """Sum over the trained tokens of a row; which tokens those are, the labels say."""

    terms: Mapping[str, float] = {NLL: 1.0}

    def __init__(self, spec: ObjectiveTraits) -> None:
        self.metrics = spec.metrics

    def head(self, width: int) -> nn.Module | None:
        """The vocabulary's own."""
        return None

    def count(self, rows: RowFacts) -> dict[str, Tensor]:
        """{"nll": (n,) float64} trained tokens per row."""
        return {NLL: rows.trained}

    def loss(
        self, policy: Policy, batch: Batch, scale: Mapping[str, Tensor], context: LossContext
    ) -> dict[str, Tensor]:
        """{"nll": (B,) float32} summed negative log-likelihood per row, in nats."""
        return {NLL: policy.row_nll(batch, scale[NLL])}

    def measure(
        self, policy: Policy, batch: Batch, context: LossContext
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """{"nll": (nats, trained tokens)} per row."""
        counts = batch.tokens()
        return {NLL: (policy.row_nll(batch, counts.new_ones(batch.rows)), counts)}
