"""Supervised fine-tuning: next-token loss on completions only (Ouyang et al. 2022, section 3.4).

    L = - (1 / sum_b |C_b|) sum_b sum_{t in C_b} log p(x_t | x_<t)

C_b: the completion's (assistant turns') tokens of row b, end-of-turn token included; the data room
writes IGNORE elsewhere. Every token weighs the same whatever the length of its row. Shapes: rows
(B,) of sums in nats; the loop divides once by the global token count. Left out: per-sequence means.
"""

from __future__ import annotations

from rayft.objectives.base import NextToken


class Sft(NextToken):
    """See the head of this file."""
