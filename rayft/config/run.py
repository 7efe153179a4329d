"""Run: one fine-tuning run, as the user writes it."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from rayft.config.base import STEPS, Address, Spec
from rayft.config.data import DataSpec, SourceSpec
from rayft.config.methods import FullSpec, LoraSpec, MethodSpec
from rayft.config.objectives import ObjectiveSpec, SftSpec
from rayft.config.penalties import Penalties
from rayft.config.strategies import PRESETS, DdpSpec, StrategySpec, ZeroSpec
from rayft.config.sweep import SweepSpec
from rayft.core.errors import ConfigError

WORKERS = 100_000


_FREE = {
    "scale": True,
    "storage": True,
    "trackers": True,
    "sweep": True,
    "data": {"cache"},
    "train": {"keep", "micro_batch", "eval_batch", "log_every"},
    "strategy": {"offload", "nvme_path"},  # where state lies changes no number
}
_FREE_IN_SWEEP = {"trials", "max_seconds", "target", "pack", "slots", "packs", "seeds", "refit"}
"""Fields that may change when a run or a sweep is continued."""
_LATER_IN_SWEEP: dict[str, dict[str, object]] = {
    "search": {"prior": []},
    "scheduler": {"promote": False},
}
"""Fields that came after sweeps had been begun without them: at these values, their defaults, they
leave a sweep's identity as it was, so that it can be continued."""


class ModelSpec(Spec):
    """The base model."""

    path: str
    """Hub id, local folder, or builtin:tiny."""
    revision: str | None = None
    """Hub revision (branch, tag or commit)."""
    tokenizer: str | None = None
    """Hub id or folder of another tokenizer; default: the model's own."""
    chat_template: str | None = None
    """Jinja text, or a file that holds it; default: the tokenizer's own."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Of the base weights and of the arithmetic; trained parameters keep an fp32 master copy."""
    quant: Literal["none", "int8", "nf4"] = "none"
    """Quantisation of the frozen base by bitsandbytes."""
    double_quant: bool = True
    """Quantise nf4's block constants too (saves 0.37 bit per parameter)."""
    attention: Literal["sdpa", "flash_attention_2", "eager"] = "sdpa"
    """Attention implementation of transformers."""
    trust_remote_code: bool = False
    """Run code that comes with the model. Read it first."""
    init: Literal["pretrained", "random"] = "pretrained"
    """`random`: fresh weights from the model's config and the run's seed (pre-training)."""


class OptimSpec(Spec):
    """AdamW and its schedule."""

    kind: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = "adamw"
    """Optimizer; the 8-bit ones come from bitsandbytes."""
    lr: float = Field(default=2e-4, gt=0)
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the denominator."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled; never on biases, norms and embeddings' one-dimensional parameters."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Shape after the warm-up."""
    warmup: float = Field(default=0.03, ge=0, le=STEPS)
    """Below 1: share of all steps; 1 and above: steps."""
    min_lr_ratio: float = Field(default=0.0, ge=0, le=1)
    """Where linear and cosine end, relative to the peak."""
    clip: float | None = Field(default=1.0, gt=0)
    """Largest gradient norm; null for none."""

    @field_validator("betas")
    @classmethod
    def _betas(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in value):
            raise ValueError("each beta must be in [0, 1)")
        return value


class TrainSpec(Spec):
    """How long, how much per step, and what is kept."""

    steps: int | None = Field(default=None, ge=1, le=STEPS)
    """Optimizer steps; or say epochs."""
    epochs: float | None = Field(default=None, gt=0, le=10**6)
    """Passes over the training data; or say steps."""
    global_batch: int = Field(default=16, ge=1, le=10**7)
    """Rows per optimizer step over all workers (packed: rows of max_length)."""
    micro_batch: int = Field(default=4, ge=1, le=10**6)
    """Rows per forward pass on one worker."""
    eval_every: int | None = Field(default=None, ge=1, le=STEPS)
    """Steps between evaluations; default: only before the first and after the last step."""
    eval_batch: int | None = Field(default=None, ge=1, le=10**6)
    """Rows per evaluation forward pass; default: micro_batch."""
    save_every: int | None = Field(default=None, ge=1, le=STEPS)
    """Steps between checkpoints; default: eval_every, else only at the end."""
    keep: int = Field(default=2, ge=2, le=10**6)
    """Committed checkpoints kept, besides the best one."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the forward pass; auto: model.dtype, but fp32 on CPUs that are slow at bf16."""
    log_every: int = Field(default=1, ge=1, le=STEPS)
    """Steps between lines of metrics.jsonl."""

    @model_validator(mode="after")
    def _length(self) -> TrainSpec:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("say either steps or epochs")
        return self


