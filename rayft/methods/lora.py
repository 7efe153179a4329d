"""LoRA: low-rank adapters beside frozen linear layers, and its relatives that need no other layer.

    y = W x + s B A dropout(x),    A (r, d_in) Kaiming-uniform,  B (d_out, r) zero
    s = alpha / r                  LoRA    (Hu et al. 2021, arXiv 2106.09685)
    s = alpha / sqrt(r)            rsLoRA  (Kalajdzievski 2023, arXiv 2312.03732)
    W' = m (W + s B A) / ||W + s B A||_row,  m (d_out,) = ||W||_row at the start
                                   DoRA    (Liu et al. 2024, arXiv 2402.09353)
    lr(B) = lr_ratio * lr(A)       LoRA+   (Hayou et al. 2024, arXiv 2402.12354)
    W quantised                    QLoRA   (Dettmers et al. 2023, arXiv 2305.14314): model.quant

Trained: r (d_in + d_out) per layer, DoRA d_out more. Layers, initialisation and file format are
peft's. Adapters are float32 whatever the base is. Deviation: DoRA's magnitude learns at the rate of
A (peft's LoRA+ helper gives every one-dimensional parameter the rate of B).
Left out: adapters on embeddings and on tied heads, biases, per-layer ranks; DoRA on int8.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rayft.config.methods import LoraSpec
from rayft.core.errors import ConfigError, StorageError
from rayft.core.protocols import FullParams, ParamGroup
from rayft.methods.full import reopened_tensors

ADAPTER = "default"  # peft's own name for the first adapter
PREFIX = "base_model.model."  # what PeftModel puts before every name of the base
ALL_LINEAR = "all-linear"
WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class LoraDelta:
    """s B A of one layer (core.protocols.Delta)."""

    name: str
    a: Tensor  # (r, i)
    b: Tensor  # (o, r)
    scaling: float

    @property
    def shape(self) -> tuple[int, int]:
        return self.b.shape[0], self.a.shape[1]

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.scaling * self.b, self.a

    def norm_sq(self) -> Tensor:
        """s^2 tr((A A^T)(B^T B)): r x r work."""
        return self.scaling**2 * ((self.a @ self.a.T) * (self.b.T @ self.b)).sum()

    def dense(self) -> Tensor:
        return self.scaling * (self.b @ self.a)


class Lora:
    """See the head of this file."""

    def __init__(self, spec: LoraSpec) -> None:
        self.spec = spec

    def apply(self, model: PreTrainedModel) -> list[ParamGroup]:
        """Inject adapters; groups `lora_A`, `lora_B` and, with DoRA, `lora_magnitude` (no decay).

        Raises:
            ConfigError: a target matches no linear layer, matches something else, or is a head
                whose weight is also the embedding; DoRA on int8.
        """
        check_targets(model, self.spec.targets)
        if self.spec.dora and _is_int8(model):
            raise ConfigError(
                "DoRA does not work on an int8 base",
                cause="peft's DoRA loses the scales that bitsandbytes keeps beside int8 weights",
                fix="set model.quant=nf4, or methods.0.dora=false",
            )
        targets = self.spec.targets
        config = LoraConfig(
            r=self.spec.rank,
            lora_alpha=self.spec.alpha,  # pyright: ignore[reportArgumentType]  # takes fractions too
            lora_dropout=self.spec.dropout,
            target_modules=targets if isinstance(targets, str) else list(targets),
            use_rslora=self.spec.rslora,
            use_dora=self.spec.dora,
            task_type="CAUSAL_LM",
            base_model_name_or_path=model.name_or_path,
        )
        inject_adapter_in_model(config, model, ADAPTER)
        for name, param in model.named_parameters():
            # As PeftModel does (autocast_adapter_dtype): half precision would lose small updates.
            if ".lora_" in name and param.dtype in (torch.float16, torch.bfloat16):
                param.data = param.data.float()
        named = list(model.named_parameters())
        groups = [
            ParamGroup("lora_A", _params(named, ".lora_A.")),
            ParamGroup("lora_B", _params(named, ".lora_B."), lr_ratio=self.spec.lr_ratio),
            ParamGroup("lora_magnitude", _params(named, ".lora_magnitude_vector."), decay=False),
        ]
        return [group for group in groups if group.params]

    def kept(self, model: nn.Module) -> dict[str, Tensor]:
        """Nothing: what is not the base's own trains."""
        return {}

    def before(self, step: int, full: FullParams) -> None:
        """Nothing to do."""

    def deltas(self, model: nn.Module) -> Iterator[LoraDelta]:
        """s B A of every adapted layer; nothing with DoRA, which also scales W itself."""
        if self.spec.dora:
            return
        for name, layer in model.named_modules():
            if isinstance(layer, LoraLayer):
                # torch: an attribute of a module is Tensor | Module
                a = cast(Tensor, layer.lora_A[ADAPTER].weight)
                b = cast(Tensor, layer.lora_B[ADAPTER].weight)
                yield LoraDelta(f"{name}.weight", a, b, layer.scaling[ADAPTER])

    @contextmanager
    def off(self, model: nn.Module) -> Generator[None]:
        """Every adapter layer computes its base layer alone."""
        layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
        for layer in layers:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in layers:
                layer.enable_adapters(True)

    def merge(self, model: PreTrainedModel) -> None:
        """W <- W + s B A (or DoRA's W') in float32, rounded once to the base's dtype; adapters
        gone."""
        for name, layer in list(model.named_modules()):
            if not (isinstance(layer, LoraLayer) and isinstance(layer, nn.Module)):
                continue
            base = layer.get_base_layer()
            dtype = cast(Tensor, base.weight).dtype  # torch: an attribute is Tensor | Module
            layer.float()
            layer.merge(safe_merge=True)
            model.set_submodule(name, base.to(dtype))
        del model.peft_config

    def export(self, model: PreTrainedModel, state: Mapping[str, Tensor], folder: Path) -> None:
        """adapter_config.json and adapter_model.safetensors as `PeftModel.from_pretrained` reads
        them; read back and compared.

        Raises:
            StorageError: an adapter tensor is missing or empty, or the file differs.
        """
        wanted = {name for name, _ in model.named_parameters() if ".lora_" in name}
        missing = sorted(wanted - set(state))
        if missing:
            raise StorageError(f"cannot export: the state has no {missing[0]}")
        adapter = {name: state[name].detach().cpu().contiguous() for name in sorted(wanted)}
        named = get_peft_model_state_dict(
            model, state_dict=adapter, adapter_name=ADAPTER, save_embedding_layers=False
        )
        tensors = {PREFIX + name: tensor for name, tensor in named.items()}
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        config = model.peft_config[ADAPTER]
        config.inference_mode = True
        config.save_pretrained(str(folder))
        written = reopened_tensors(folder / WEIGHTS)
        if written.keys() != tensors.keys() or len(tensors) != len(wanted):
            raise StorageError(f"{folder / WEIGHTS} does not hold the adapter's names")
        for name, tensor in tensors.items():
            if not torch.equal(written[name], tensor):
                raise StorageError(f"{folder / WEIGHTS}: {name} differs from what was written")


