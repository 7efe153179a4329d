"""The base model: from the hub, a folder or the package; frozen, in the wanted precision, on the
wanted device. Weights come from safetensors only, so loading runs no pickle."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from rayft.config.run import ModelSpec
from rayft.core.errors import ConfigError
from rayft.core.params import full_shape
from rayft.models.tokenizer import explained, resolve

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class ModelFacts:
    """Sizes, in parameters; a quantised weight counts as the elements it stands for."""

    total: int
    trainable: int


def load_model(
    spec: ModelSpec,
    *,
    device: torch.device | str,
    seed: int,
    gradient_checkpointing: bool = False,
    quant_storage: torch.dtype | None = None,
) -> PreTrainedModel:
    """The base model on `device`, every parameter frozen.

    Inside a strategy's `loading()` for ZeRO-3 the model is born sharded, and stays where DeepSpeed
    puts it.

    Args:
        spec: what to load.
        device: where the weights go.
        seed: of `init: random`; the global random state is left as it was.
        gradient_checkpointing: recompute activations in the backward pass.
        quant_storage: dtype that nf4 codes are stored as (ZeRO-3 needs a floating one to shard it);
            default uint8.

    Raises:
        ConfigError: not found, no network, no safetensors, unknown architecture, or an attention
            implementation that the model or the machine does not have.
    """
    source = resolve(spec.path)
    common = {"dtype": DTYPES[spec.dtype], "attn_implementation": spec.attention}
    with explained(source):
        config = AutoConfig.from_pretrained(
            source, revision=spec.revision, trust_remote_code=spec.trust_remote_code
        )
        config.use_cache = False
        if spec.init == "random":
            model = _random(spec, config, seed, common, quant_storage, device)
        else:
            _refuse_pickles(source)
            model = AutoModelForCausalLM.from_pretrained(
                source,
                config=config,
                revision=spec.revision,
                trust_remote_code=spec.trust_remote_code,
                use_safetensors=True,
                **common,
                **_quantised(spec, quant_storage, device),
            )
    keep_nf4_as_loaded(model)
    if spec.quant == "none" and not is_deepspeed_zero3_enabled():
        model.to(device)  # pyright: ignore[reportArgumentType]  # transformers' `to` has no self
    model.requires_grad_(False)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def keep_nf4_as_loaded(model: nn.Module) -> None:
    """Switch off, in every Linear4bit of `model`, bitsandbytes' repacking for inference.

    On CPUs with AVX512-BF16, a layer that runs once in eval mode on an input without gradient
    rewrites its codes and block constants for a bf16 kernel that has no backward pass, for good.
    From then on its input gets no gradient, in silence; widths that 32 does not divide raise; and
    fp32 is evaluated in bf16. A base that trains must be the same before and after an evaluation,
    on every CPU. The switch is the layer's own and survives whatever is done to the model later
    (adapters wrap the layer itself, copies copy it).
    """
    for layer in _nf4_layers(model):
        layer.support_avx512bf16_for_cpu = False


def _nf4_layers(model: nn.Module) -> list[Any]:
    """bitsandbytes' 4-bit layers; none where nothing has imported the library: no model can hold
    one then. It is needed for quantised bases only, and is not on every machine."""
    library = sys.modules.get("bitsandbytes")
    if library is None:
        return []
    return [module for module in model.modules() if isinstance(module, library.nn.Linear4bit)]


def model_facts(model: PreTrainedModel) -> ModelFacts:
    """Parameter counts; exact for 4-bit weights and for weights that ZeRO-3 shards."""
    packed: dict[nn.Parameter, int] = {
        layer.weight: layer.in_features * layer.out_features for layer in _nf4_layers(model)
    }
    sizes = {
        param: packed.get(param, full_shape(param).numel()) for _, param in model.named_parameters()
    }
    return ModelFacts(
        total=sum(sizes.values()),
        trainable=sum(size for param, size in sizes.items() if param.requires_grad),
    )


def input_embeddings(model: PreTrainedModel) -> nn.Parameter:
    """(V, H)."""
    weight = model.get_input_embeddings().weight
    return cast(nn.Parameter, weight)  # transformers types the module around it as any module


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer with ids that the model has no embedding for."""
    rows = full_shape(input_embeddings(model))[0]
    if len(tokenizer) > rows:
        raise ConfigError(
            f"the tokenizer has {len(tokenizer)} tokens, the model embeds {rows}",
            fix="name the model's own tokenizer in model.tokenizer (embeddings are never resized)",
        )


def _random(
    spec: ModelSpec,
    config: PretrainedConfig,
    seed: int,
    common: dict[str, Any],
    quant_storage: torch.dtype | None,
    device: torch.device | str,
) -> PreTrainedModel:
    """Fresh weights from the config; the same on every rank and machine for one seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(
            config, trust_remote_code=spec.trust_remote_code, **common
        )
    if spec.quant == "none":
        return model
    return type(model).from_pretrained(
        None,
        config=config,
        state_dict=model.state_dict(),
        **common,
        **_quantised(spec, quant_storage, device),
    )


def _quantised(
    spec: ModelSpec, quant_storage: torch.dtype | None, device: torch.device | str
) -> dict[str, object]:
    """Further arguments of from_pretrained; the output head stays unquantised."""
    if spec.quant == "none":
        return {}
    if spec.quant == "int8":
        quant = BitsAndBytesConfig(load_in_8bit=True)
    else:
        quant = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=spec.double_quant,
            bnb_4bit_compute_dtype=DTYPES[spec.dtype],
            bnb_4bit_quant_storage=quant_storage,
        )
    place = {} if is_deepspeed_zero3_enabled() else {"device_map": {"": device}}
    return {"quantization_config": quant, **place}


def _refuse_pickles(source: str) -> None:
    """A local folder must hold safetensors."""
    folder = Path(source)
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        pickled = any(folder.glob("*.bin"))
        raise ConfigError(
            f"{source} holds no safetensors weights" + (", only .bin files" if pickled else ""),
            cause="rayft loads safetensors only: a .bin file runs code when opened"
            if pickled
            else "the folder is not a saved model, or the copy is incomplete",
            fix="load it where you trust it and save_pretrained(folder) again, which writes "
            "safetensors",
        )
