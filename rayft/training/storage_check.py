"""What is asked of storage before anything is started: does it answer, can it be written?"""

from __future__ import annotations

from collections.abc import Callable

from rayft.config.run import Run
from rayft.core.address import carried
from rayft.storage.folder import Storage, probe


def check_storage(run: Run, home: Storage, note: Callable[[str], None]) -> None:
    """Storage that cannot be written is refused here, in seconds: before Ray, before any data.

    Raises:
        StorageError: it does not answer, or cannot be written.
    """
    probe(home.hasty())
    if run.data.cache is not None:  # by default it lies in the storage of the run
        probe(Storage.open(run.data.cache).hasty())
    if said := carried(run.addresses()):
        note(said)
