"""What a user takes away: merged models, model cards, and whether vLLM would load an adapter.

Merging uses the *unquantised* base: W + s B A in float32, rounded once to the dtype the base is
stored in. Two gaps are measured on fixed sequences, as max |logit difference| and as mean
KL(first || second) per position in nats: adapter against merged (what rounding costs), and the
trained model, quantised if it was, against merged (what leaving the quantised base costs).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import yaml
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from rayft import methods
from rayft.config.run import ModelSpec, Run
from rayft.core.errors import StorageError
from rayft.core.protocols import Method
from rayft.models.load import load_model
from rayft.models.tokenizer import resolve
from rayft.records.run_record import RunRecord

PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    "def add(a, b):\n    return a + b\n",
    "Question: What is the capital of France? Answer: Paris.",
)
# vllm/config/lora.py: the values --max-lora-rank may take, and its default.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
VLLM_DEFAULT_RANK = 16


@dataclass(frozen=True)
class ModelGap:
    """How far two models are apart on the same tokens."""

    max_abs: float  # logits
    kl: float  # nats per position, mean


@dataclass(frozen=True)
class MergeReport:
    """What `merge_run` measured."""

    rounding: ModelGap  # adapter on the unquantised base against the merged model
    trained: ModelGap  # the model as it was trained against the merged model
    dtype: str  # of the merged weights


def merge_run(
    run: Run,
    state: Mapping[str, Tensor],
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    device: torch.device | str = "cpu",
) -> MergeReport:
    """Merge what a run has learnt into its unquantised base; save model and tokenizer.

    Args:
        run: the base as it was trained on (its quantisation is used for the second gap only) and
            the methods.
        state: full trained parameters by the model's own names.
        folder: where the merged model goes, Hugging Face layout.
        tokenizer: saved beside, with its chat template.
        device: where the arithmetic happens; one model at a time lives there.

    Raises:
        StorageError: the saved model, reopened, gives other logits than the one in memory.
    """
    sequences = fixed_sequences(tokenizer)
    trained_logits = logits_of(_tuned(run, state, device)[0], sequences)
    plain = run.model.model_copy(update={"quant": "none", "dtype": stored_dtype(run.model)})
    model, chosen = _tuned(run.model_copy(update={"model": plain}), state, device)
    adapted = logits_of(model, sequences)
    for method in reversed(chosen):  # what was applied last is outermost
        method.merge(model)
    merged = logits_of(model, sequences)
    model.config.use_cache = True  # off while training, on for those who generate with it
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    saved = ModelSpec(path=str(folder), dtype=plain.dtype, attention=plain.attention)
    del model
    again = logits_of(load_model(saved, device=device, seed=run.seed), sequences)
    if not all(torch.equal(one, two) for one, two in zip(merged, again, strict=True)):
        raise StorageError(
            f"{folder}: the saved model, reopened, gives other logits than the merged one",
            fix="delete the folder and export again; check the disk",
        )
    return MergeReport(gap(adapted, merged), gap(trained_logits, merged), plain.dtype)


def _tuned(
    run: Run, state: Mapping[str, Tensor], device: torch.device | str
) -> tuple[PreTrainedModel, tuple[Method, ...]]:
    """The run's model with its trained parameters, and the methods in it."""
    model = load_model(run.model, device=device, seed=run.seed)
    chosen = methods.build_all(run.methods)
    methods.apply_all(model, chosen, seed=run.seed)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if param.requires_grad:
                param.copy_(state[name])
    return model, chosen


def stored_dtype(spec: ModelSpec) -> str:
    """The dtype the base's weights are stored in, as a value of `model.dtype`."""
    config = AutoConfig.from_pretrained(
        resolve(spec.path), revision=spec.revision, trust_remote_code=spec.trust_remote_code
    )
    return "bf16" if config.dtype == torch.bfloat16 else "fp32"


def fixed_sequences(tokenizer: PreTrainedTokenizerBase) -> list[Tensor]:
    """(1, T) int64 token ids of a few fixed texts."""
    return [torch.tensor([tokenizer(text)["input_ids"]], dtype=torch.int64) for text in PROBES]


