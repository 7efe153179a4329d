"""Records in, page out: report.html, trials.csv and an Optuna storage. No torch in here.

from rayft.report import build
build("runs/my-sweep")
"""

from __future__ import annotations

from pathlib import Path

from rayft.storage.folder import Storage

PAGE, TABLE, JOURNAL = "report.html", "trials.csv", "optuna-journal.log"


def build(where: str | Path) -> list[str]:
    """`write_report` of the sweep in a folder or at a URI; the addresses of what was written.

    Raises:
        ConfigError, StorageError: see `write_report`.
    """
    home = Storage.open(str(where))
    return [home.child(name).uri for name in write_report(home)]


def write_report(storage: Storage) -> list[str]:
    """Build everything anew from what lies in a sweep's folder; safe while the sweep runs.

    Args:
        storage: the sweep's folder.

    Returns:
        The names of the files written into it.

    Raises:
        ConfigError: the folder is no sweep.
        StorageError: it cannot be read or written.
    """
    from rayft.report.facts import read_facts  # Plotly and Optuna: only when there is a report
    from rayft.report.page import page
    from rayft.report.study import journal
    from rayft.report.tables import trials_csv

    facts = read_facts(storage)
    made = {
        TABLE: trials_csv(facts),
        JOURNAL: journal(facts),
        PAGE: page(facts, storage.uri),
    }
    for name, text in made.items():
        storage.write_text(name, text)
    return list(made)
