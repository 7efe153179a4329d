"""Language modelling on plain text (continued pre-training, Gururangan et al. 2020).

    L = - (1 / sum_b n_b) sum_b sum_{t=1}^{T_b - 1} log p(x_t | x_<t),    n_b = T_b - 1

Every token but a document's first is trained; the data room writes the labels so. Shapes: rows (B,)
of sums in nats; the loop divides once by the global token count. Left out: z-loss, label smoothing.
"""

from __future__ import annotations

from rayft.objectives.base import NextToken


class Lm(NextToken):
    """See the head of this file."""
