"""TrainStep: policy and objective as one module, so that wrappers (DDP, DeepSpeed) see one
forward."""

from __future__ import annotations

from torch import Tensor, nn

from rayft.core.batch import Batch, Inputs
from rayft.core.protocols import LossContext, Objective
from rayft.models.policy import CausalPolicy

PREFIX = "policy.model."  # parameter names of the step module, less this, are the model's own names

Rows = dict[str, Tensor]
Measures = dict[str, tuple[Tensor, Tensor]]


class TrainStep(nn.Module):
    """forward(inputs of a batch, scale) -> {term: (B,) sums per row}; without `scale` it measures:
    {name: (sums (B,), counts (B,))}."""

    def __init__(self, policy: CausalPolicy, objective: Objective) -> None:
        super().__init__()
        self.policy = policy
        self.objective = objective
        self._context = LossContext()

    def forward(self, inputs: Inputs, scale: dict[str, Tensor] | None) -> Rows | Measures:
        """Rebuild the batch (wrappers carry plain dicts) and let the objective look at it."""
        batch = Batch.of(inputs)
        if scale is None:
            return self.objective.measure(self.policy, batch, self._context)
        return self.objective.loss(self.policy, batch, scale, self._context)
