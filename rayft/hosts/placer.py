"""Gives every trial of a sweep a host, and takes the place back.

One asynchronous actor. Trials that may share a frozen base wait for a slot in a pack; all others
wait for their turn as a Ray Train run of their own. A freed place goes to whoever has waited
longest. A pack that dies is replaced; its trials come back by themselves.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import threading
import time
from collections.abc import Awaitable, Mapping

import ray
import ray.exceptions

from rayft.compose.job import AttemptJob, PreparedData
from rayft.config.run import Run
from rayft.config.space import applied
from rayft.core.errors import RayftError
from rayft.hosts.overview import HostsOverview
from rayft.hosts.pack_actor import PackOpening
from rayft.hosts.pack_pool import PackPool, PooledPack
from rayft.hosts.placer_config import ATTEMPTS, PlacerConfig, prepare_trial_data, what_is_read
from rayft.hosts.trial_host import ActorHandle
from rayft.records.run_record import Status
from rayft.storage.folder import Storage
from rayft.storage.lease import superseded
from rayft.trials.plan import pack_key, why_not_packed
from rayft.trials.types import NoRoom, UnsharedBase

GUARD = 5.0  # seconds between two looks at the lease
DEATHS = 3  # of one trial's hosts before it is given up


@ray.remote(num_cpus=0)
class TrialPlacer:
    """See the head of this file."""

    def __init__(self, settings: PlacerConfig) -> None:
        self._settings = settings
        settings.driver.enter()
        self._base = Run.model_validate(settings.config)
        self._opened: PackPool | None = None
        self._data: PreparedData | None = None
        self._begun = asyncio.Event()  # there is data
        self._other_data: dict[str, Awaitable[PreparedData]] = {}  # where the space changes it
        self._where: dict[str, PooledPack | ActorHandle] = {}  # a pack, or a trial's own host
        self._deaths: dict[str, int] = {}
        self._joins = 0
        self._own_places = asyncio.Semaphore(max(1, settings.own_runs))
        self._packs_given = 0  # packs that went in favour of runs of their own
        self._news: list[str] = []  # lines for people
        self._stopping = False
        self._left: set[str] = set()  # trials that were told to leave for good
        threading.Thread(target=self._guard, name="lease", daemon=True).start()

    def _guard(self) -> None:
        """A driver that stands still cannot stop what it has started. Once another one has the
        sweep, this process ends, and all hosts with it: they are its own."""
        home = Storage.open(self._settings.home)
        while not superseded(home, self._settings.lease):
            time.sleep(GUARD)
        os._exit(1)

    @property
    def _packs(self) -> PackPool:
        if self._opened is None:
            raise RayftError("trials enter before the packs are opened")
        return self._opened

    async def open(self) -> list[ActorHandle]:
        """Start the processes of all packs; they load torch while the data is still prepared."""
        self._opened = PackPool(self._settings, self._base.name)
        return [pack.host for pack in self._packs]

    async def begin(self, prepared: PreparedData) -> None:
        """The tokenised data of the sweep's own data section; trials may enter."""
        self._data = prepared
        self._begun.set()
        if self._base.swept.pack != "off" and not why_not_packed(self._base):
            # loaded while the trials' own processes still start
            self._packs.open_all(pack_key(self._base), await self._opening(self._base))

    async def enter(
        self, trial: str, params: Mapping[str, object], source: dict[str, str] | None, heard: int
    ) -> tuple[ActorHandle, str]:
        """Wait for the data and a place; the handle of the host that trains `trial` from now on,
        and its name where it is a pack.

        Args:
            source: {"trial", "folder"} to continue another trial's state with these params.
            heard: the last step whose report its client has.

        Raises:
            RayftError: it can never run; `ConfigError` for params that make no valid config.
        """
        await self._begun.wait()
        # Tune also pauses a trial and gives it its own pointer: then its own commits are the state.
        other = source is not None and source["trial"] != trial
        await self._free(trial, keep=not other, tell=True)
        home = Storage.open(self._settings.home).child("trials").uri
        if other:  # after a restart its own commits are still there, and hosts would prefer them
            await asyncio.to_thread(Storage.open(home).child(trial).delete, "checkpoints")
        run = applied(self._base, params, name=trial, storage=home)
        folder = source["folder"] if source and other else None
        if self._base.swept.pack == "off" or why_not_packed(run):
            return await self._own_run(trial, run, folder, heard), ""
        return await self._packed(trial, run, folder, heard)

    async def leave(self, trial: str, keep: bool, status: Status) -> None:
        """The trial is over: its place is free, and it gets no other one. Nothing of it is written
        any more on return.

        Args:
            status: what its run.json says from now on, unless it had ended by itself.
        """
        self._left.add(trial)
        await self._free(trial, keep=keep, tell=True, status=status)

    async def pause(self, trial: str) -> None:
        """The trial's place is free, its state committed; it may enter again."""
        await self._free(trial, keep=True, tell=True)

    async def host_lost(self, trial: str, why: str) -> None:
        """The trial's host broke: count it, replace a pack, and let the trial enter again.

        Raises:
            RayftError: its hosts have died too often.
        """
        place = self._where.get(trial)
        self._deaths[trial] = self._deaths.get(trial, 0) + 1
        await self._free(trial, keep=True, tell=False)
        if isinstance(place, PooledPack) and place in self._packs:
            self._news.append(f"{place.name} is started again: {why}")
            if "OutOfMemoryError" in why:
                self._packs.halve_slots()
            await self._packs.replace(place)
        if self._deaths[trial] >= DEATHS:
            raise RayftError(f"lost {DEATHS} times: {why}")

    async def overview(self) -> HostsOverview:
        """For people: packs by name with their numbers, how many trials wait, and news."""
        for pack in self._packs:
            if pack.key is not None and not pack.opening:
                try:
                    pack.stats = await asyncio.wait_for(pack.host.stats.remote(), 10)
                except (TimeoutError, ray.exceptions.RayError):
                    continue  # dead or busy: the last numbers stand
        news, self._news = self._news, []
        return HostsOverview(
            {p.name: {**p.stats, "trials": len(p.trials)} for p in self._packs if p.stats},
            self._packs.waiting,
            sum(not isinstance(place, PooledPack) for place in self._where.values()),
            news,
        )

    async def ready_host(self) -> ActorHandle | None:
        """A process that has torch loaded and is free for other work; None without packs."""
        return next((pack.host for pack in self._packs if pack.ready), None)

    async def close(self) -> None:
        """Everyone who is still in is committed; then all hosts go."""
        self._stopping = True
        for trial in list(self._where):
            if not isinstance(self._where[trial], PooledPack):
                await self._free(trial, keep=True, tell=True)
        ends = [pack.host.close.remote() for pack in self._packs if pack.key is not None]
        await asyncio.gather(*ends, return_exceptions=True)

    # ---- packs

    async def _packed(
        self, trial: str, run: Run, source: str | None, heard: int
    ) -> tuple[ActorHandle, str]:
        key = pack_key(run)
        while True:
            pack = await self._packs.wait_for_slot(trial, key)
            if pack is None:
                return await self._own_run(trial, run, source, heard), ""
            self._where[trial] = pack
            first = len(pack.trials) == 1
            try:
                await self._packs.open(pack, key, await self._opening(run))
                job = await self._job(run)
                await self._check(trial)
                await pack.host.join.remote(job, source, heard)
                return pack.host, f"{pack.name}.{self._settings.start}"
            except ray.exceptions.RayActorError:
                await self.host_lost(trial, "its process died")
            except ray.exceptions.RayTaskError as error:
                await self._forget(trial)
                if isinstance(error.cause, UnsharedBase) and self._settings.dashboard:
                    await self._unshare(key, error.cause)
                elif first or not isinstance(error.cause, NoRoom):
                    raise
                else:
                    pack.full = bool(pack.trials)

    async def _unshare(self, key: str, why: UnsharedBase) -> None:
        """Only the loaded model shows that its trials cannot share it. What such a trial asks for
        is what a pack had: one process, with its CPUs and its GPU."""
        gone = await self._packs.unshare(key)
        if gone:
            self._news.append(f"{why.what}: runs of their own")
        for _ in range(gone if self._settings.own_runs or self._packs_given else gone - 1):
            self._own_places.release()
        self._packs_given += gone

    async def _opening(self, run: Run) -> PackOpening:
        prepared = await self._prepared(run)
        return PackOpening(
            config=run.resolved(),
            data_dir=prepared.uri,
            data_hash=prepared.hash,
            slots=self._settings.slots,
            divergence=self._base.swept.divergence,
            facts=self._settings.facts,
        )

    # ---- runs of their own

    async def _own_run(self, trial: str, run: Run, source: str | None, heard: int) -> ActorHandle:
        from rayft.hosts.train_run_actor import TrainRunActor  # only here: it knows Ray Train

        await self._own_places.acquire()
        name = f"rayft-{self._base.name}-{trial}"
        # its decorator has lost the type of the class, see there
        options = TrainRunActor.options  # pyright: ignore[reportAttributeAccessIssue]  # see above
        host = options(name=f"{name}-{secrets.token_hex(2)}").remote(self._settings.driver)
        self._where[trial] = host
        prepared = await self._prepared(run)
        await self._check(trial)
        limit = self._base.swept.divergence
        await host.begin.remote(run.resolved(), prepared, source, limit, heard)
        return host

    # ---- both

    async def _job(self, run: Run) -> AttemptJob:
        prepared = await self._prepared(run)
        self._joins += 1
        # digits that grow, then a letter: older attempts of the trial are fenced off by number
        attempt = f"{self._settings.start * ATTEMPTS + self._joins}x{secrets.token_hex(3)}"
        facts = (run.resolved(), run.digest(), attempt, prepared.uri, prepared.hash)
        return AttemptJob(*facts, insist=False)

    async def _prepared(self, run: Run) -> PreparedData:
        """The tokenised data of a trial: the sweep's own, unless the space changes what is read."""
        if what_is_read(run) == what_is_read(self._base):
            if self._data is None:
                raise RayftError("trials enter before their data is prepared")
            return self._data
        key = json.dumps(what_is_read(run))
        if key not in self._other_data:  # once for all trials that read the same
            asked = prepare_trial_data.remote(run.resolved(), self._settings.driver)
            self._other_data[key] = asked
        try:
            return await self._other_data[key]
        except ray.exceptions.RayError:
            self._other_data.pop(key, None)  # the next one may have more luck
            raise

    async def _free(
        self, trial: str, *, keep: bool, tell: bool, status: Status = "interrupted"
    ) -> None:
        """Take the place back; `tell`: the host still has to be told."""
        place = self._where.get(trial)
        if place is None:
            return
        host = place.host if isinstance(place, PooledPack) else place
        if tell:
            # Dead, or its files could not be written: the place is free all the same.
            with contextlib.suppress(ray.exceptions.RayError):
                await host.leave.remote(trial, keep, status)
        if not isinstance(place, PooledPack):
            ray.kill(host)
            self._own_places.release()
        await self._forget(trial)

    async def _check(self, trial: str) -> None:
        """Raises RayftError where the trial was told to leave while it waited for its place."""
        if trial in self._left:
            await self._free(trial, keep=True, tell=False)
            raise RayftError("it was told to leave")

    async def _forget(self, trial: str) -> None:
        place = self._where.pop(trial, None)
        if isinstance(place, PooledPack):
            await self._packs.left(place, trial)
        await self._rebalance()

    async def _rebalance(self) -> None:
        if not self._stopping:
            self._where.pop(await self._packs.rebalance(), None)
