"""Full fine-tuning: every parameter trains.

    W <- W - lr * AdamW(grad L(W)),   weight decay on matrices only

Biases, norms and every other one-dimensional parameter form their own group without decay, as in
GPT-3's and every later recipe. Export is what `save_pretrained` writes. Left out: layer-wise
learning rates.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from rayft.config.methods import FullSpec
from rayft.core.errors import ConfigError, StorageError
from rayft.core.params import full_shape
from rayft.core.protocols import Delta, FullParams, ParamGroup


class Full:
    """See the head of this file."""

    def __init__(self, spec: FullSpec) -> None:
        self.spec = spec

    def apply(self, model: PreTrainedModel) -> list[ParamGroup]:
        """Groups `decay` (matrices) and `no_decay`; whichever is empty is left out.

        Raises:
            ConfigError: the base is quantised; rounded weights have no gradient step.
        """
        if "quantization_config" in model.config.to_dict():
            raise ConfigError(
                "full fine-tuning cannot train a quantised base",
                fix="set model.quant=none, or use methods.0.kind=lora (QLoRA)",
            )
        params = list(model.parameters())
        decay = tuple(param for param in params if len(full_shape(param)) >= 2)
        rest = tuple(param for param in params if len(full_shape(param)) < 2)
        groups = [ParamGroup("decay", decay), ParamGroup("no_decay", rest, decay=False)]
        return [group for group in groups if group.params]

    def kept(self, model: nn.Module) -> dict[str, Tensor]:
        """Nothing: all that there is trains."""
        return {}

    def before(self, step: int, full: FullParams) -> None:
        """Nothing to do."""

    def deltas(self, model: nn.Module) -> Iterator[Delta]:
        """None that could be had without the base's weights, which are overwritten."""
        return iter(())

    def off(self, model: nn.Module) -> AbstractContextManager[None]:
        """Never: the base is overwritten."""
        raise ConfigError("full fine-tuning keeps no base model to go back to")

    def merge(self, model: PreTrainedModel) -> None:
        """Never: what it has learnt are the model's weights already."""
        raise ConfigError("full fine-tuning leaves nothing to merge")

    def export(self, model: PreTrainedModel, state: Mapping[str, Tensor], folder: Path) -> None:
        """`save_pretrained` layout from config, `state` and the model's buffers; the weights of the
        live model are not read, so they may be sharded. Stored in the model's dtype.

        Raises:
            StorageError: a parameter is missing or empty, or the files do not hold what was given.
        """
        save_model(model, state, folder)


def save_model(model: PreTrainedModel, state: Mapping[str, Tensor], folder: Path) -> None:
    """Write `state` as a Hugging Face model of the class and config of `model`, and read it back.

    Args:
        model: gives class, configs, dtype and persistent buffers.
        state: full tensors by parameter name; tied weights once, under either name.
        folder: created where missing.
    """
    with torch.device("meta"):
        shell = type(model)(model.config)
    wanted = {name: param.shape for name, param in shell.named_parameters()}
    buffers = {name: b for name, b in model.named_buffers() if name in shell.state_dict()}
    _refuse_missing(wanted, state)
    full = {
        name: _whole(name, shape, state[name]).detach().to("cpu", model.dtype).contiguous()
        for name, shape in wanted.items()
    }
    full |= {name: tensor.detach().cpu() for name, tensor in buffers.items()}
    shell.load_state_dict(full, strict=False, assign=True)
    shell.tie_weights()
    shell.generation_config = model.generation_config
    shell.config.use_cache = True  # off while training, on for those who generate with it
    try:
        shell.save_pretrained(folder)
    finally:
        model.config.use_cache = False
    reopened = type(model).from_pretrained(folder, dtype=model.dtype, use_safetensors=True)
    for name, param in reopened.named_parameters():
        if name in full and not torch.equal(param.detach(), full[name]):
            raise StorageError(f"{folder}: {name} differs from what was written")


def _refuse_missing(wanted: Mapping[str, torch.Size], state: Mapping[str, Tensor]) -> None:
    for name in wanted:
        if name not in state:
            raise StorageError(f"cannot export: the state has no {name}")


def _whole(name: str, shape: torch.Size, tensor: Tensor) -> Tensor:
    if tensor.shape != shape or tensor.numel() == 0:
        raise StorageError(
            f"cannot export: {name} is {tuple(tensor.shape)}, not {tuple(shape)}",
            cause="it was taken from a sharded model without gathering",
        )
    return tensor


def reopened_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file just written; an error where one is empty."""
    tensors = load_file(file)
    empty = [name for name, tensor in tensors.items() if tensor.numel() == 0]
    if empty or not tensors:
        raise StorageError(f"{file} holds empty tensors: {', '.join(empty[:3]) or 'none at all'}")
    return tensors
