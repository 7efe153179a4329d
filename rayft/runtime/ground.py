"""What a sweep stands on: Ray, the tokenised data, and everything that can be refused before the
first trial."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rayft.compose.job import Prepared
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
from rayft.runtime.types import Mapper


@contextmanager
def ground(
    run: Run, book: SweepBook, view: SweepView, interrupt: Interrupt
) -> Iterator[tuple[Floor, int]]:
    """The floor, and how many trials can train on it at the same time.

    Raises:
        InfeasibleError, StorageError, DataError: nothing has started.
    """
    ready = threading.Event()
    # Data that is in the cache, or small, is found while Ray starts; the rest waits for its tasks.
    data = _Beside(lambda: _prepare(run, _once(ready, over_ray(interrupt))))
    address = os.environ.get("RAY_ADDRESS")
    view.note(f"joining Ray at {address}" if address else "starting Ray on this machine")
    with connected(dashboard=bool(reasons_alone(run)[1])):
        interrupt.arm()  # ray.init installs a SIGTERM handler that ends the process
        interrupt.check()
        living = nodes()
        room = room_for(run, living)
        preflight.storage_everywhere(book.home, living)
        ready.set()
        prepared = data.result(interrupt)
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


def _prepare(run: Run, mapper: Mapper) -> Prepared:
    from rayft.compose.data import prepare_data  # torch and transformers: seconds

    return prepare_data(run, mapper)


def _once(ready: threading.Event, mapper: Mapper) -> Mapper:
    """`mapper`, for one item at once, for more when Ray is there."""

    def spread(function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        if len(items) > 1:
            ready.wait()
        return mapper(function, items)

    return spread


class _Beside(threading.Thread):
    """A function beside the main thread."""

    def __init__(self, function: Callable[[], Prepared]) -> None:
        super().__init__(name="rayft-data", daemon=True)
        self._function = function
        self._error: BaseException | None = None
        self._value: Prepared | None = None
        self.start()

    def run(self) -> None:
        """Keeps the value or the error."""
        try:
            self._value = self._function()
        except BaseException as error:  # the main thread raises it
            self._error = error

    def result(self, interrupt: Interrupt) -> Prepared:
        """Wait for the value; raises what the function raised, or InterruptedRun."""
        while self.is_alive():
            self.join(0.1)
            interrupt.check()
        if self._error is not None:
            raise self._error
        return self._value
