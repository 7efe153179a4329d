"""One DeepSpeed config from the run's typed fields and the user's own dict or JSON file.

The user's mapping is merged *under* the typed fields: a key that both set must have one value
("auto" takes the run's), anything else the user says is kept. Rayft builds the optimizer and sets
the learning rate of every step itself, so an `optimizer` section may only repeat the run's AdamW
and a `scheduler` section is refused.
"""

from __future__ import annotations

import json
from pathlib import Path

from rayft.config.run import OptimSpec, TrainSpec
from rayft.config.strategies import ZeroSpec
from rayft.core.errors import ConfigError

AUTO = "auto"  # Hugging Face's "take it from the run"


def user_mapping(source: dict[str, object] | str | None) -> dict[str, object]:
    """The user's mapping: given as such, or read from a JSON file."""
    if source is None or isinstance(source, dict):
        return source or {}
    path = Path(source)
    try:
        data = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(
            f"cannot read the DeepSpeed config {source}: {error.strerror}",
            where="strategy.deepspeed",
        ) from error
    except ValueError as error:
        raise ConfigError(
            f"the DeepSpeed config is not JSON: {error}", where=f"strategy.deepspeed: {source}"
        ) from error
    if not isinstance(data, dict):
        raise ConfigError(
            "the DeepSpeed config must be a JSON object", where=f"strategy.deepspeed: {source}"
        )
    return data


def merge(user: dict[str, object], typed: dict[str, object], path: str = "") -> dict[str, object]:
    """`typed` over `user`; ConfigError names both values where they differ."""
    merged = {key: value for key, value in user.items() if value != AUTO}
    for key, value in typed.items():
        said = user.get(key, AUTO)
        where = f"{path}{key}"
        if isinstance(value, dict) and isinstance(said, dict):
            merged[key] = merge(said, value, f"{where}.")
        elif said in (AUTO, value):
            merged[key] = value
        else:
            raise ConfigError(
                f"DeepSpeed config says {where} = {said!r}, the run says {value!r}",
                where="strategy.deepspeed",
                fix=f"drop {where} there, or change the run's own field",
            )
    return _without_auto(merged)


def _without_auto(tree: dict[str, object]) -> dict[str, object]:
    """What is still "auto" has no value in a run: DeepSpeed's default applies."""
    return {
        key: _without_auto(value) if isinstance(value, dict) else value
        for key, value in tree.items()
        if value != AUTO
    }


def _offload(spec: ZeroSpec) -> dict[str, object]:
    if spec.offload == "none":
        return {}
    place: dict[str, object] = {"device": spec.offload}
    if spec.offload == "nvme":
        place["nvme_path"] = spec.nvme_path
    found: dict[str, object] = {"offload_optimizer": place}
    if spec.stage == 3:
        found["offload_param"] = place
    return found


def typed_fields(
    spec: ZeroSpec, optim: OptimSpec, train: TrainSpec, precision: str, micro_batch: int, world: int
) -> dict[str, object]:
    """What the run fixes, in DeepSpeed's words."""
    accumulation = max(1, -(-train.global_batch // (micro_batch * world)))
    bf16 = precision == "bf16"
    cast = bf16 and spec.stage > 0  # stage 0 keeps fp32 parameters under autocast, as ddp does
    fields: dict[str, object] = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": micro_batch * accumulation * world,
        "gradient_clipping": optim.clip or 0.0,
        "fp16": {"enabled": False},
        # Without the check, stages 1 and 2 apply a bf16 update whose norm is not finite.
        "bf16": {"enabled": cast, "check_grad_overflow": True} if cast else {"enabled": False},
        "zero_optimization": {"stage": spec.stage, **_offload(spec)},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": optim.lr,
                "betas": list(optim.betas),
                "eps": optim.eps,
                "weight_decay": optim.weight_decay,
                "torch_adam": True,
            },
        },
    }
    if bf16 and spec.stage == 0:
        fields["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    if cast:
        fields["data_types"] = {"grad_accum_dtype": "fp32"}
    return fields


def deepspeed_config(
    spec: ZeroSpec, optim: OptimSpec, train: TrainSpec, precision: str, micro_batch: int, world: int
) -> dict[str, object]:
    """The whole config for deepspeed.initialize, with an AdamW that the caller passes in.

    Raises ConfigError for a contradiction, a scheduler section, or an unreadable file.
    """
    user = user_mapping(spec.deepspeed)
    if "scheduler" in user:
        raise ConfigError(
            "DeepSpeed config has a scheduler, but rayft sets the learning rate of every step",
            where="strategy.deepspeed",
            fix="drop it there and use optim.schedule, optim.warmup and optim.min_lr_ratio",
        )
    config = merge(user, typed_fields(spec, optim, train, precision, micro_batch, world))
    config.pop("optimizer")  # compared above; the optimizer itself is rayft's
    if spec.stage == 0:
        config["gradient_clipping"] = 0.0  # rayft clips: DeepSpeed returns no norm at stage 0
    return {"steps_per_print": 2**31, "wall_clock_breakdown": False} | config
