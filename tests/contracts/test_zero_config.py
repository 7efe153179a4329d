"""The DeepSpeed config: typed fields first, the user's under them, contradictions refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rayft.config.run import OptimSpec, TrainSpec
from rayft.config.strategies import ZeroSpec
from rayft.core.errors import ConfigError, InfeasibleError
from rayft.strategies.zero_config import deepspeed_config

TRAIN = TrainSpec(steps=10, global_batch=32, micro_batch=4)


def config(user, optim: OptimSpec | None = None, **spec):
    zero = ZeroSpec(deepspeed=user, **spec)
    return deepspeed_config(zero, optim or OptimSpec(), TRAIN, "bf16", 4, 2)


def test_typed_fields_make_the_config() -> None:
    made = config(None, stage=2, offload="cpu")
    assert made["train_micro_batch_size_per_gpu"] == 4
    assert made["gradient_accumulation_steps"] == 4
    assert made["train_batch_size"] == 32
    assert made["gradient_clipping"] == 1.0
    assert made["bf16"]["enabled"] and not made["fp16"]["enabled"]
    assert made["zero_optimization"] == {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    assert "optimizer" not in made and "scheduler" not in made


def test_user_keys_are_kept_and_auto_is_filled(tmp_path: Path) -> None:
    user = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_clipping": 1.0,
        "bf16": {"enabled": "auto"},
        "zero_optimization": {
            "stage": "auto",
            "overlap_comm": True,
            "reduce_bucket_size": "auto",
        },
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": [0.9, 0.999]}},
    }
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(user))
    for source in (user, str(file)):
        made = config(source, stage=3)
        assert made["train_micro_batch_size_per_gpu"] == 4
        assert made["zero_optimization"] == {"stage": 3, "overlap_comm": True}
        assert made["bf16"]["enabled"] is True


@pytest.mark.parametrize(
    ("user", "path", "values"),
    [
        ({"zero_optimization": {"stage": 2}}, "zero_optimization.stage", ("2", "3")),
        ({"gradient_clipping": 0.5}, "gradient_clipping", ("0.5", "1.0")),
        ({"train_batch_size": 64}, "train_batch_size", ("64", "32")),
        ({"fp16": {"enabled": True}}, "fp16.enabled", ("True", "False")),
        ({"optimizer": {"type": "Lamb"}}, "optimizer.type", ("'Lamb'", "'AdamW'")),
        (
            {"optimizer": {"params": {"weight_decay": 0.1}}},
            "optimizer.params.weight_decay",
            ("0.1", "0.0"),
        ),
    ],
)
def test_contradiction_names_both_values(user, path: str, values: tuple[str, str]) -> None:
    with pytest.raises(ConfigError) as refused:
        config(user, stage=3)
    text = str(refused.value)
    assert path in text and all(value in text for value in values)
    assert len(text.splitlines()) <= 15


@pytest.mark.parametrize(
    ("text", "says"), [(None, "cannot read"), ("{", "not JSON"), ("[1]", "JSON object")]
)
def test_unusable_file_is_refused(tmp_path: Path, text: str | None, says: str) -> None:
    file = tmp_path / "ds.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=says):
        config(str(file))


def test_scheduler_section_is_refused() -> None:
    with pytest.raises(ConfigError, match="learning rate of every step"):
        config({"scheduler": {"type": "WarmupLR"}})


def test_nvme_without_async_io_is_infeasible(tmp_path: Path, monkeypatch) -> None:
    """Where libaio is installed there is nothing to refuse."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if AsyncIOBuilder().is_compatible(verbose=False):
        pytest.skip("async_io can be built here")
    from rayft.strategies.zero import _refuse_nvme

    with pytest.raises(InfeasibleError, match="async_io") as refused:
        _refuse_nvme()
    assert refused.value.exit_code == 4
