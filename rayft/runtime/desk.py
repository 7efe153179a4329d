"""The front desk of a sweep: gives every trial a host, and takes the place back.

One asynchronous actor. Trials that may share a frozen base wait for a slot in a pack; all others
wait for their turn as a Ray Train run of their own. A freed place goes to whoever has waited
longest. A pack that dies is replaced; its trials come back by themselves.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from typing import Any

import ray

from rayft.compose.job import Job, Prepared
from rayft.config.run import Run
from rayft.config.space import applied
from rayft.core.errors import RayftError
from rayft.core.storage import Storage
from rayft.runtime.floor import Floor, Pack, prepare_elsewhere
from rayft.runtime.pack_actor import Opening, PackHost
from rayft.trials.plan import pack_key, why_alone
from rayft.trials.types import NoRoom

DEATHS = 3  # of one trial's hosts before it is given up


@ray.remote(num_cpus=0)
class Desk:
    """See the head of this file."""

    def __init__(self, floor: Floor) -> None:
        self._floor = floor
        self._base = Run.model_validate(floor.config)
        self._packs: list[Pack] = []
        self._data: Prepared | None = None
        self._where: dict[str, Pack | Any] = {}  # trial -> Pack, or the handle of its own host
        self._origin: dict[str, dict[str, Any]] = {}
        self._deaths: dict[str, int] = {}
        self._changed = asyncio.Condition()
        self._queue: list[str] = []  # trials that wait for a slot, longest first
        self._joins = 0
        self._own = asyncio.Semaphore(max(1, floor.alone))
        self._stopping = False

    async def open(self) -> list[Any]:
        """Start the processes of all packs; they load torch while the data is still prepared."""
        self._packs = [self._new(f"pack-{index}") for index in range(self._floor.packs)]
        return [pack.host for pack in self._packs]

    async def begin(self, prepared: Prepared) -> None:
        """The tokenised data of the sweep's own data section; trials may enter."""
        self._data = prepared

    async def enter(
        self, trial: str, params: dict[str, Any], source: dict[str, Any] | None, heard: int
    ) -> Any:
        """Wait for a place; the handle of the host that trains `trial` from now on.

        Args:
            source: {"trial", "folder"} to continue another trial's state with these params.
            heard: the last step whose report its client has.

        Raises:
            RayftError: it can never run; `ConfigError` for params that make no valid config.
        """
        # Tune also pauses a trial and gives it its own pointer: then its own commits are the state.
        other = source is not None and source["trial"] != trial
        await self._free(trial, keep=not other, told=True)
        home = Storage.open(self._floor.home).child("trials").uri
        run = applied(self._base, params, name=trial, storage=home)
        folder = source["folder"] if source and other else None
        if self._base.sweep.pack == "off" or why_alone(run):
            return await self._alone(trial, run, folder, heard), ""
        return await self._packed(trial, run, folder, heard)

    async def leave(self, trial: str, keep: bool) -> None:
        """The trial is over, or moves: its place is free."""
        await self._free(trial, keep=keep, told=True)

    async def lost(self, trial: str) -> None:
        """The trial's host died: count it, replace a pack, and let the trial enter again.

        Raises:
            RayftError: its hosts have died too often.
        """
        place = self._where.get(trial)
        self._deaths[trial] = self._deaths.get(trial, 0) + 1
        await self._free(trial, keep=True, told=False)
        if isinstance(place, Pack) and place in self._packs:
            self._packs[self._packs.index(place)] = self._new(place.name)
        await self._notify()
        if self._deaths[trial] >= DEATHS:
            raise RayftError(f"the process that trained {trial} died {DEATHS} times")

    async def look(self) -> dict[str, Any]:
        """For people: packs by name with their numbers, and how many trials wait."""
        for pack in self._packs:
            if pack.key is not None and not pack.opening:
                try:
                    pack.stats = await asyncio.wait_for(pack.host.stats.remote(), 10)
                except (TimeoutError, ray.exceptions.RayError):
                    continue  # dead or busy: the last numbers stand
        return {
            "packs": {p.name: {**p.stats, "trials": len(p.trials)} for p in self._packs if p.stats},
            "waiting": len(self._queue),
            "alone": sum(not isinstance(place, Pack) for place in self._where.values()),
        }

    async def warm(self) -> Any:
        """A process that has torch loaded and is free for other work; None without packs."""
        return self._packs[0].host if self._packs else None

    async def close(self) -> None:
        """Everyone who is still in is committed; then all hosts go."""
        self._stopping = True
        for trial in list(self._where):
            if not isinstance(self._where[trial], Pack):
                await self._free(trial, keep=True, told=True)
        ends = [pack.host.close.remote() for pack in self._packs if pack.key is not None]
        await asyncio.gather(*ends, return_exceptions=True)

    # ---- packs

    def _new(self, name: str) -> Pack:
        floor = self._floor
        options: dict[str, Any] = {
            "name": f"rayft-{self._base.name}-{name}-{secrets.token_hex(2)}",
            "num_cpus": floor.cpus,
            "max_concurrency": 1000,
        }
        if floor.gpus:
            options["num_gpus"] = floor.gpus
        if floor.environment:
            options["runtime_env"] = {"env_vars": floor.environment}
        host = PackHost.options(**options).remote(floor.cwd, floor.cpus, floor.gpus)
        return Pack(name, host)

    async def _packed(
        self, trial: str, run: Run, source: str | None, heard: int
    ) -> tuple[Any, str]:
        while True:
            pack = await self._slot(trial, run)
            self._where[trial] = pack
            alone = len(pack.trials) == 1
            try:
                await self._open_for(pack, run)
                await pack.host.join.remote(await self._job(run), source, heard)
                return pack.host, f"{pack.name}.{self._floor.start}"
            except ray.exceptions.RayActorError:
                await self.lost(trial)
            except ray.exceptions.RayTaskError as error:
                await self._forget(trial)
                if alone or not isinstance(error.cause, NoRoom):
                    raise
                pack.full = bool(pack.trials)

    async def _slot(self, trial: str, run: Run) -> Pack:
        """A place in the emptiest pack that may take the trial, once there is one."""
        key = pack_key(run)
        async with self._changed:
            self._queue.append(trial)
            try:
                while (pack := self._choose(key)) is None:
                    await self._changed.wait()  # wakes in the order of waiting
            finally:
                self._queue.remove(trial)
            pack.trials.add(trial)
            return pack

    def _choose(self, key: str) -> Pack | None:
        fit = [
            pack
            for pack in self._packs
            if pack.key == key and len(pack.trials) < self._floor.slots and not pack.full
        ]
        # An empty one of another kind is as good as a new one: only its base has to be loaded.
        empty = [pack for pack in self._packs if not pack.trials]
        candidates = sorted(fit, key=lambda pack: len(pack.trials))
        fresh = [pack for pack in empty if pack.key is None] or empty
        if candidates and (candidates[0].trials == set() or not fresh):
            return candidates[0]
        return fresh[0] if fresh else None

    async def _open_for(self, pack: Pack, run: Run) -> None:
        """Load the base for this kind of trial; others that come meanwhile wait for it."""
        key = pack_key(run)
        if pack.key == key:
            while pack.opening:
                async with self._changed:
                    await self._changed.wait()
            return
        pack.key, pack.opening = key, True
        prepared = await self._prepared(run)
        try:
            await pack.host.open.remote(
                Opening(
                    config=run.resolved(),
                    data_dir=prepared.uri,
                    data_hash=prepared.hash,
                    slots=self._floor.slots,
                    divergence=self._base.sweep.divergence,
                    facts=self._floor.facts,
                )
            )
        except ray.exceptions.RayError:
            pack.key = None
            raise
        finally:
            pack.opening = False
            await self._notify()

    # ---- runs of their own

    async def _alone(self, trial: str, run: Run, source: str | None, heard: int) -> Any:
        from rayft.runtime.own_actor import OwnHost  # only here: it knows Ray Train

        await self._own.acquire()
        name = f"rayft-{self._base.name}-{trial}"
        host = OwnHost.options(name=f"{name}-{secrets.token_hex(2)}").remote(self._floor.cwd)
        self._where[trial] = host
        prepared = await self._prepared(run)
        limit = self._base.sweep.divergence
        await host.begin.remote(run.resolved(), prepared, source, limit, heard)
        return host

    # ---- both

    async def _job(self, run: Run) -> Job:
        prepared = await self._prepared(run)
        self._joins += 1
        # digits that grow, then a letter: older attempts of the trial are fenced off by number
        attempt = f"{self._floor.start * 100_000 + self._joins}x{secrets.token_hex(3)}"
        return Job(run.resolved(), run.digest(), attempt, prepared.uri, prepared.hash)

    async def _prepared(self, run: Run) -> Prepared:
        """The tokenised data of a trial: the sweep's own, unless the space changes what is read."""
        if _reads(run) == _reads(self._base):
            return self._data
        return await prepare_elsewhere.remote(run.resolved(), self._floor.cwd)

    async def _free(self, trial: str, *, keep: bool, told: bool) -> None:
        """Take the place back; `told`: the host still has to be told."""
        place = self._where.get(trial)
        if place is None:
            return
        host = place.host if isinstance(place, Pack) else place
        if told:
            with contextlib.suppress(ray.exceptions.RayActorError):  # gone, and the place with it
                await host.leave.remote(trial, keep)
        if not isinstance(place, Pack):
            ray.kill(host)
            self._own.release()
        await self._forget(trial)

    async def _forget(self, trial: str) -> None:
        place = self._where.pop(trial, None)
        if isinstance(place, Pack):
            place.trials.discard(trial)
            place.full = False
        await self._notify()
        await self._spread()

    async def _spread(self) -> None:
        """When nobody waits and a pack has nothing to do, it gets a trial of the fullest one: at
        the end of a sweep the last trials must not share one core while the others idle."""
        idle = [pack for pack in self._packs if not pack.trials and pack.key is not None]
        full = max(self._packs, key=lambda pack: len(pack.trials), default=None)
        if self._stopping or self._queue or not idle or full is None or len(full.trials) < 2:
            return
        if full.moving or idle[0].key != full.key:
            return
        full.moving = True
        try:
            trial = max(full.trials)  # the youngest
            if await full.host.move.remote(trial):
                full.trials.discard(trial)
                self._where.pop(trial, None)
        except ray.exceptions.RayError:
            return  # it died; its trials find out by themselves
        finally:
            full.moving = False

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()


def _reads(run: Run) -> tuple[Any, ...]:
    """What decides the tokens."""
    model = run.model
    return run.data, model.path, model.revision, model.tokenizer, model.chat_template