class ScaleSpec(Spec):
    """How many workers, and what each gets."""

    workers: int | tuple[int, int] = 1
    """Ray Train workers; 0 trains in this process without Ray (debugging); [min, max] is
    elastic."""
    gpus: float | None = Field(default=None, ge=0, le=1024)
    """GPUs per worker; default: 1 where the cluster has GPUs, else 0."""
    cpus: float = Field(default=1, gt=0, le=10_000)
    """CPUs per worker; also its thread count."""
    resources: dict[str, Annotated[float, Field(ge=0, le=10**9)]] = {}
    """Further Ray resources per worker."""
    placement: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """Ray placement strategy."""
    retries: int = Field(default=3, ge=0, le=10**6)
    """Attempts after the first one, each from the last commit, with back-off."""

    @field_validator("workers")
    @classmethod
    def _workers(cls, value: int | tuple[int, int]) -> int | tuple[int, int]:
        low, high = value if isinstance(value, tuple) else (value, value)
        if high > WORKERS:
            raise ValueError(f"no cluster holds {high:,} workers; at most {WORKERS:,}")
        if low < 0 or high < low or (isinstance(value, tuple) and low < 1):
            raise ValueError(
                "workers must be 0 or more; an elastic range is [min, max] with 1 <= min <= max"
            )
        return value


class Run(Spec):
    """One run, fully resolved. `name` and `storage` identify it; the same config continues it."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=200)
    """Run name: the folder below storage."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Of data order, initialisation and dropout."""
    model: ModelSpec
    """The base model; a bare string is its path."""
    methods: tuple[MethodSpec, ...] = Field(default=(LoraSpec(),), min_length=1, max_length=32)
    """What is trainable; several make a hybrid."""
    objective: ObjectiveSpec = SftSpec()
    """What is minimised."""
    penalties: Penalties = ()
    """What is held back."""
    data: DataSpec
    """What is trained and evaluated on."""
    optim: OptimSpec = OptimSpec()
    """The optimizer and its schedule."""
    train: TrainSpec
    """How long (steps or epochs), how much per step, and what is kept."""
    strategy: StrategySpec = DdpSpec()
    """How a step happens: a mapping, or a preset name (ddp, zero1, zero2, zero2_offload, zero3,
    zero3_offload)."""
    scale: ScaleSpec = ScaleSpec()
    """How many workers, and what each gets."""
    storage: Address = "runs"
    """Local path, NFS, s3:// or gs://; results go to <storage>/<name>/."""
    trackers: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = ()
    """Also send metrics there; each needs its optional extra and can fail without touching the
    run."""
    sweep: SweepSpec | None = None
    """What `rayft sweep` searches; `rayft train` leaves it aside."""

    @field_validator("strategy", mode="before")
    @classmethod
    def _preset(cls, value: object) -> object:
        if isinstance(value, str):
            if value not in PRESETS:
                raise ValueError(f"unknown preset {value!r}; presets: {', '.join(PRESETS)}")
            return PRESETS[value]
        return value

    @property
    def arithmetic(self) -> str:
        """Of the forward pass, as the config has it: "fp32" or "bf16"."""
        return self.model.dtype if self.train.precision == "auto" else self.train.precision

    @property
    def swept(self) -> SweepSpec:
        """The sweep block of a config that has one.

        Raises:
            ConfigError: it has none.
        """
        if self.sweep is None:
            example = "add e.g. sweep: {space: {methods.0.rank: {choice: [8, 16, 32]}}}"
            raise ConfigError("this config has no sweep block", where="sweep", fix=example)
        return self.sweep

    def resolved(self) -> dict[str, Any]:
        """Plain JSON data, every default written out."""
        return self.model_dump(mode="json")

    def addresses(self) -> list[str]:
        """Of all that it reads and writes."""
        sources = [source.path for source in (*self.data.train, *self.data.eval)]
        return [self.storage, *([self.data.cache] if self.data.cache else []), *sources]

    def identity(self) -> dict[str, object]:
        """What must not change when a run is continued: all but where it runs and what is watched.

        Checkpoints know no world size, so workers, micro-batches, resources, offload and the place
        of the cache are free.
        """
        return self.model_dump(mode="json", exclude=_FREE)

    def sweep_identity(self) -> dict[str, object]:
        """What must not change when a sweep is continued: how long it goes on, when it may end and
        how wide the packs are is free."""
        if self.sweep is None:
            return self.identity() | {"sweep": {}}
        block = self.sweep.model_dump(mode="json", exclude=_FREE_IN_SWEEP)
        for section, fields in _LATER_IN_SWEEP.items():
            for name, default in fields.items():
                if block[section].get(name) == default:
                    del block[section][name]
        return self.identity() | {"sweep": block}

    def digest(self) -> str:
        """sha256 of `identity`, first 16 hex digits."""
        return _digest(self.identity())

    def sweep_digest(self) -> str:
        """sha256 of `sweep_identity`, first 16 hex digits."""
        return _digest(self.sweep_identity())


def _digest(data: dict[str, object]) -> str:
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


__all__ = [
    "DataSpec",
    "DdpSpec",
    "FullSpec",
    "LoraSpec",
    "ModelSpec",
    "OptimSpec",
    "Run",
    "ScaleSpec",
    "SourceSpec",
    "TrainSpec",
    "ZeroSpec",
]
