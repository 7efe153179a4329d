"""The sweep as an Optuna study: a journal that optuna-dashboard and optuna.load_study open, and the
importance of each parameter."""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalChoiceType,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.importance import PedAnovaImportanceEvaluator
from optuna.storages.journal import BaseJournalBackend
from optuna.trial import FrozenTrial, TrialState

from rayft.report.axes import SpaceAxis, level
from rayft.report.facts import SweepFacts, TrialResult

LEAST = 12
"""Trials with a result below which importance is not computed."""
BEST_SHARE = 0.25
SHUFFLES = 20
_STATES = {
    "running": TrialState.RUNNING,
    "done": TrialState.COMPLETE,
    "stopped": TrialState.PRUNED,
    "diverged": TrialState.FAIL,
    "failed": TrialState.FAIL,
}


@dataclass(frozen=True)
class ParamImportance:
    """PED-ANOVA (Watanabe, Bansal & Hutter 2023, arXiv 2304.10255): how far the values of the best
    quarter of all trials differ from those of all trials, as shares of 1."""

    shares: dict[str, float]  # by the name of the dimension, the largest first
    chance: float  # the share that the strongest parameter gets when results are shuffled (median)
    trials: int


class _MemoryJournal(BaseJournalBackend):
    """A journal in memory: Optuna's file is its lines, one JSON object each."""

    def __init__(self) -> None:
        self.lines: list[dict[str, object]] = []

    def read_logs(self, log_number_from: int) -> list[dict[str, object]]:
        return self.lines[log_number_from:]

    def append_logs(self, logs: Sequence[Mapping[str, object]]) -> None:
        self.lines += [dict(line) for line in logs]


@contextmanager
def _quiet() -> Generator[None]:
    """Optuna neither logs nor warns while this is open."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        optuna.logging.set_verbosity(level)


def journal(facts: SweepFacts) -> str:
    """The text of the journal: one study named as the sweep, every trial with its intermediate
    values, distributions, times and user attributes."""
    memory = _MemoryJournal()
    with _quiet():
        storage = optuna.storages.JournalStorage(memory)
        way = "minimize" if facts.sign > 0 else "maximize"
        study = optuna.create_study(storage=storage, study_name=facts.record.name, direction=way)
        study.set_user_attr("metric", facts.record.metric)
        study.set_metric_names([facts.record.metric])
        spaces = {axis.name: distribution(axis) for axis in facts.axes}
        study.add_trials([_frozen(facts, row, spaces, i) for i, row in enumerate(facts.rows)])
    return "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in memory.lines)


def importance(facts: SweepFacts) -> ParamImportance | None:
    """Of each parameter that took more than one value; None with too few trials."""
    rows = facts.ranked()
    varied = [a for a in facts.axes if len({a.at(row.trial.params) for row in rows} - {None}) > 1]
    rows = [r for r in rows if all(axis.at(r.trial.params) is not None for axis in varied)]
    if len(rows) < LEAST or not varied:
        return None
    spaces = {axis.name: distribution(axis) for axis in varied}
    values = [facts.sign * (row.value or 0.0) for row in rows]
    with _quiet():
        study = optuna.create_study()
        study.add_trials(
            [_complete(row, varied, spaces, value) for row, value in zip(rows, values, strict=True)]
        )
        found = _shares(study, values)
        draw, strongest = random.Random(0), []
        for _ in range(SHUFFLES):
            mixed = draw.sample(values, len(values))
            strongest.append(max(_shares(study, mixed).values(), default=0.0))
    chance = sorted(strongest)[SHUFFLES // 2]
    return ParamImportance(dict(sorted(found.items(), key=lambda p: -p[1])), chance, len(rows))


def _shares(study: optuna.Study, values: Sequence[float]) -> dict[str, float]:
    return optuna.importance.get_param_importances(
        study,
        evaluator=PedAnovaImportanceEvaluator(target_quantile=BEST_SHARE),
        target=lambda trial: values[trial.number],
    )


def distribution(axis: SpaceAxis) -> BaseDistribution:
    """Optuna's word for a domain; the levels of a list are what Optuna takes as choices."""
    if axis.levels:
        return CategoricalDistribution(_choices(axis))
    if axis.domain.integers is not None:
        return IntDistribution(int(axis.low), int(axis.high))
    return FloatDistribution(axis.low, axis.high, log=axis.log)


def _choices(axis: SpaceAxis) -> list[CategoricalChoiceType]:
    """Numbers, flags and texts as they are, anything else as its text."""
    values = {level(value): value for value in axis.domain.values or ()}
    plain = [values.get(text, text) for text in axis.levels]
    return [v if isinstance(v, bool | int | float | str | None) else t
            for v, t in zip(plain, axis.levels, strict=True)]  # fmt: skip


def _params(axes: Sequence[SpaceAxis], row: TrialResult) -> dict[str, object]:
    found: dict[str, object] = {}
    for axis in axes:
        place = axis.at(row.trial.params)
        if place is None:
            continue
        if axis.levels:
            found[axis.name] = _choices(axis)[int(place)]
        else:
            found[axis.name] = int(place) if axis.domain.integers is not None else place
    return found


def _complete(
    row: TrialResult,
    axes: Sequence[SpaceAxis],
    spaces: Mapping[str, BaseDistribution],
    value: float,
) -> FrozenTrial:
    return optuna.trial.create_trial(
        params=_params(axes, row), distributions=dict(spaces), value=value
    )


def _frozen(
    facts: SweepFacts, row: TrialResult, spaces: Mapping[str, BaseDistribution], number: int
) -> FrozenTrial:
    trial, params = row.trial, _params(facts.axes, row)
    state = _STATES[trial.status]
    if state in (TrialState.COMPLETE, TrialState.PRUNED) and row.value is None:
        state = TrialState.FAIL
    shown = {"trial": trial.id, "status": trial.status, "step": trial.step, **row.told}
    extra = {"error": trial.error, "pack": trial.pack, "donors": dict(trial.donors)}
    over = datetime.fromtimestamp(trial.ended) if state.is_finished() else None
    return FrozenTrial(
        number=number,
        trial_id=number,
        state=state,
        value=row.value if state in (TrialState.COMPLETE, TrialState.PRUNED) else None,
        datetime_start=datetime.fromtimestamp(trial.began),
        datetime_complete=over,
        params=params,
        distributions={name: spaces[name] for name in params},
        user_attrs=shown | {name: value for name, value in extra.items() if value},
        system_attrs={},
        intermediate_values={
            report.step: report.metrics[facts.record.metric]
            for report in trial.reports
            if facts.record.metric in report.metrics
        },
    )