def check_targets(model: PreTrainedModel, targets: str | tuple[str, ...]) -> None:
    """Every target must match linear layers and nothing else.

    `targets`: `all-linear`, one regular expression for full names, or name endings.
    """
    if targets == ALL_LINEAR:
        return
    modules = dict(model.named_modules())
    linear = {name for name, module in modules.items() if isinstance(module, nn.Linear | Conv1D)}
    for target in (targets,) if isinstance(targets, str) else targets:
        hits = {name for name in modules if _matches(name, target, regex=isinstance(targets, str))}
        others = sorted(hits - linear)
        if others:
            kind = type(modules[others[0]]).__name__
            raise ConfigError(
                f"lora target {target!r} matches {others[0]}, a {kind}",
                fix=f"target linear layers: {_endings(linear)}",
            )
        if not hits:
            raise ConfigError(
                f"lora target {target!r} matches no layer",
                fix=f"linear layers of this model: {_endings(linear)}",
            )
        head = model.get_output_embeddings()
        tied = head is not None and head.weight is model.get_input_embeddings().weight
        if tied and any(modules[name] is head for name in hits):
            raise ConfigError(
                "LoRA on this output head could not be merged: its weight is also the embedding",
                fix="leave the head out of targets",
            )


def _is_int8(model: PreTrainedModel) -> bool:
    config = model.config.to_dict().get("quantization_config")
    return config is not None and bool(config["load_in_8bit"])


def _matches(name: str, target: str, *, regex: bool) -> bool:
    if regex:
        return re.fullmatch(target, name) is not None
    return name == target or name.endswith("." + target)


def _endings(names: set[str]) -> str:
    return ", ".join(sorted({name.rsplit(".", 1)[-1] for name in names}))


def _params(named: list[tuple[str, nn.Parameter]], part: str) -> tuple[nn.Parameter, ...]:
    return tuple(param for name, param in named if part in name)
