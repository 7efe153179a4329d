"""What cannot work in a sweep, as data: the rules for runs that have one."""

from __future__ import annotations

from collections.abc import Callable

from rayft.config.rule import Rule
from rayft.config.run import Run
from rayft.config.sweep import (
    PERTURBABLE,
    PERTURBABLE_OF_METHODS,
    TRIALS,
    AshaSpec,
    Domain,
    GridSpec,
    MedianSpec,
    OptunaSpec,
    PbtSpec,
    SweepSpec,
    perturbable,
)


def metrics(run: Run) -> tuple[str, ...]:
    """Names of what an evaluation logs and a sweep may go by."""
    names = ["eval_loss", "eval_ppl"]
    tasks = {source.task for source in (*run.data.train, *run.data.eval)}
    if len(tasks) > 1:
        held = sorted({source.task for source in run.data.eval})
        names += [f"{name}/{task}" for task in held for name in ("eval_loss", "eval_ppl")]
    return tuple(names)


def _sweep(run: Run) -> SweepSpec:
    if run.sweep is None:
        raise ValueError("these rules are for a run with a sweep")
    return run.sweep


def _steps(run: Run) -> int | None:
    """Of a trial, where it is known before the data is."""
    return _sweep(run).steps or run.train.steps


def _searches(run: Run, spec: type) -> bool:
    return isinstance(_sweep(run).search, spec)


def _decides(run: Run) -> bool:
    """The scheduler goes by evaluations on the way."""
    return isinstance(_sweep(run).scheduler, AshaSpec | MedianSpec | PbtSpec)


def _pbt(run: Run) -> bool:
    return isinstance(_sweep(run).scheduler, PbtSpec)


def _first(run: Run, wanted: Callable[[Domain], bool]) -> str:
    """The first dimension whose domain is `wanted`; "" without one."""
    return next((name for name, domain in _sweep(run).space.items() if wanted(domain)), "")


def _range(domain: Domain) -> bool:
    return domain.values is None


def _every_value(domain: Domain) -> bool:
    return domain.grid is not None


def _decision(run: Run) -> int | None:
    """Steps to the first decision of the scheduler: its own setting, else the first evaluation."""
    scheduler = _sweep(run).scheduler
    own = None
    if isinstance(scheduler, AshaSpec | MedianSpec):
        own = scheduler.grace
    elif isinstance(scheduler, PbtSpec):
        own = scheduler.every
    return own or run.train.eval_every


def _decision_key(run: Run) -> str:
    return "every" if _pbt(run) else "grace"


def _too_late(run: Run) -> bool:
    first, steps = _decision(run), _steps(run)
    return _decides(run) and first is not None and steps is not None and first >= steps


def _too_early(run: Run) -> bool:
    first, every = _decision(run), run.train.eval_every
    return _decides(run) and first is not None and every is not None and first < every


def _beyond_grid(run: Run) -> bool:
    sweep = _sweep(run)
    most = sweep.combinations
    return _searches(run, GridSpec) and most is not None and (sweep.trials or 0) > most


def _shorter_refit(run: Run) -> bool:
    sweep = _sweep(run)
    return sweep.refit and (sweep.steps or 0) > (run.train.steps or sweep.steps or 0)


def _never_compared(run: Run) -> bool:
    sweep = _sweep(run)
    return isinstance(sweep.scheduler, MedianSpec) and sweep.scheduler.least >= sweep.count