@torch.no_grad()
def logits_of(model: PreTrainedModel, sequences: Sequence[Tensor]) -> list[Tensor]:
    """(1, T, V) float32 logits of each sequence, on CPU."""
    model.eval()
    return [
        model(input_ids=ids.to(model.device), use_cache=False).logits.float().cpu()
        for ids in sequences
    ]


def gap(first: Sequence[Tensor], second: Sequence[Tensor]) -> ModelGap:
    """Distance of two models' logits; see the head of this file."""
    pairs = list(zip(first, second, strict=True))
    largest = max(float((one - two).abs().max()) for one, two in pairs)
    divergences = []
    for one, two in pairs:
        p, q = one.double().log_softmax(dim=-1), two.double().log_softmax(dim=-1)
        divergences.append((p.exp() * (p - q)).sum(dim=-1).flatten())  # (T,)
    return ModelGap(largest, float(torch.cat(divergences).mean()))


def check_vllm(folder: Path) -> list[str]:
    """Reasons why vLLM would not load the adapter in `folder`; empty when it would."""
    file = folder / "adapter_config.json"
    if not file.is_file():
        return [f"{folder} holds no adapter_config.json (a merged model needs no check)"]
    config = json.loads(file.read_text(encoding="utf-8"))
    reasons = []
    if config["use_dora"]:
        reasons.append("vLLM does not load DoRA: merge it (rayft export --merge)")
    if config["bias"] != "none":
        reasons.append(f"vLLM loads no adapter biases: bias is {config['bias']!r}")
    if config["modules_to_save"]:
        reasons.append("vLLM needs modules_to_save to be empty")
    rank = config["r"]
    if rank > VLLM_RANKS[-1]:
        reasons.append(f"rank {rank} is above vLLM's largest, {VLLM_RANKS[-1]}")
    elif rank > VLLM_DEFAULT_RANK:
        least = next(allowed for allowed in VLLM_RANKS if allowed >= rank)
        reasons.append(
            f"rank {rank} is above vLLM's default limit {VLLM_DEFAULT_RANK}: "
            f"start it with --max-lora-rank {least}"
        )
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        return [*reasons, f"{folder} holds no adapter_model.safetensors"]
    with safe_open(weights, framework="pt") as tensors:
        odd = [n for n in tensors.keys() if not n.endswith((".lora_A.weight", ".lora_B.weight"))]  # noqa: SIM118 - safe_open is no mapping
    if odd:
        reasons.append(f"vLLM loads lora_A and lora_B only; the file also holds {odd[0]}")
    return reasons


def write_model_card(
    folder: Path,
    record: RunRecord,
    tokenizer: PreTrainedTokenizerBase,
    *,
    merged: MergeReport | None = None,
) -> None:
    """README.md (YAML front matter, config, data, metrics, versions), tokenizer and chat template
    beside the weights in `folder`."""
    config = record.config
    adapter = (folder / "adapter_config.json").is_file()
    front = {
        "base_model": config["model"]["path"],
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["rayft", config["objective"]["kind"], *[m["kind"] for m in config["methods"]]],
        "datasets": [source["path"] for source in config["data"]["train"]],
    }
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {record.name}",
        f"{config['model']['path']}, fine-tuned by rayft: {record.steps} steps, "
        f"{record.tokens:,} trained tokens, {record.params_trainable:,} of "
        f"{record.params_total:,} parameters, {record.seconds:.0f} s.",
        "## Evaluation\n\n" + _metrics_table(record),
    ]
    if merged is not None:
        parts.append(f"## Merge\n\n```json\n{json.dumps(asdict(merged), indent=2)}\n```")
    for title, content in (
        ("Data", record.data),
        ("Config", config),
        ("Versions", record.versions),
        ("Hardware", record.hardware),
    ):
        parts.append(f"## {title}\n\n```yaml\n{yaml.safe_dump(content, sort_keys=False)}```")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    tokenizer.save_pretrained(folder)


def _metrics_table(record: RunRecord) -> str:
    rows = ["| metric | base | tuned |", "| --- | --- | --- |"]
    for name in sorted({*record.base, *record.eval}):
        values = [each.get(name) for each in (record.base, record.eval)]
        shown = ["-" if value is None else f"{value:.4g}" for value in values]
        rows.append(f"| {name} | {shown[0]} | {shown[1]} |")
    return "\n".join(rows)
