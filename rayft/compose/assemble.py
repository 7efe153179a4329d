"""A run from its parts: config in; prepared engine, stream and held-out batches out. No loop
here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rayft import methods, objectives, strategies
from rayft.compose.data import Corpus
from rayft.compose.kept import kept_tensors
from rayft.compose.step import TrainStep
from rayft.config.run import Run
from rayft.core.batch import Batch
from rayft.core.errors import ConfigError
from rayft.core.protocols import Engine, Method, Objective, ParamGroup, StateHolder, Strategy
from rayft.data.stream import EvalSet, TrainStream
from rayft.models.load import check_vocabulary, load_model, model_facts
from rayft.models.policy import CausalPolicy
from rayft.models.tokenizer import load_tokenizer, pad_id
from rayft.records.run_progress import RunSize


@dataclass(frozen=True)
class BuiltModel:
    """A model made trainable, not yet given to a strategy."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    methods: tuple[Method, ...]
    groups: tuple[ParamGroup, ...]
    objective: Objective
    policy: CausalPolicy
    step: TrainStep


EngineT = TypeVar("EngineT", bound=StateHolder)


@dataclass(frozen=True)
class RunParts(Generic[EngineT]):
    """Everything one rank needs to train and evaluate; the engine of a trial in a pack is its
    state alone."""

    run: Run
    built: BuiltModel
    engine: EngineT
    stream: TrainStream
    eval_batches: tuple[Batch, ...]
    tasks: tuple[str, ...]
    steps: int
    params_total: int
    params_trainable: int
    kept: Mapping[str, Tensor] = field(default_factory=dict)  # on CPU; see Method.kept

    @property
    def size(self) -> RunSize:
        """As records tell it."""
        return RunSize(self.steps, self.params_total, self.params_trainable)

    def lrs(self, step: int) -> Mapping[str, float]:
        """Learning rate by group name at a 1-based step."""
        factor = strategies.schedule(self.run.optim, self.steps)(step)
        return strategies.group_lrs(self.built.groups, self.run.optim.lr * factor)


def build(run: Run, device: torch.device, strategy: Strategy) -> BuiltModel:
    """Load the base, apply the methods in order, join policy and objective."""
    tokenizer = load_tokenizer(run.model)
    with strategy.loading():
        model = load_model(
            run.model,
            device=device,
            seed=run.seed,
            gradient_checkpointing=run.train.gradient_checkpointing,
            quant_storage=strategy.quant_storage,
        )
        chosen = methods.build_all(run.methods)
        groups = tuple(methods.apply_all(model, chosen, seed=run.seed))  # DoRA reads base weights
    check_vocabulary(model, tokenizer)
    objective = objectives.build(run.objective)
    policy = CausalPolicy(model, packing=run.data.packing)
    step = TrainStep(policy, objective)
    # transformers loads models in eval mode, where dropout and gradient checkpointing do nothing
    step.train()
    return BuiltModel(model, tokenizer, chosen, groups, objective, policy, step)


def strategy_of(run: Run, device: torch.device) -> Strategy:
    """The run's strategy on this device."""
    return strategies.build(
        run.strategy,
        run.optim,
        run.train,
        run.model,
        micro_batch=run.train.micro_batch,
        device=device,
    )


def assemble(run: Run, corpus: Corpus, device: torch.device) -> RunParts[Engine]:
    """Everything of a training run on this rank; all ranks must call it (strategies
    communicate)."""
    strategy = strategy_of(run, device)
    built = build(run, device, strategy)
    facts = model_facts(built.model)
    kept = kept_tensors(built.methods, built.model)
    engine = strategy.prepare(built.step, list(built.groups))
    if not built.policy.probed:
        built.policy.probe()
    stream = train_stream(run, corpus, pad_id(built.tokenizer))
    return RunParts(
        run=run,
        built=built,
        engine=engine,
        stream=stream,
        eval_batches=held_out(run, corpus, built, engine.rank, engine.world),
        tasks=corpus.tasks,
        steps=steps_of(run, stream),
        params_total=facts.total,
        params_trainable=facts.trainable,
        kept=kept,
    )


def train_stream(run: Run, corpus: Corpus, pad_id: int) -> TrainStream:
    """The training data of `run`."""
    return TrainStream(
        table=corpus.train,
        weights=tuple(source.weight for source in run.data.train),
        seed=run.seed,
        global_batch=run.train.global_batch,
        micro_batch=run.train.micro_batch,
        max_length=run.data.max_length,
        packing=run.data.packing,
        pad_id=pad_id,
        epochs=run.train.epochs,
    )


def steps_of(run: Run, stream: TrainStream) -> int:
    """Optimizer steps of `run`."""
    steps, epochs = run.train.steps, run.train.epochs
    if steps is not None:
        return steps
    if epochs is None:  # TrainSpec refuses this
        raise ConfigError("say either train.steps or train.epochs")
    return stream.steps_for(epochs)


def held_out(
    run: Run, corpus: Corpus, built: BuiltModel, rank: int, world: int, limit: int | None = None
) -> tuple[Batch, ...]:
    """This rank's evaluation batches; () without held-out data. `limit`: documents at most."""
    if corpus.eval is None:
        return ()
    size, pad = run.train.eval_batch or run.train.micro_batch, pad_id(built.tokenizer)
    return tuple(EvalSet(corpus.eval, size, pad, limit).batches(rank, world))
