"""What cannot work, or surely is not meant, as data: when, and a sentence that says what to do.

Rules see only the config. What depends on the machine, the model or the data is refused by the room
that knows it.
"""

from __future__ import annotations

from rayft.config.data import SourceSpec
from rayft.config.rule import Rule
from rayft.config.run import Run
from rayft.config.strategies import ZeroSpec
from rayft.config.sweep_rules import SWEEP_RULES
from rayft.config.technique_rules import METHOD_RULES, OBJECTIVE_RULES
from rayft.core.errors import ConfigError


def _offload(run: Run, *kinds: str) -> bool:
    return run.strategy.offloads in kinds


def _nvme_path(run: Run) -> bool:
    return isinstance(run.strategy, ZeroSpec) and run.strategy.nvme_path is not None


def _flash(run: Run) -> bool:
    return run.model.attention == "flash_attention_2"


def _eight_bit(run: Run) -> bool:
    return run.optim.kind != "adamw"


def _most_workers(run: Run) -> int:
    workers = run.scale.workers
    return workers[1] if isinstance(workers, tuple) else max(workers, 1)


def _rows(source: SourceSpec, held_out: bool) -> tuple[str | None, ...]:
    """What decides which rows a source holds (how many of them are taken does not)."""
    builtin = source.path.startswith("builtin:")
    split = source.split or ("heldout" if builtin and held_out else "train")
    return source.path, source.subset, split, source.dataset_info


def _leaks(run: Run) -> bool:
    trained = {_rows(source, False) for source in run.data.train}
    return any(_rows(source, True) in trained for source in run.data.eval)


