"""What next-token objectives share: one term, the summed nll of a row over its trained tokens."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from rayft.core.batch import Batch
from rayft.core.protocols import Policy
from rayft.core.row_facts import RowFacts

NLL = "nll"


class NextToken:
    """Sum over the trained tokens of a row; which tokens those are, the labels say."""

    terms: tuple[str, ...] = (NLL,)

    def count(self, rows: RowFacts) -> dict[str, Tensor]:
        """{"nll": (n,) float64} trained tokens per row."""
        return {NLL: rows.trained}

    def loss(self, policy: Policy, batch: Batch, scale: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """{"nll": (B,) float32} summed negative log-likelihood per row, in nats."""
        return {NLL: policy.row_nll(batch, scale[NLL])}
