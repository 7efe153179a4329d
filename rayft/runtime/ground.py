"""What a sweep stands on: Ray, the tokenised data, and everything that can be refused before the
first trial."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rayft.compose.job import Prepared
from rayft.config.run import Run
from rayft.core.errors import DataError
from rayft.core.storage import Storage
from rayft.runtime import preflight
from rayft.runtime.book import versions
from rayft.runtime.cluster import connected, hardware, has_dashboard, nodes
from rayft.runtime.desk import Desk
from rayft.runtime.driver_context import DriverContext, passed_on
from rayft.runtime.floor import Floor
from rayft.runtime.interrupt import Interrupt
from rayft.runtime.room import reasons_alone, room_for
from rayft.runtime.spread import over_hosts, over_ray
from rayft.runtime.sweepbook import SweepBook
from rayft.runtime.sweepview import SweepView
from rayft.runtime.types import Mapper
from rayft.runtime.watch import Leaving

CLOSE = 60.0  # seconds that hosts get to commit and go


@dataclass(frozen=True)
class Ground:
    """A desk that gives places, and how many trials can train at the same time."""

    desk: Any
    at_once: int
    leaving: Leaving


@contextmanager
def ground(run: Run, book: SweepBook, view: SweepView, interrupt: Interrupt) -> Iterator[Ground]:
    """The processes of packs and trials start while the data is found, or tokenised in them.

    Raises:
        InfeasibleError, StorageError, DataError: the sweep has not begun.
    """
    data = _Data(run, interrupt)
    address = os.environ.get("RAY_ADDRESS")
    if not ray.is_initialized():
        view.note(f"joining Ray at {address}" if address else "starting Ray on this machine")
    with connected(bool(reasons_alone(run)[1]), interrupt):
        interrupt.arm()  # ray.init installs a SIGTERM handler that ends the process
        interrupt.check()
        living = nodes()
        room = room_for(run, living)
        preflight.storage_everywhere(book.home, living)
        facts = hardware()
        floor = Floor(
            config=run.resolved() | {"storage": Storage.open(run.storage).uri},
            home=book.home.uri,
            packs=room.packs,
            slots=room.slots,
            alone=room.alone,
            cpus=run.scale.cpus,
            gpus=room.gpus,
            start=book.record.starts + 1,
            lease=book.lease.id,
            driver=DriverContext.here(),
            environment=passed_on() if address else {},
            dashboard=has_dashboard(),
            facts={"versions": versions(), "hardware": facts},
        )
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        name = f"rayft-{run.name}-desk-{os.getpid()}"
        # With the driver: a node that is lost must not take the sweep with it.
        desk = Desk.options(name=name, scheduling_strategy=here).remote(floor)
        leaving = Leaving(desk)
        book.left = leaving.done
        try:
            hosts = ray.get(desk.open.remote())
            prepared = data.on(hosts)
            before = book.record.data_hash
            if before and before != prepared.hash:
                raise DataError(
                    f"the data changed since sweep {run.name} began",
                    where="data.train, data.eval",
                    fix="put the data back to continue, or choose another name",
                )
            interrupt.check()
            book.begin(data_hash=prepared.hash, data=prepared.stats, hardware=facts, error="")
            ray.get(desk.begin.remote(prepared))
            view.note(room.sentence)
            yield Ground(desk, room.at_once, leaving)
        finally:
            if book.fenced:
                ray.kill(desk)  # the hosts are its own: they go with it, and commit nothing more
            elif not interrupt.cut_off:
                close(desk)
            leaving.close()


def close(desk: Any) -> None:
    """Let hosts commit and go; what does not answer in time goes with the desk that owns it."""
    with contextlib.suppress(ray.exceptions.RayError, TimeoutError):
        ray.get(desk.close.remote(), timeout=CLOSE)
    ray.kill(desk)


class _Data(threading.Thread):
    """Data that is in the cache, or small, is found while Ray starts; the rest waits for hosts."""

    def __init__(self, run: Run, interrupt: Interrupt) -> None:
        super().__init__(name="rayft-data", daemon=True)
        self._run, self._interrupt = run, interrupt
        self._ready = threading.Event()
        self._mapper: Mapper = over_ray(interrupt)
        self._error: BaseException | None = None
        self._value: Prepared | None = None
        self.start()

    def run(self) -> None:
        """Keeps the value or the error."""
        try:
            from rayft.compose.data import prepare_data  # torch and transformers: seconds

            self._value = prepare_data(self._run, self._spread)
        except BaseException as error:  # the main thread raises it
            self._error = error

    def _spread(self, function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        if len(items) == 1:  # done before any host has loaded its libraries
            return [function(items[0])]
        self._ready.wait()
        return self._mapper(function, items)

    def on(self, hosts: Sequence[Any]) -> Prepared:
        """Wait for the data; `hosts` may do the work. Raises what went wrong, or InterruptedRun."""
        if hosts:
            self._mapper = over_hosts(hosts, self._interrupt)
        self._ready.set()
        while self.is_alive():
            self.join(0.1)
            self._interrupt.check()
        if self._error is not None:
            raise self._error
        return self._value