RULES: tuple[Rule, ...] = (
    *METHOD_RULES,
    *OBJECTIVE_RULES,
    # model
    Rule(
        lambda run: run.model.init == "random" and run.model.quant != "none",
        "model.init: random makes fresh weights, and {run.model.quant} would freeze that noise; "
        "use model.quant: none",
        "model.quant",
    ),
    Rule(
        lambda run: run.model.quant == "int8" and run.strategy.shards == 3,
        "int8 weights cannot be sharded by ZeRO stage 3; use strategy.stage: 2, or model.quant: "
        "nf4",
        "model.quant",
    ),
    Rule(
        lambda run: _flash(run) and run.arithmetic == "fp32",
        "flash_attention_2 computes in bf16 only; set model.dtype: bf16, or model.attention: sdpa",
        "model.attention",
    ),
    Rule(
        lambda run: _flash(run) and run.scale.gpus == 0,
        "flash_attention_2 needs a GPU and scale.gpus is 0; use model.attention: sdpa",
        "model.attention",
    ),
    Rule(
        lambda run: (
            _flash(run)
            and run.data.packing
            and max(run.train.micro_batch, run.train.eval_batch or 1) > 1
        ),
        "flash_attention_2 takes packed rows one at a time; set train.micro_batch: 1 (and no "
        "eval_batch) and, for the same tokens per pass, a larger data.max_length",
        "train.micro_batch",
    ),
    Rule(
        lambda run: run.train.precision == "fp32" and run.model.dtype == "bf16",
        "train.precision: fp32 cannot win back what bf16 weights have lost; use model.dtype: fp32, "
        "or train.precision: auto",
        "train.precision",
    ),
    # optimizer
    Rule(
        lambda run: _eight_bit(run) and not run.strategy.block_optimizers and _offload(run, "none"),
        "{run.optim.kind} keeps its state in blocks that ZeRO would cut apart; use optim.kind: "
        "adamw (ZeRO shards its state anyway), or strategy: ddp",
        "optim.kind",
    ),
    Rule(
        lambda run: _eight_bit(run) and _offload(run, "cpu", "nvme"),
        "{run.optim.kind} and strategy.offload both move optimizer state out of the way, and only "
        "DeepSpeed's own AdamW can be offloaded; use optim.kind: adamw, or strategy: ddp",
        "optim.kind",
    ),
    Rule(
        lambda run: run.optim.kind == "paged_adamw_8bit" and run.scale.gpus == 0,
        "paged_adamw_8bit pages between GPU and CPU, and scale.gpus is 0; use adamw_8bit",
        "optim.kind",
    ),
    Rule(
        lambda run: run.train.steps is not None and 1 <= run.optim.warmup >= run.train.steps,
        "optim.warmup: {run.optim.warmup:g} steps would never end within train.steps: "
        "{run.train.steps}; below 1 it is a share of all steps, e.g. 0.03",
        "optim.warmup",
    ),
    Rule(
        lambda run: run.optim.schedule == "constant" and run.optim.min_lr_ratio > 0,
        "optim.min_lr_ratio says where a schedule ends, and a constant one does not; leave it out, "
        "or use schedule: cosine or linear",
        "optim.min_lr_ratio",
    ),
    # strategy
    Rule(
        lambda run: _offload(run, "cpu", "nvme") and run.strategy.shards == 0,
        "ZeRO stage 0 shards nothing, so nothing can be offloaded; use strategy.stage: 1, 2 or 3",
        "strategy.offload",
    ),
    Rule(
        lambda run: _offload(run, "nvme") and run.strategy.shards in (1, 2),
        "offload to NVMe belongs to ZeRO stage 3; use strategy.stage: 3, or offload: cpu",
        "strategy.offload",
    ),
    Rule(
        lambda run: _offload(run, "nvme") and not _nvme_path(run),
        "offload: nvme needs strategy.nvme_path, a folder on the local NVMe disk of every node",
        "strategy.offload",
    ),
    Rule(
        lambda run: _nvme_path(run) and not _offload(run, "nvme"),
        "strategy.nvme_path is given, but nothing goes there; add offload: nvme, or drop it",
        "strategy.nvme_path",
    ),
    # scale
    Rule(
        lambda run: isinstance(run.scale.workers, tuple) and not run.strategy.elastic,
        "an elastic number of workers is not proven with DeepSpeed; give scale.workers one number "
        "(a stopped run continues on another number of workers), or use strategy: ddp",
        "scale.workers",
    ),
    Rule(
        lambda run: run.train.global_batch < _most_workers(run),
        "train.global_batch: {run.train.global_batch} leaves some workers without a single row per "
        "step; raise it, or lower scale.workers",
        "train.global_batch",
    ),
    Rule(
        lambda run: (run.scale.gpus or 0) > 1,
        "a worker drives one GPU, and scale.gpus: {run.scale.gpus:g} would leave the rest idle; "
        "use gpus: 1 and more workers",
        "scale.gpus",
    ),
    Rule(
        lambda run: 0 < (run.scale.gpus or 1) < 1 and _most_workers(run) > 1,
        "several workers on one GPU cannot talk to each other (NCCL refuses); use scale.gpus: 1, "
        "or one worker",
        "scale.gpus",
    ),
    Rule(
        lambda run: bool({"CPU", "GPU"} & {name.upper() for name in run.scale.resources}),
        "scale.resources is for custom resources; CPUs and GPUs are scale.cpus and scale.gpus",
        "scale.resources",
    ),
    # data and evaluation
    Rule(
        lambda run: run.train.eval_every is not None and not run.data.eval,
        "train.eval_every is set, but there is nothing to evaluate on; name held-out rows in "
        "data.eval, or drop it",
        "train.eval_every",
    ),
    Rule(
        _leaks,
        "data.eval holds rows that are trained on, so the held-out loss would mean nothing; take "
        "another file or another split",
        "data.eval",
    ),
)


def matching(run: Run) -> list[Rule]:
    """The rules that fire, in the order of the table."""
    swept = SWEEP_RULES if run.sweep is not None else ()
    return [rule for rule in (*RULES, *swept) if rule.when(run)]


def fired(run: Run) -> list[str]:
    """One sentence per rule that fires; empty when the run may start."""
    return [rule.sentence(run) for rule in matching(run)]


def refuse(run: Run) -> None:
    """Raise ConfigError with every rule that fires; `load` does so with line numbers."""
    found = matching(run)
    if len(found) == 1:
        raise ConfigError(found[0].sentence(run), where=found[0].key)
    if found:
        lines = [f"  {rule.key}: {rule.sentence(run)}" for rule in found]
        raise ConfigError("\n".join([f"{len(found)} reasons to refuse", *lines]))