SWEEP_RULES: tuple[Rule, ...] = (
    Rule(
        lambda run: not run.data.eval,
        "a sweep goes by {run.sweep.metric}, and there is nothing to evaluate on; name held-out "
        "rows in data.eval",
        "data.eval",
    ),
    Rule(
        lambda run: bool(run.data.eval) and _sweep(run).metric not in metrics(run),
        lambda run: (
            f"sweep.metric: no evaluation of this run logs {_sweep(run).metric}; take one of "
            f"{', '.join(metrics(run)[:12])}"
        ),
        "sweep.metric",
    ),
    Rule(
        lambda run: (
            _decides(run)
            and run.train.eval_every is None
            and "train.eval_every" not in _sweep(run).paths()
        ),
        "{run.sweep.scheduler.kind} decides at evaluations, and without train.eval_every there is "
        "none before the end; set train.eval_every, or sweep.scheduler: none",
        "sweep.scheduler",
    ),
    Rule(
        _too_late,
        lambda run: (
            f"{_sweep(run).scheduler.kind} would first decide at step {_decision(run)}, and a "
            f"trial has {_steps(run)}; lower sweep.scheduler.{_decision_key(run)} or "
            "train.eval_every, or use sweep.scheduler: none"
        ),
        "sweep.scheduler",
    ),
    Rule(
        _too_early,
        lambda run: (
            f"sweep.scheduler.{_decision_key(run)}: {_decision(run)} comes before the first "
            f"evaluation (train.eval_every: {run.train.eval_every}), which is what is decided by; "
            "raise it, or evaluate more often"
        ),
        "sweep.scheduler",
    ),
    Rule(
        _never_compared,
        "median compares with {run.sweep.scheduler.least} other trials, and there are only "
        "{run.sweep.count} in all; lower sweep.scheduler.least, or raise sweep.trials",
        "sweep.scheduler",
    ),
    Rule(
        lambda run: _searches(run, OptunaSpec) and bool(_first(run, _every_value)),
        lambda run: (
            f"optuna does not try every value, as {_first(run, _every_value)}: grid asks; write "
            "choice, or use sweep.search: grid or random"
        ),
        "sweep.search",
    ),
    Rule(
        lambda run: _searches(run, GridSpec) and bool(_first(run, _range)),
        lambda run: (
            f"a grid tries every value, and {_first(run, _range)} is a range; list its values "
            "(grid, choice, int), or use sweep.search: random or optuna"
        ),
        "sweep.search",
    ),
    Rule(
        _beyond_grid,
        "sweep.trials: {run.sweep.trials}, but the grid has {run.sweep.combinations} combinations; "
        "leave trials out to run each once",
        "sweep.trials",
    ),
    Rule(
        lambda run: _sweep(run).count > TRIALS,
        "a grid of {run.sweep.count:,} combinations is more than any sweep can try; list fewer "
        "values, or use sweep.search: random or optuna",
        "sweep.space",
    ),
    Rule(
        lambda run: _pbt(run) and _searches(run, OptunaSpec),
        "pbt changes settings behind optuna's back, which would learn from the wrong ones; use "
        "sweep.search: random, or sweep.scheduler: asha",
        "sweep.search",
    ),
    Rule(
        lambda run: _pbt(run) and not any(map(perturbable, _sweep(run).paths())),
        lambda run: (
            "pbt changes settings on the way, and nothing in sweep.space can change then (that "
            f"can: {', '.join(PERTURBABLE)}, methods.N.{'|'.join(PERTURBABLE_OF_METHODS)}); use "
            "sweep.scheduler: asha"
        ),
        "sweep.scheduler",
    ),
    Rule(
        lambda run: _pbt(run) and _sweep(run).count < 2,
        "pbt copies the better half of a population, and there is one trial; raise sweep.trials",
        "sweep.trials",
    ),
    Rule(
        lambda run: (
            _sweep(run).steps is not None
            and bool({"train.steps", "train.epochs"} & set(_sweep(run).paths()))
        ),
        "sweep.steps sets the length of every trial, and the space varies it too; drop one of them",
        "sweep.steps",
    ),
    Rule(
        lambda run: run.optim.warmup >= 1 and run.optim.warmup >= (_sweep(run).steps or 1 << 62),
        "optim.warmup: {run.optim.warmup:g} steps would never end within sweep.steps: "
        "{run.sweep.steps}; below 1 it is a share of all steps, e.g. 0.03",
        "optim.warmup",
    ),
    Rule(
        _shorter_refit,
        "sweep.refit trains the winner for train.steps: {run.train.steps}, which is less than the "
        "sweep.steps: {run.sweep.steps} it has had; raise train.steps",
        "sweep.steps",
    ),
    Rule(
        lambda run: _sweep(run).seeds > 1 and "seed" in _sweep(run).paths(),
        "the space varies seed, and sweep.seeds: {run.sweep.seeds} repeats the winner with other "
        "seeds; drop one of them",
        "sweep.seeds",
    ),
    Rule(
        lambda run: (
            _sweep(run).pack == "off" and (_sweep(run).slots or _sweep(run).packs) is not None
        ),
        "sweep.slots and sweep.packs shape packs, and sweep.pack: off makes none; drop them, or "
        "use pack: auto",
        "sweep.pack",
    ),
    Rule(
        lambda run: run.scale.workers == 0,
        "a sweep runs on Ray, and scale.workers: 0 trains without it; use workers: 1, or "
        "sweep: null for a single run",
        "scale.workers",
    ),
)
