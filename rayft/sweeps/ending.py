"""How a sweep ends: whether it has, its report, and what is said where nothing was found."""

from __future__ import annotations

from rayft.core.errors import ClusterLostError, DivergedError, RayftError
from rayft.sweeps.state import SweepState
from rayft.sweeps.view import SweepView


def goes_on(state: SweepState) -> bool:
    """Whether a sweep that is called done has more to do: it may be asked for more trials, or for
    more seeds; or a driver that had lost it called it done, with trials that are not over."""
    trials, spec = state.ledger.trials.values(), state.spec
    more = len(state.searched()) < spec.count and state.record.stopped_by == "trials"
    repeated = sum(bool(trial.origin) for trial in trials)
    return more or repeated < spec.seeds - 1 or not all(trial.over for trial in trials)


def leave_report(state: SweepState, view: SweepView) -> None:
    """report.html and what goes with it; what is to be deleted is gone."""
    from rayft.report import write_report  # plotly: once, at the end
    from rayft.report.facts import cost, read_facts

    state.close()
    state.write(cost=cost(read_facts(state.home)))
    state.fence(now=True)
    write_report(state.home)
    view.note(f"report: {state.home.shown()}/report.html")


def no_result_error(state: SweepState, reason: str) -> RayftError:
    """Why no trial is the best.

    Args:
        reason: what ended the search early, or "".
    """
    trials = state.searched()
    where = f"{state.home.shown()}/report.html"
    ended = [trial for trial in trials if trial.over]
    if not trials or len(ended) < len(trials):
        return RayftError(
            f"{reason or 'something'} ended the sweep before any trial was evaluated",
            where=where,
            fix="raise sweep.max_seconds; the same command goes on with these trials",
        )
    if all(trial.status == "diverged" for trial in trials):
        fix = "lower the rates in sweep.space"
        return DivergedError(f"all {len(trials)} trials diverged", where=where, fix=fix)
    cause = next((trial.error for trial in trials if trial.error), "")
    what, fix = f"all {len(trials)} trials failed", "read the failures in the report"
    return RayftError(what, where=where, cause=cause, fix=fix)


def placer_lost_error(again: str) -> ClusterLostError:
    """The placer is dead, and every host with it."""
    return ClusterLostError(
        "the process that places trials died, and all packs with it",
        cause="killed, or out of memory on the driver's node: see Ray's logs",
        fix=again,
    )
