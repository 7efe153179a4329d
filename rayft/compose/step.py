"""TrainStep: policy and objective as one module, so that wrappers (DDP, DeepSpeed) see one
forward."""

from __future__ import annotations

from torch import Tensor, nn

from rayft.core.batch import Batch
from rayft.core.protocols import Objective
from rayft.models.policy import CausalPolicy

PREFIX = "policy.model."  # parameter names of the step module, less this, are the model's own names


class TrainStep(nn.Module):
    """forward(tensors, packed, scale) -> {term: (B,) per-row sums}."""

    def __init__(self, policy: CausalPolicy, objective: Objective) -> None:
        super().__init__()
        self.policy = policy
        self.objective = objective

    def forward(
        self, tensors: dict[str, Tensor], packed: bool, scale: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Rebuild the batch (wrappers carry plain dicts) and let the objective look at it."""
        return self.objective.loss(self.policy, Batch(**tensors, packed=packed), scale)
