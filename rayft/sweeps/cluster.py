"""What a sweep stands on: Ray, the tokenised data, and everything that can be refused before the
first trial."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rayft.cluster import preflight
from rayft.cluster.connect import cluster_hardware, connected, has_dashboard, nodes
from rayft.cluster.driver_context import DriverContext, passed_on
from rayft.cluster.interrupt import Interrupt
from rayft.cluster.map_tasks import map_on_hosts, map_on_ray
from rayft.compose.job import Item, Made, PreparedData, TaskMapper
from rayft.config.run import Run
from rayft.core.errors import DataError
from rayft.hosts.capacity import ClusterCapacity, cluster_capacity, reasons_not_packed
from rayft.hosts.placer import TrialPlacer
from rayft.hosts.placer_config import PlacerConfig
from rayft.hosts.trial_host import ActorHandle
from rayft.records.run_record import SweepWinner
from rayft.storage.folder import Storage
from rayft.sweeps.best import copy_winner
from rayft.sweeps.callback import LeavingTrials
from rayft.sweeps.state import SweepState
from rayft.sweeps.view import SweepView
from rayft.training.state import versions

PERIOD = 0.5  # seconds between two looks at the lease
CLOSE = 60.0  # seconds that hosts get to commit and go


@dataclass(frozen=True)
class SweepCluster:
    """What the phases of a sweep work with."""

    placer: ActorHandle
    at_once: int  # trials that can train at the same time
    leaving: LeavingTrials
    begin: Callable[[], None]  # waits for the data, which trials wait for; see `open_cluster`


@contextmanager
def open_cluster(
    run: Run, state: SweepState, view: SweepView, interrupt: Interrupt
) -> Generator[SweepCluster]:
    """The processes of packs and trials start while the data is found, or tokenised in them.

    `begin` of what is yielded waits for the data, once; from then on the sweep exists.

    Raises:
        InfeasibleError, StorageError, DataError: the sweep has not begun.
    """
    data = _DataThread(run, interrupt)
    address = os.environ.get("RAY_ADDRESS")
    if not ray.is_initialized():
        view.note(f"joining Ray at {address}" if address else "starting Ray on this machine")
    with connected(bool(reasons_not_packed(run)[1]), interrupt):
        interrupt.arm()  # ray.init installs a SIGTERM handler that ends the process
        interrupt.check()
        state.mark("ray")
        living = nodes()
        capacity = cluster_capacity(run, living)
        own = ray.get_runtime_context().get_node_id()
        # This process has looked for its own node: a task there would first need a process.
        elsewhere = [node for node in living if node.id != own]
        preflight.storage_everywhere(state.home, elsewhere)
        facts = cluster_hardware()
        settings = _settings(run, state, capacity, facts)
        here = NodeAffinitySchedulingStrategy(own, soft=False)
        name = f"rayft-{run.name}-placer-{os.getpid()}"
        # With the driver: a node that is lost must not take the sweep with it.
        placer: ActorHandle = TrialPlacer.options(name=name, scheduling_strategy=here).remote(
            settings
        )
        leaving = LeavingTrials(placer)
        state.left = leaving.done
        try:
            hosts = ray.get(placer.open.remote())
            state.mark("hosts")

            @cache
            def begin() -> None:
                prepared = _begin(state, data.on(hosts), interrupt, facts)
                ray.get(placer.begin.remote(prepared))
                view.note(capacity.sentence)

            yield SweepCluster(placer, capacity.at_once, leaving, begin)
        finally:
            if state.fenced:
                ray.kill(placer)  # the hosts are its own: they go with it, and commit nothing more
            elif not interrupt.cut_off:
                close_placer(placer)
            leaving.close()


def _begin(
    state: SweepState, prepared: PreparedData, interrupt: Interrupt, hardware: dict[str, Any]
) -> PreparedData:
    """There is data: where it is the same as before, the sweep exists on storage from now on."""
    before = state.record.data_hash
    if before and before != prepared.hash:
        raise DataError(
            f"the data changed since sweep {state.run.name} began",
            where="data.train, data.eval",
            fix="put the data back to continue, or choose another name",
        )
    interrupt.check()
    state.mark("data")
    state.begin(data_hash=prepared.hash, data=prepared.stats, hardware=hardware, error="")
    return prepared


def _settings(
    run: Run, state: SweepState, capacity: ClusterCapacity, facts: dict[str, object]
) -> PlacerConfig:
    return PlacerConfig(
        config={**run.resolved(), "storage": Storage.open(run.storage).uri},
        home=state.home.uri,
        packs=capacity.packs,
        slots=capacity.slots,
        own_runs=capacity.own_runs,
        cpus=run.scale.cpus,
        gpus=capacity.gpus,
        start=state.record.starts + 1,
        lease=state.lease.id if state.lease else "",
        driver=DriverContext.here(),
        environment=passed_on() if os.environ.get("RAY_ADDRESS") else {},
        dashboard=has_dashboard(),
        facts={"versions": versions(), "hardware": facts},
    )


def close_placer(placer: ActorHandle) -> None:
    """Let hosts commit and go; what does not answer in time goes with the placer that owns it."""
    with contextlib.suppress(RayError, TimeoutError):
        ray.get(placer.close.remote(), timeout=CLOSE)
    ray.kill(placer)


def leave_best(placer: ActorHandle, state: SweepState, best: SweepWinner) -> str:
    """best/ from the winner's own checkpoint, in a process that has torch loaded already; what
    `copy_winner` says."""
    host: ActorHandle = ray.get(placer.ready_host.remote())
    asked = (state.home.uri, best.trial)
    state.fence(now=True)
    if host is None:
        return copy_winner(*asked)
    copied = host.call.remote(copy_winner, *asked)
    while not ray.wait([copied], timeout=PERIOD)[0]:
        state.fence()  # whoever leaves here takes the host along
    return str(ray.get(copied))


class _DataThread(threading.Thread):
    """Data that is in the cache, or small, is found while Ray starts; the rest waits for hosts."""

    def __init__(self, run: Run, interrupt: Interrupt) -> None:
        super().__init__(name="rayft-data", daemon=True)
        self._run, self._interrupt = run, interrupt
        self._ready = threading.Event()
        self._mapper: TaskMapper = map_on_ray(interrupt)
        self._error: BaseException | None = None
        self._value: PreparedData | None = None
        self.start()

    def run(self) -> None:
        """Keeps the value or the error."""
        try:
            from rayft.compose.data import prepare_data  # torch and transformers: seconds

            self._value = prepare_data(self._run, self._map_items)
        except BaseException as error:  # the main thread raises it
            self._error = error

    def _map_items(self, function: Callable[[Item], Made], items: Sequence[Item]) -> list[Made]:
        if len(items) == 1:  # done before any host has loaded its libraries
            return [function(items[0])]
        self._ready.wait()
        return self._mapper(function, items)

    def on(self, hosts: Sequence[Any]) -> PreparedData:
        """Wait for the data; `hosts` may do the work. Raises what went wrong, or InterruptedRun."""
        if hosts:
            self._mapper = map_on_hosts(hosts, self._interrupt)
        self._ready.set()
        while self.is_alive():
            self.join(0.1)
            self._interrupt.check()
        if self._error is not None:
            raise self._error
        if self._value is None:
            raise RuntimeError("the data's thread ended without data")
        return self._value
