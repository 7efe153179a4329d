"""What a trial said before it was cut off, read from its folder.

A report is durable in metrics.jsonl before the commit of its step is, but whoever listened may have
died between that commit and its own note of the report. The trial goes on behind it and would never
say it again; so its host does, before anything new.
"""

from __future__ import annotations

from rayft.records.run_record import stored_record
from rayft.records.series import read_series
from rayft.storage.folder import Storage
from rayft.trials.types import TrialReport


def missed_reports(home: Storage, after: int, upto: int) -> list[TrialReport]:
    """The reports of the trial in `home` between its start and its end, `after` < step <= `upto`.

    They hold what metrics.jsonl does: no seconds and no memory, which the next report brings.

    Args:
        after: the last step that was heard.
        upto: the step that the trial continues from; what was logged later is done again.

    Raises:
        StorageError: the folder cannot be read.
    """
    if upto <= after:
        return []
    evaluated, trained = {}, {}
    for row in read_series(home):
        (evaluated if row.get("split") == "eval" else trained)[row["step"]] = row
    record = stored_record(home)
    if record is None:  # whoever takes the trial makes it anew
        return []
    facts = {"params_trainable": float(record.params_trainable)}
    if record.base:
        facts["base_loss"] = record.base["eval_loss"]
    found = []
    for step, row in evaluated.items():
        if after < step <= upto and 0 < step < record.steps_total:
            scores = {name: value for name, value in row.items() if name.startswith("eval_")}
            last = trained.get(step, {})  # with train.log_every > 1 perhaps none
            extra = {name: float(last[name]) for name in ("loss", "tokens") if name in last}
            found.append(TrialReport(record.name, step, {**scores, **facts, **extra}))
    return found
