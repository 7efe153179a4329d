"""The packs of a sweep: their processes, who is in which, and who gets the next free slot."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass, field

import ray
import ray.exceptions

from rayft.core.errors import RayftError
from rayft.hosts.pack_actor import PackActor, PackOpening
from rayft.hosts.placer_config import PlacerConfig
from rayft.hosts.trial_host import ActorHandle
from rayft.trials.placement import choose_donor, choose_pack

STARTS = 3  # processes of one pack that die before they are ready, until no more is started


@dataclass(eq=False)
class PooledPack:
    """A host process, the key of what is loaded in it, and who is in."""

    name: str
    host: ActorHandle
    ready: bool = False  # it has a place on a node, and its libraries are loaded
    failed: int = 0  # processes before this one that were never ready
    key: str | None = None
    trials: set[str] = field(default_factory=set)
    full: bool = False  # refused for memory; until somebody leaves
    opening: bool = False
    moving: bool = False  # one of its trials is on its way to another pack
    stats: dict[str, float] = field(default_factory=dict)


class PackPool:
    """All packs. Lives in the placer's event loop."""

    def __init__(self, settings: PlacerConfig, sweep: str) -> None:
        self._settings, self._sweep, self._slots = settings, sweep, settings.slots
        self._changed = asyncio.Condition()
        self._queue: list[str] = []  # trials that wait for a slot, longest first
        self._unshared: set[str] = set()  # keys whose base no trials can share
        self._error = ""
        self._warming: set[asyncio.Task[None]] = set()
        self._all = [self._new(f"pack-{index}") for index in range(settings.packs)]

    def __iter__(self) -> Iterator[PooledPack]:
        return iter(self._all)

    @property
    def waiting(self) -> int:
        """Trials that wait for a slot."""
        return len(self._queue)

    def _new(self, name: str, failed: int = 0) -> PooledPack:
        settings = self._settings
        options: dict[str, object] = {
            "name": f"rayft-{self._sweep}-{name}-{secrets.token_hex(2)}",
            "num_cpus": settings.cpus,
            "max_concurrency": 1000,
        }
        if settings.gpus:
            options["num_gpus"] = settings.gpus
        if settings.environment:
            options["runtime_env"] = {"env_vars": settings.environment}
        host = PackActor.options(**options).remote(settings.driver, settings.cpus, settings.gpus)
        pack = PooledPack(name, host, failed=failed)
        self._keep(self._warm(pack))
        return pack

    def open_all(self, key: str, opening: PackOpening) -> None:
        """Load the base that the first trials will most likely ask for; returns at once. What goes
        wrong is told to the first trial, which tries again."""
        for pack in self._all:
            self._keep(self._open_early(pack, key, opening))

    async def _open_early(self, pack: PooledPack, key: str, opening: PackOpening) -> None:
        if pack.key is None and not pack.trials and not pack.opening:
            with contextlib.suppress(ray.exceptions.RayError):
                await self.open(pack, key, opening)

    def _keep(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._warming.add(task)  # the loop itself holds tasks only weakly
        task.add_done_callback(self._warming.discard)

    async def _warm(self, pack: PooledPack) -> None:
        """Nobody enters before the process is there: after a lost node it may never be."""
        try:
            await pack.host.wait_ready.remote()
        except ray.exceptions.RayError as error:
            if pack not in self._all:
                return  # it was told to go
            self._error = str(error)
            await self.replace(pack)
            return
        pack.ready = True
        await self.notify()

    # ---- places

    async def wait_for_slot(self, trial: str, key: str) -> PooledPack | None:
        """Wait for a place in the emptiest pack that may take the trial; None where none ever
        will, because its base cannot be shared.

        Raises:
            RayftError: no pack process starts any more.
        """
        async with self._changed:
            self._queue.append(trial)
            try:
                while True:
                    if key in self._unshared or not (self._all or self._error):
                        return None
                    pack = choose_pack(self._all, key, self._slots)
                    if pack is not None:
                        break
                    if not self._all:
                        raise RayftError(f"no process for a pack starts: {self._error}")
                    await self._changed.wait()  # wakes in the order of waiting
            finally:
                self._queue.remove(trial)
            pack.trials.add(trial)
            return pack

    async def open(self, pack: PooledPack, key: str, opening: PackOpening) -> None:
        """Load the base for trials of this key; whoever comes meanwhile waits for it. Raises what
        the host does."""
        async with self._changed:
            while pack.opening:
                await self._changed.wait()
        if pack.key == key:
            return
        pack.key, pack.opening = key, True
        try:
            await pack.host.open.remote(opening)
        except ray.exceptions.RayError:
            pack.key = None
            raise
        finally:
            pack.opening = False
            await self.notify()

    async def left(self, pack: PooledPack, trial: str) -> None:
        """The trial's place is free."""
        pack.trials.discard(trial)
        pack.full = False
        await self.notify()

    async def notify(self) -> None:
        """Whoever waits looks again."""
        async with self._changed:
            self._changed.notify_all()

    # ---- packs come and go

    async def replace(self, pack: PooledPack) -> None:
        """A new process for one that broke."""
        ray.kill(pack.host)  # it may be alive, and hold a GPU's memory
        if pack in self._all:
            failed = 0 if pack.ready else pack.failed + 1
            next_one = [self._new(pack.name, failed)] if failed < STARTS else []
            index = self._all.index(pack)
            self._all[index : index + 1] = next_one
        await self.notify()

    def halve_slots(self) -> None:
        """Half as many trials in a pack from now on: one ran out of memory all the same."""
        self._slots = max(1, self._slots // 2)

    async def unshare(self, key: str) -> int:
        """No trials of this key can share their base: the packs that are empty leave the cluster to
        runs of their own; how many went."""
        self._unshared.add(key)
        gone = [pack for pack in self._all if not pack.trials]
        self._all = [pack for pack in self._all if pack.trials]
        for pack in gone:
            ray.kill(pack.host)
        await self.notify()
        return len(gone)

    async def rebalance(self) -> str:
        """Let a trial out of the fullest pack where `choose_donor` says so.

        Returns:
            The trial that has left its pack and will enter again; "" when none has.
        """
        donor = choose_donor(self._all, len(self._queue))
        if donor is None:
            return ""
        donor.moving = True
        try:
            trial = max(donor.trials)  # the youngest
            if not await donor.host.move.remote(trial):
                return ""
            donor.trials.discard(trial)
            return trial
        except ray.exceptions.RayError:
            return ""  # it died; its trials find out by themselves
        finally:
            donor.moving = False
