"""AdamW in named groups, and its schedule as a pure function of the step.

    m_t = b1 m_{t-1} + (1 - b1) g_t          v_t = b2 v_{t-1} + (1 - b2) g_t^2
    w_t = (1 - lr_t wd) w_{t-1} - lr_t (m_t / (1 - b1^t)) / (sqrt(v_t / (1 - b2^t)) + eps)

AdamW: Loshchilov & Hutter 2019 (arXiv 1711.05101), as torch computes it. 8-bit states: Dettmers et
al. 2022 (arXiv 2110.02861), as bitsandbytes computes them. Schedules: the shapes of
transformers.get_scheduler.
Units: lr per step, `warmup` in steps or as a share of all steps, norms in the units of the loss.
Left out: learning-rate scheduler objects (their state is the step number, which the run knows),
other optimizers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from rayft.config.run import OptimSpec
from rayft.core.protocols import ParamGroup

MOMENTS = ("exp_avg", "exp_avg_sq")  # torch's names of m and v, and the kinds of a checkpoint


def param_groups(groups: list[ParamGroup], optim: OptimSpec) -> list[dict[str, object]]:
    """Torch param groups in the order of `groups`, each with its "name".

    Raises RuntimeError where a method broke its contract: an empty group (DeepSpeed drops it and
    shifts the others' learning rates), a name used twice, a parameter in two groups, or one that
    does not require gradients.
    """
    seen: set[int] = set()
    for group in groups:
        if not group.params:
            raise RuntimeError(f"parameter group {group.name!r} is empty")
        for param in group.params:
            if not param.requires_grad:
                raise RuntimeError(f"parameter group {group.name!r} holds a frozen parameter")
            if id(param) in seen:
                raise RuntimeError(f"a parameter of group {group.name!r} is in two groups")
            seen.add(id(param))
    names = [group.name for group in groups]
    if not names or len(set(names)) != len(names):
        raise RuntimeError(f"parameter groups must have distinct names, got {names}")
    return [
        {
            "name": group.name,
            "params": list(group.params),
            "lr": optim.lr * group.lr_ratio,
            "weight_decay": optim.weight_decay if group.decay else 0.0,
        }
        for group in groups
    ]


def build_optimizer(groups: list[ParamGroup], optim: OptimSpec) -> torch.optim.Optimizer:
    """The optimizer of `optim.kind` over `groups`; AdamW is torch's fused one, on CPU too (3 to 4
    times as fast there: `experiments/bench/train.py trl` shows it in whole steps)."""
    params = param_groups(groups, optim)
    if optim.kind == "adamw":
        return torch.optim.AdamW(params, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)
    import bitsandbytes as bnb  # slow to import, and only these two kinds need it

    kind = {"adamw_8bit": bnb.optim.AdamW8bit, "paged_adamw_8bit": bnb.optim.PagedAdamW8bit}
    return kind[optim.kind](params, lr=optim.lr, betas=optim.betas, eps=optim.eps)


def adam_state(optimizer: torch.optim.Optimizer, param: Tensor) -> dict[str, Tensor]:
    """AdamW's state of `param`, created as torch would create it at the first step."""
    state = optimizer.state[param]
    if not state:
        # the fused kernel wants its step counter beside the parameter
        state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
        for kind in MOMENTS:
            state[kind] = torch.zeros_like(param, memory_format=torch.preserve_format)
    return state


def group_lrs(groups: Iterable[ParamGroup], lr: float) -> dict[str, float]:
    """{group name: lr * lr_ratio}."""
    return {group.name: lr * group.lr_ratio for group in groups}


def set_lrs(optimizer: torch.optim.Optimizer, lrs: Mapping[str, float]) -> None:
    """Give every group of `optimizer` its learning rate by name; names must match exactly."""
    names = {group["name"] for group in optimizer.param_groups}
    if names != set(lrs):
        raise RuntimeError(f"learning rates for {sorted(lrs)}, but the groups are {sorted(names)}")
    for group in optimizer.param_groups:
        group["lr"] = lrs[group["name"]]


def read_lrs(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """{group name: lr} as the optimizer itself holds them."""
    return {group["name"]: float(group["lr"]) for group in optimizer.param_groups}


def assert_groups(optimizer: torch.optim.Optimizer, groups: list[ParamGroup], lr: float) -> None:
    """Raise RuntimeError unless `optimizer` holds exactly `groups`, in order, with their rates.

    DeepSpeed rebuilds param groups; before torch 2.10 a dropped one silently moved learning rates
    to other parameters.
    """
    held = [(group["name"], float(group["lr"])) for group in optimizer.param_groups]
    wanted = list(group_lrs(groups, lr).items())
    if held != wanted:
        raise RuntimeError(f"the optimizer holds groups {held}, the methods declared {wanted}")


def schedule(optim: OptimSpec, total_steps: int) -> Callable[[int], float]:
    """factor(step) of the peak learning rate for the 1-based `step`.

    factor(step) is what transformers' scheduler gives to the step-th update: its lambda at
    step - 1. Warm-up rises linearly from 0 (first update) and reaches 1 after `warmup` updates;
    linear and cosine then fall to `min_lr_ratio` at `total_steps`.
    """
    warmup = math.ceil(total_steps * optim.warmup) if optim.warmup < 1 else round(optim.warmup)
    floor = optim.min_lr_ratio

    def factor(step: int) -> float:
        done = step - 1
        if done < warmup:
            return done / warmup
        if optim.schedule == "constant":
            return 1.0
        progress = min(1.0, (done - warmup) / max(1, total_steps - warmup))
        falling = (
            1.0 - progress
            if optim.schedule == "linear"
            else 0.5 * (1.0 + math.cos(math.pi * progress))
        )
        return floor + (1.0 - floor) * falling

    return factor


def clipped_step(
    optimizer: torch.optim.Optimizer, params: list[nn.Parameter], clip: float | None
) -> Tensor:
    """Clip the gradients of replicated `params` to global norm `clip` and update; the norm before,
    a scalar.

    A non-finite norm (any NaN or infinity in any gradient) leaves parameters and moments as they
    were. Gradients are zeroed either way.
    """
    norm = clip_gradients(optimizer, params, clip)
    if isinstance(optimizer, torch.optim.AdamW) or math.isfinite(float(norm)):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def clip_gradients(
    optimizer: torch.optim.Optimizer, params: list[nn.Parameter], clip: float | None
) -> Tensor:
    """Scale the gradients of replicated `params` to a 2-norm of at most `clip`, all together; the
    norm before. The next step of a fused AdamW does nothing where it is not finite: it asks on the
    device, so the host does not wait (torch.amp.GradScaler tells it the same way). The 8-bit
    optimizers of bitsandbytes cannot ask.

    TrialSlot.update does the same for a trial of a pack, but not to the same bits, so it cannot be
    this function: its norm has come to the host with those of all trials, and its factor is a
    double; here both stay tensors in the precision of the gradients.
    """
    norm = torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
    if clip is not None:
        torch.nn.utils.clip_grads_with_norm_(params, clip, norm)
    if isinstance(optimizer, torch.optim.AdamW):
        found = torch.isfinite(norm).logical_not().float()
        # torch.optim reads this attribute at every step and declares it nowhere
        optimizer.found_inf = found  # pyright: ignore[reportAttributeAccessIssue]
    return norm
