"""What next-token objectives share: one term, the summed nll of a row over its trained tokens."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from rayft.core.batch import Batch
from rayft.core.protocols import Policy

NLL = "nll"


class NextToken:
    """Sum over the trained tokens of a row; which tokens those are, the labels say."""

    terms: tuple[str, ...] = (NLL,)

    def count(self, batch: Batch) -> dict[str, Tensor]:
        """{"nll": (B,) float64} trained tokens per row."""
        return {NLL: batch.tokens()}

    def loss(self, policy: Policy, batch: Batch, scale: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """{"nll": (B,) float32} summed negative log-likelihood per row, in nats."""
        return {NLL: policy.row_nll(batch, scale[NLL])}
