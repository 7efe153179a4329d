"""TRL's side of train_trl.py: SFTTrainer with rayft's settings where both have one.

Everything is used from outside: a callback for the clock, a collator that counts what it passes on.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from _common import OPTIM, run_of, synchronise
from transformers import PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from rayft.config.strategies import DdpSpec
from rayft.data.table import TokenTable
from rayft.models.load import load_model
from rayft.models.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Batching:
    """rows x passes = rows of a step; `packed` rows are max_length long."""

    rows: int  # of a forward pass
    passes: int
    packed: bool


class Clock(TrainerCallback):
    """When each step ended."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.ends = device, []

    def on_step_end(self, args, state, control, **kwargs) -> None:
        synchronise(self.device)
        self.ends.append(time.perf_counter())


class Counting:
    """A collator that remembers (real tokens, positions) of every batch."""

    def __init__(self, collator: Any) -> None:
        self.collator, self.seen = collator, []

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collator(examples)
        real = sum(len(example["input_ids"]) for example in examples)
        self.seen.append((real, batch["input_ids"].numel()))
        return batch


def trainer_of(args, model: Path, folder: Path, table: TokenTable, how: Batching) -> SFTTrainer:
    """SFTTrainer with rayft's settings where both have one."""
    run = run_of(args, model, DdpSpec(), global_batch=1, micro_batch=1, max_length=args.max_length)
    base = load_model(run.model, device=torch.device(args.device), seed=args.seed)
    base.requires_grad_(True)
    parts = [table.document(index) for index in range(table.documents)]
    dataset = datasets.Dataset.from_dict(
        {
            "input_ids": [ids.tolist() for ids, _ in parts],
            "completion_mask": [mask.astype(int).tolist() for _, mask in parts],
        }
    )
    config = SFTConfig(
        output_dir=str(folder),
        max_steps=args.steps,
        per_device_train_batch_size=how.rows,
        gradient_accumulation_steps=how.passes,
        learning_rate=OPTIM.lr,
        lr_scheduler_type="constant",
        weight_decay=OPTIM.weight_decay,
        max_grad_norm=OPTIM.clip,
        max_length=args.max_length,
        packing=how.packed,
        completion_only_loss=True,
        gradient_checkpointing=args.gradient_checkpointing,
        bf16=args.dtype == "bf16",
        use_cpu=args.device == "cpu",
        seed=args.seed,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        base, args=config, train_dataset=dataset, processing_class=load_tokenizer(run.model)
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def run_trl(
    args, model: Path, folder: Path, table: TokenTable, how: Batching, *, probe: bool
) -> dict:
    """One run of TRL: as `measured`, and what it chose. `probe`: ask its model whether it keeps
    packed documents apart (needs memory of its own)."""
    trainer = trainer_of(args, model, folder, table, how)
    note = packing_of(trainer, how) if probe and how.packed else ""
    clock = Clock(torch.device(args.device))
    counting = trainer.data_collator = Counting(trainer.data_collator)
    trainer.add_callback(clock)
    loss = trainer.train().training_loss
    seen = counting.seen[: args.steps * how.passes]
    real = sum(each for each, _ in seen)
    kept = sum(each for each, _ in seen[args.drop * how.passes :])
    share = real / sum(each for _, each in seen)
    checkpointing = trainer.model.is_gradient_checkpointing
    chosen = f"{trainer.args.optim.value}, gradient checkpointing {checkpointing}"
    return measured(args, clock.ends, kept, share, loss) | {"notes": [chosen, note]}


def measured(args, ends: list[float], tokens: int, share: float, loss: float) -> dict[str, Any]:
    """From the ends of all steps, and the real tokens of those after the dropped ones."""
    seconds = ends[-1] - ends[args.drop - 1]
    steps = len(ends) - args.drop
    return {"rate": tokens / seconds, "ms": 1e3 * seconds / steps, "real": share, "loss": loss}


@torch.no_grad()
def packing_of(trainer: SFTTrainer, how: Batching) -> str:
    """How TRL packs, and whether another first document moves the logits of those behind it."""
    batch = trainer.data_collator([trainer.train_dataset[row] for row in range(how.rows)])
    width = batch["input_ids"].shape[1]
    text = (
        f"packs by {trainer.args.packing_strategy!r}, padding_free={trainer.padding_free}, "
        f"{trainer.model.config._attn_implementation}: {how.rows} rows become one of {width} tokens"
    )
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    if len(starts) < 2:
        return text
    device = trainer.model.device
    given = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
        if name != "labels"
    }
    first = given["input_ids"].clone()
    first[:, : starts[1]] = first[:, : starts[1]].flip(1)
    first[:, : starts[1]] += (first[:, : starts[1]] < trainer.model.config.vocab_size - 1).long()

    def moved(**positions: torch.Tensor) -> float:
        one, two = (
            trainer.model(**{**given, "input_ids": ids, **positions}, use_cache=False).logits
            for ids in (given["input_ids"], first)
        )
        return float((one - two)[:, starts[1] :].float().abs().max())

    trainer.model.eval()
    own, mixed = moved(), moved(position_ids=torch.arange(width, device=device)[None])
    trainer.model.train()
    isolated = "keeps documents apart" if own <= 0.1 * mixed else "does NOT keep documents apart"
    return f"{text}; it {isolated} (logits moved {own:.1e}, mixed documents {mixed:.1e})"
