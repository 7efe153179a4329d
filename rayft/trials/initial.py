"""What a trial starts from: the tensors that its own run would draw, from the method itself.

The method is applied, with the trial's seed, to a copy of the module tree that shares the base's
tensors; what it adds is taken and the copy dropped.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rayft import methods
from rayft.config.methods import LoraSpec
from rayft.config.run import Run
from rayft.core.errors import ConfigError
from rayft.core.protocols import Method, ParamGroup
from rayft.models.load import model_facts
from rayft.trials.adapter_layout import GROUPS, AdapterLayout, LayerSize, layout_of, padded
from rayft.trials.rank_bucket import TrialAdapter

_MARKS = {"lora_A": ".lora_A.", "lora_B": ".lora_B.", "lora_magnitude": ".lora_magnitude_vector."}


@dataclass(frozen=True)
class FreshAdapter:
    """A fresh adapter."""

    spec: LoraSpec
    methods: tuple[Method, ...]
    groups: tuple[ParamGroup, ...]  # of the copy: names, rates, decay
    names: tuple[dict[str, str], ...]  # by layer: {group: name of the parameter in the model}
    tensors: tuple[dict[str, Tensor], ...]  # by layer, not padded
    layers: tuple[LayerSize, ...]
    scaling: float
    params_total: int
    params_trainable: int

    def adapter(self, rows: int) -> TrialAdapter:
        """Its place holder; `rows` of a micro-batch."""
        layout = layout_of(self.layers, padded(self.spec.rank), self.spec.dora)
        dtype = self.tensors[0]["lora_A"].dtype
        norms = ()
        if self.spec.dora:  # m starts as the row norms of W, because B A is zero
            norms = tuple(one["lora_magnitude"].to(dtype).square() for one in self.tensors)
        return TrialAdapter(
            self.spec.rank, self.scaling, self.spec.dropout, layout, rows, norms=norms
        )

    def flat(self, layout: AdapterLayout) -> Tensor:
        """(size,): the tensors in a row's layout."""
        like = self.tensors[0]["lora_A"]
        flat = torch.zeros(1, layout.size, dtype=like.dtype, device=like.device)
        for index, one in enumerate(self.tensors):
            for group, tensor in one.items():
                if group == "lora_B":
                    tensor = tensor.t()
                layout.view(flat, index, group)[0, : len(tensor)] = tensor
        return flat[0]


Model = TypeVar("Model", bound=nn.Module)


def shared_copy(model: Model) -> Model:
    """A copy of the module tree around the same parameters, buffers and quantisation states."""
    shared: list[object] = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        shared += [
            value
            for name, value in vars(module).items()
            if name in ("quant_state", "state") and value is not None
        ]
    return copy.deepcopy(model, {id(one): one for one in shared})


def fresh_adapter(template: PreTrainedModel, run: Run) -> FreshAdapter:
    """What `run` starts from on the base `template`, which stays as it is.

    Raises:
        ConfigError: `run` does not train exactly one LoRA adapter.
    """
    if len(run.methods) != 1 or not isinstance(run.methods[0], LoraSpec):
        raise ConfigError(f"{run.name} is no LoRA run, so it cannot join a pack")
    spec = run.methods[0]
    model = shared_copy(template)
    chosen = methods.build_all(run.methods)
    groups = tuple(methods.apply_all(model, chosen, seed=run.seed))
    facts = model_facts(model)
    params = dict(model.named_parameters())
    names: dict[str, dict[str, str]] = {}
    for name, param in params.items():
        if param.requires_grad:
            group = next(each for each in GROUPS if _MARKS[each] in name)
            names.setdefault(name.split(_MARKS[group])[0], {})[group] = name
    tensors = tuple(
        {group: _full(params[name].detach()) for group, name in one.items()}
        for one in names.values()
    )
    sizes = tuple(
        LayerSize(layer, one["lora_A"].shape[1], one["lora_B"].shape[0])
        for layer, one in zip(names, tensors, strict=True)
    )
    root = spec.rank**0.5 if spec.rslora else spec.rank
    return FreshAdapter(
        spec,
        chosen,
        groups,
        _names(tuple(tuple(one.items()) for one in names.values())),
        tensors,
        sizes,
        spec.alpha / root,
        facts.total,
        facts.trainable,
    )


@lru_cache(maxsize=64)
def _names(layers: tuple[tuple[tuple[str, str], ...], ...]) -> tuple[dict[str, str], ...]:
    """Of FreshAdapter: one for all trials that adapt the same layers in the same way."""
    return tuple(dict(one) for one in layers)


def _full(tensor: Tensor) -> Tensor:
    """As the engine keeps what it trains: float32 at least."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
