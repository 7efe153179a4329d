"""How a sweep ends: whether it has, its report, and what is said where nothing was found."""

from __future__ import annotations

from rayft.core.errors import ClusterLostError, DivergedError, RayftError
from rayft.runtime.sweepbook import SweepBook
from rayft.runtime.sweepview import SweepView


def goes_on(book: SweepBook) -> bool:
    """Whether a sweep that is called done has more to do: it may be asked for more trials, or for
    more seeds; or a driver that had lost it called it done, with trials that are not over."""
    trials, spec = book.book.trials.values(), book.spec
    more = len(book.searched()) < spec.count and book.record.stopped_by == "trials"
    repeated = sum(bool(trial.origin) for trial in trials)
    return more or repeated < spec.seeds - 1 or not all(trial.over for trial in trials)


def leave_report(book: SweepBook, view: SweepView) -> None:
    """report.html and what goes with it; what is to be deleted is gone."""
    from rayft.report import write_report  # plotly: once, at the end
    from rayft.report.facts import cost, read_facts

    book.close()
    book.write(cost=cost(read_facts(book.home)))
    book.fence(now=True)
    write_report(book.home)
    view.note(f"report: {book.home.shown()}/report.html")


def nothing_found(book: SweepBook, reason: str) -> RayftError:
    """Why no trial is the best.

    Args:
        reason: what ended the search early, or "".
    """
    trials = book.searched()
    where = f"{book.home.shown()}/report.html"
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


def placer_lost(again: str) -> ClusterLostError:
    """The desk is dead, and every host with it."""
    return ClusterLostError(
        "the process that places trials died, and all packs with it",
        cause="killed, or out of memory on the driver's node: see Ray's logs",
        fix=again,
    )
