"""What a sweep stands on: Ray, the tokenised data, and everything that can be refused before the
first trial."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rayft.config.run import Run
from rayft.core.errors import DataError
from rayft.core.storage import Storage
from rayft.runtime import preflight
from rayft.runtime.cluster import connected, hardware, nodes, passed_on
from rayft.runtime.floor import Floor
from rayft.runtime.interrupt import Interrupt
from rayft.runtime.room import reasons_alone, room_for
from rayft.runtime.spread import over_ray
from rayft.runtime.sweepbook import SweepBook
from rayft.runtime.sweepview import SweepView


@contextmanager
def ground(
    run: Run, book: SweepBook, view: SweepView, interrupt: Interrupt
) -> Iterator[tuple[Floor, int]]:
    """The floor, and how many trials can train on it at the same time.

    Raises:
        InfeasibleError, StorageError, DataError: nothing has started.
    """
    # The driver needs transformers to find the data; Ray takes as long to start.
    threading.Thread(target=_import_data, daemon=True).start()
    address = os.environ.get("RAY_ADDRESS")
    view.note(f"joining Ray at {address}" if address else "starting Ray on this machine")
    with connected(dashboard=bool(reasons_alone(run)[1])):
        interrupt.arm()  # ray.init installs a SIGTERM handler that ends the process
        interrupt.check()
        living = nodes()
        room = room_for(run, living)
        preflight.storage_everywhere(book.home, living)
        from rayft.compose.data import prepare_data

        prepared = prepare_data(run, over_ray(interrupt))
        before = book.record.data_hash
        if before and before != prepared.hash:
            raise DataError(
                f"the data changed since sweep {run.name} began",
                where="data.train, data.eval",
                fix="put the data back to continue, or choose another name",
            )
        interrupt.check()
        facts = hardware()
        book.begin(data_hash=prepared.hash, data=prepared.stats, hardware=facts, error="")
        view.note(room.sentence)
        yield (
            Floor(
                config=run.resolved() | {"storage": Storage.open(run.storage).uri},
                home=book.home.uri,
                prepared=prepared,
                packs=room.packs,
                slots=room.slots,
                alone=room.alone,
                cpus=run.scale.cpus,
                gpus=room.gpus,
                start=book.record.starts,
                cwd=str(Path.cwd()),
                environment=passed_on() if address else {},
                facts={"versions": book.record.versions, "hardware": facts},
            ),
            room.at_once,
        )


def _import_data() -> None:
    import rayft.compose.data  # noqa: F401  # only for the time it takes
