"""Dead gradients are an error, not a bad loss: what is looked at in the first steps of an attempt.

After the first backward pass every trained parameter must have been given a gradient (a tensor;
all zeros is legal, as LoRA's A has them while B is zero). After the second update at a learning
rate above zero every parameter group must have moved in that update. And at any step, a backward
pass that meets an operator without one stops the run, where torch only warns and drops the
gradient.

It costs a hook per parameter in the first step, and two looks at a few elements of each parameter
with one small all-reduce; nothing after that. A tensor that a step may legally leave out (the
experts of a mixture that are not one tensor, and got no token in the first step) would be refused
too: DDP needs every parameter in every step anyway.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from rayft.compose.step import PREFIX
from rayft.core.errors import DeadGradientError
from rayft.core.protocols import Engine, ParamGroup
from rayft.core.reduce import sum_over_ranks

SAMPLE = 64  # elements of each parameter on each rank
ENOUGH = 16  # elements of a group that can show an update; with fewer nothing is said
SHOWN = 3  # names per group in an error
LAST_PLACE = 2.0**-23  # of float32, relative
# torch/csrc/autograd/autograd_not_implemented_fallback.cpp; a test holds the words
_NO_BACKWARD = r"(?s).*an autograd kernel was not registered"


class GradientCheck:
    """Of one rank of a run. Made after the strategy has prepared the model, before the first step.

    Args:
        step: the step module; names are its own.
        groups: what trains.
    """

    def __init__(self, step: nn.Module, groups: Iterable[ParamGroup], engine: Engine) -> None:
        refuse_missing_backward()
        owner = {id(param): group.name for group in groups for param in group.params}
        named = {name: param for name, param in step.named_parameters() if id(param) in owner}
        self._group_of = {name: owner[id(param)] for name, param in named.items()}
        self._engine = engine
        self._without = set(named)  # a gradient so far
        # Strategies free, cut and move gradients as they come, but autograd calls these hooks on
        # every leaf that it gives one to, under all of them.
        self._hooks = [
            param.register_post_accumulate_grad_hook(partial(self._arrived, name))
            for name, param in named.items()
        ]
        self._movement = GroupMovement(self._group_of, engine.device)

    def _arrived(self, name: str, _param: nn.Parameter) -> None:
        self._without.discard(name)

    def after_backward(self, step: int) -> None:
        """Raises DeadGradientError where a parameter got no gradient in the first step."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self._without:
            dead = {name: self._group_of[name] for name in sorted(self._without)}
            raise no_gradient(dead, len(self._group_of), f"rank {self._engine.rank}, step {step}")

    def after_update(self, step: int, lrs: Mapping[str, float], tokens: int) -> None:
        """All ranks must call it."""
        if self._movement.looking:
            self._movement.look(step, lrs, tokens, self._pieces)

    def _pieces(self) -> dict[str, Tensor]:
        return {name: one.tensors["param"] for name, one in self._engine.shard().slices.items()}


class GroupMovement:
    """Whether every group moves, from a few elements of each parameter.

    Args:
        group_of: {parameter name: group name}.
    """

    def __init__(self, group_of: Mapping[str, str], device: torch.device) -> None:
        self._group_of, self._device = group_of, device
        self._groups = list(dict.fromkeys(group_of.values()))
        self._before: dict[str, Tensor] | None = None
        self.looking = True

    def look(
        self,
        step: int,
        lrs: Mapping[str, float],
        tokens: int,
        pieces: Callable[[], Mapping[str, Tensor]],
    ) -> None:
        """After an update: remember some elements after the first one that counts, compare after
        the second, then look no more. LoRA's A needs the second: the first moves only B.

        Args:
            lrs: by group, of this update; none counts while a warm-up is at zero.
            tokens: trained in this step; a step without any moves nothing and does not count.
            pieces: this rank's part of each parameter, by name.

        Raises:
            DeadGradientError: a group stood still, on all ranks.
        """
        if not tokens or not any(lrs.values()):
            return
        now = {name: _sampled(tensor) for name, tensor in pieces().items()}
        if self._before is None:
            self._before = now
            return
        self.looking = False
        found = torch.zeros(2, len(self._groups), dtype=torch.float64)
        for name, before in self._before.items():
            group = self._group_of[name]
            at = self._groups.index(group)
            # An update far below what float32 can add to a weight would not be seen.
            fine = before.abs() * LAST_PLACE < 0.01 * lrs[group]
            found[0, at] += float((now[name] != before).sum())
            found[1, at] += float(fine.sum())
        self._before = None
        moved, fine = sum_over_ranks(found, self._device)
        still = [
            group
            for group, changed, seen in zip(self._groups, moved, fine, strict=True)
            if not changed and seen >= ENOUGH
        ]
        if still:
            names = {name: group for name, group in self._group_of.items() if group in still}
            raise no_movement(names, step)


def _sampled(tensor: Tensor) -> Tensor:
    """Up to SAMPLE elements, evenly spread; a copy."""
    flat = tensor.detach().reshape(-1)
    stride = max(1, flat.numel() // SAMPLE)
    return flat[stride // 2 :: stride][:SAMPLE].clone()


def refuse_missing_backward() -> None:
    """For this process: torch's warning that a backward pass met an operator without one (and
    dropped the gradient) is an error; `dead_graphs_named` gives it its words."""
    warnings.filterwarnings("error", message=_NO_BACKWARD, category=UserWarning)


@contextmanager
def dead_graphs_named(where: str) -> Generator[None]:
    """Around backward passes.

    Raises:
        DeadGradientError: instead of the warning of `refuse_missing_backward`.
    """
    try:
        yield
    except UserWarning as warning:
        if re.match(_NO_BACKWARD, str(warning)) is None:
            raise
        operator = str(warning).split(": an autograd")[0]
        raise DeadGradientError(
            f"the backward pass met {operator}, which has none: the gradient ends there",
            where=where,
            cause="a layer of the base model runs a kernel that is meant for inference",
            fix="report it with `rayft check`'s output, your CPU or GPU, and the versions of torch "
            "and of the library that the operator is from",
        ) from warning


def no_gradient(dead: Mapping[str, str], total: int, where: str) -> DeadGradientError:
    """`dead`: {parameter name: group name}, of `total` trained parameters."""
    head = f"{len(dead)} of {total} trained parameters got no gradient in the first backward pass:"
    return DeadGradientError(
        "\n".join([head, *_by_group(dead)]),
        where=where,
        cause="no path of autograd leads from the loss to them: the forward pass never calls their "
        "module, or detaches what it computes",
        fix="leave them out of the methods (methods.0.targets), or mend the model's forward pass",
    )


def no_movement(names: Mapping[str, str], step: int) -> DeadGradientError:
    """`names`: {parameter name: group name} of the groups that stood still."""
    groups = list(dict.fromkeys(names.values()))
    head = f"parameter group {' and '.join(groups)} did not move in two updates:"
    return DeadGradientError(
        "\n".join([head, *_by_group(names)]),
        where=f"step {step}",
        cause="all its gradients are exactly zero, or the optimizer updates something else",
        fix="look at lr and grad_norm in metrics.jsonl; leave the group out of the methods if it "
        "is not meant to train",
    )


def _by_group(names: Mapping[str, str]) -> Sequence[str]:
    """One line per group, with a few of its names."""
    lines = []
    for group in dict.fromkeys(names.values()):
        own = [name.removeprefix(PREFIX) for name, its in names.items() if its == group]
        more = f" and {len(own) - SHOWN} more" if len(own) > SHOWN else ""
        lines.append(f"  {group}: {', '.join(own[:SHOWN])}{more}")
    return lines
