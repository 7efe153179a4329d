"""Several methods on one model: freeze everything, apply in order, train exactly what they
return."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from rayft.core.errors import ConfigError
from rayft.core.protocols import Method, ParamGroup


def apply_all(
    model: PreTrainedModel, methods: Sequence[Method], *, seed: int = 0
) -> list[ParamGroup]:
    """Change `model` in place; the groups of all methods, in order.

    Afterwards requires_grad is true on exactly the parameters of the groups.

    Args:
        model: the base model.
        methods: at least one; each kind once.
        seed: of freshly drawn adapters; the global random state is left as it was.

    Raises:
        ConfigError: two methods of one kind, two groups of one name, an empty group, or a parameter
            in two groups.
    """
    kinds = Counter(type(method).__name__.lower() for method in methods)
    for kind, count in kinds.items():
        if count > 1:
            raise ConfigError(
                f"methods lists {kind} {count} times",
                fix=f"give one entry of kind {kind}; its targets may be a list",
            )
    model.requires_grad_(False)
    groups: list[ParamGroup] = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for method in methods:
            groups += method.apply(model)
    _check(model, groups)
    model.requires_grad_(False)
    for group in groups:
        for param in group.params:
            param.requires_grad_(True)
    return groups


def _check(model: nn.Module, groups: list[ParamGroup]) -> None:
    names = {param: name for name, param in model.named_parameters()}
    owner: dict[nn.Parameter, str] = {}
    seen: set[str] = set()
    for group in groups:
        if group.name in seen:
            raise ConfigError(f"two methods train a parameter group named {group.name}")
        if not group.params:
            raise ConfigError(f"the parameter group {group.name} is empty")
        seen.add(group.name)
        for param in group.params:
            if param in owner:
                raise ConfigError(
                    f"{names[param]} is trained twice: by {owner[param]} and by {group.name}",
                    cause="two methods claim the same parameter",
                    fix="remove one of them, or narrow its targets",
                )
            owner[param] = group.name
