"""CausalPolicy: a causal language model as objectives see it, and what is checked of it beforehand.

Legend: B rows, T tokens of a row, H hidden size, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rayft.core.batch import Batch
from rayft.core.errors import ConfigError
from rayft.core.params import is_partitioned
from rayft.models.chunked import ChunkedNll, LogitMap, plain_nll
from rayft.models.load import input_embeddings

PROBE_TOKENS = 4  # per document of the probes below


class CausalPolicy(nn.Module):
    """Decoder and head of a causal language model, kept apart so that whole logits never exist.

    Args:
        model: any causal LM of transformers, adapters injected or not.
        packing: rows may hold several documents; refused where the model would mix them.

    Raises:
        ConfigError: the model has no separate output head, changes its logits in a way not known
            here, or cannot keep packed documents apart.
    """

    def __init__(self, model: PreTrainedModel, *, packing: bool = False) -> None:
        super().__init__()
        self.model = model
        self.decoder_name = _name_of(model, model.get_decoder())
        head = model.get_output_embeddings()
        if head is None or self.decoder_name == "":
            raise ConfigError(
                f"{type(model).__name__} has no separate decoder and output head",
                fix="choose a causal language model (an AutoModelForCausalLM with an lm_head)",
            )
        self.head_name = _name_of(model, head)
        self.logit_map = logit_map(model.config.get_text_config().to_dict())
        self._positions = "position_ids" in inspect.signature(self.decoder.forward).parameters
        if packing and not self._positions:
            raise _no_packing(model)
        self._packing = packing
        # A model that ZeRO-3 shards cannot run before its engine exists: `probe` comes later.
        self.probed = not any(is_partitioned(param) for param in model.parameters())
        if self.probed:
            self.probe()

    def probe(self) -> None:
        """Hold the model to what this class takes for granted; a sharded one runs collectives.

        Raises:
            ConfigError: it changes its logits in an unknown way, or mixes packed documents.
        """
        with _quiet(self.model):
            self._probe_head()
            if self._packing:
                self._probe_packing()
        self.probed = True

    # Looked up by name at each use: adapters may replace the head after this object is built, and
    # registering the same modules twice would double their names.
    @property
    def decoder(self) -> nn.Module:
        """The model without its head."""
        return self.model.get_submodule(self.decoder_name)

    @property
    def head(self) -> nn.Module:
        """The output head: (..., H) -> (..., V)."""
        return self.model.get_submodule(self.head_name)

    def hidden(self, batch: Batch) -> Tensor:
        """(B, T, H): last hidden states. No attention mask: padding is on the right, and packed
        rows are told apart by their restarting position_ids (which needs use_cache=False)."""
        positions = {"position_ids": batch.position_ids} if batch.packed else {}
        return self._decode(batch.input_ids, **positions)

    def row_nll(self, batch: Batch, scale: Tensor) -> Tensor:
        """(B,) float32: see core.protocols.Policy and models/chunked.py."""
        positions = batch.trained_positions()  # those with label IGNORE never reach the head
        targets = batch.labels.flatten()[positions + 1]
        hidden = self.hidden(batch)
        if type(self.head) is not nn.Linear:
            return plain_nll(hidden, self.head, positions, targets, self.logit_map)
        return ChunkedNll.apply(
            hidden,
            self.head.weight,
            self.head.bias,
            positions,
            targets,
            scale.to(torch.float32),
            self.logit_map,
            torch.is_grad_enabled(),
        )

    def _decode(self, input_ids: Tensor, **positions: Tensor) -> Tensor:
        return self.decoder(
            input_ids=input_ids, attention_mask=None, use_cache=False, **positions
        ).last_hidden_state

    def _probe_head(self) -> None:
        """The model's own logits must be what decoder, head and logit map give."""
        ids = _probe_ids(self.model, 1)
        own = self.model(input_ids=ids, use_cache=False).logits.float()
        ours = self.logit_map.forward(self.head(self._decode(ids))).float()
        if not torch.allclose(own, ours, rtol=2e-2, atol=2e-2 * float(own.abs().max())):
            raise ConfigError(
                f"{type(self.model).__name__} changes its logits in a way that rayft does not know",
                cause="its forward pass does more than decoder and output head",
                fix="choose another model, or add its rule to rayft/models/policy.py::logit_map",
            )

    def _probe_packing(self) -> None:
        """Another first document must not move the second one, once positions restart."""
        ids, other = _probe_ids(self.model, 2), _probe_ids(self.model, 2)
        other[:, :PROBE_TOKENS] = other[:, :PROBE_TOKENS].flip(1) + 1
        restart = torch.arange(PROBE_TOKENS, device=ids.device).repeat(2)[None]
        plain = torch.arange(2 * PROBE_TOKENS, device=ids.device)[None]

        def moved(positions: Tensor) -> float:
            one, two = (self._decode(each, position_ids=positions) for each in (ids, other))
            return float((one - two)[:, PROBE_TOKENS:].float().abs().max())

        if moved(restart) > 0.1 * moved(plain):
            raise _no_packing(self.model)


def logit_map(config: Mapping[str, Any]) -> LogitMap:
    """What the model family does to its logits, read from its config (the probe checks it)."""
    kind = config["model_type"]
    multiplier = 1.0
    if kind.startswith("cohere"):
        multiplier = config["logit_scale"]
    elif kind.startswith("granite"):
        multiplier = 1.0 / config["logits_scaling"]
    elif kind == "falcon_h1":
        multiplier = config["lm_head_multiplier"]
    return LogitMap(multiplier, config.get("final_logit_softcapping"))


def _name_of(model: nn.Module, wanted: nn.Module | None) -> str:
    """Dotted name of a submodule; "" for the model itself or nothing."""
    return next((name for name, module in model.named_modules() if module is wanted), "")


def _probe_ids(model: PreTrainedModel, documents: int) -> Tensor:
    """(1, 4 documents) int64 small token ids, all different."""
    device = input_embeddings(model).device
    return torch.arange(1, documents * PROBE_TOKENS + 1, device=device)[None]


def _no_packing(model: PreTrainedModel) -> ConfigError:
    return ConfigError(
        f"{type(model).__name__} cannot keep packed documents apart",
        cause="it does not build a block mask from position_ids that restart",
        fix="set data.packing=false",
    )


@contextmanager
def _quiet(model: nn.Module) -> Generator[None]:
    """Eval mode and no gradients, then as it was."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
