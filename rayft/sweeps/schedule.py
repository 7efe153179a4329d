"""The scheduler of a sweep: Ray Tune's, with steps for a clock."""

from __future__ import annotations

from typing import Any

from ray import tune
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)

from rayft.config.run import Run
from rayft.config.sweep import AshaSpec, MedianSpec, PbtSpec
from rayft.config.sweep_rules import perturbable
from rayft.sweeps.promotion import PromotingScheduler
from rayft.sweeps.trial import SCORE


def scheduler(run: Run) -> TrialScheduler:
    """The scheduler of the sweep block; steps are its clock."""
    sweep = run.swept
    first = run.train.eval_every or 1
    how: dict[str, Any] = {"metric": SCORE, "mode": sweep.mode}
    spec = sweep.scheduler
    if isinstance(spec, AshaSpec):
        most = sweep.steps or run.train.steps or 10**9
        grace = min(spec.grace or first, most)
        if spec.promote:
            return PromotingScheduler(most, grace, spec.factor, sweep.mode)
        return AsyncHyperBandScheduler(
            time_attr="step", max_t=most, grace_period=grace, reduction_factor=spec.factor, **how
        )
    if isinstance(spec, MedianSpec):
        return MedianStoppingRule(
            time_attr="step",
            grace_period=spec.grace or first,
            min_samples_required=spec.least,
            hard_stop=True,
            **how,
        )
    if isinstance(spec, PbtSpec):
        return PopulationBasedTraining(
            time_attr="step",
            perturbation_interval=spec.every or first,
            hyperparam_mutations=mutations(run),
            quantile_fraction=spec.quantile,
            resample_probability=spec.resample,
            log_config=False,
            **how,
        )
    return FIFOScheduler()


def mutations(run: Run) -> dict[str, Any]:
    """What population-based training may change: its lists, and its ranges as samplers."""
    found: dict[str, Any] = {}
    for path, domain in run.swept.space.items():
        if not perturbable(path):
            continue
        if domain.values is not None:
            found[path] = list(domain.values)
        elif domain.loguniform is not None:
            found[path] = tune.loguniform(*domain.loguniform)
        elif domain.uniform is not None:
            found[path] = tune.uniform(*domain.uniform)
    return found
