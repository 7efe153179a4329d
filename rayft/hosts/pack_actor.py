"""A pack as a Ray actor: one thread trains, an event loop answers.

The thread alternates between the commands that have come in (join, leave, save) and one packed
step, so whoever leaves or joins does so at the next step border.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import ray

from rayft.cluster.driver_context import DriverContext
from rayft.compose.job import AttemptJob
from rayft.core.address import redact
from rayft.core.errors import RayftError, StorageError
from rayft.records.run_record import Status
from rayft.storage.folder import Storage
from rayft.trials.types import TrialReport

if TYPE_CHECKING:  # torch takes seconds to import; the actor answers meanwhile
    from rayft.trials.pack import Pack

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class PackOpening:
    """What a host needs to open a pack: plain data."""

    config: dict[str, Any]  # of any trial of this pack
    data_dir: str
    data_hash: str
    slots: int
    divergence: float
    facts: Mapping[str, object]


@ray.remote(max_restarts=0)
class PackActor:
    """Holds one trials.pack.Pack at a time.

    Args:
        cpus, gpus: what Ray has given it; with them comes as large a share of the memory.
    """

    def __init__(self, driver: DriverContext, cpus: float, gpus: float) -> None:
        driver.enter()  # a relative model path means the driver's
        self._loop: asyncio.AbstractEventLoop | None = None
        self._reports: dict[str, asyncio.Queue[TrialReport]] = {}
        self._ended: dict[str, TrialReport] = {}
        self._homes: dict[str, Storage] = {}  # trial -> its folder
        self._broken: str | None = None
        self._commands: queue.SimpleQueue[tuple[Callable[[], object], asyncio.Future[Any]]] = (
            queue.SimpleQueue()
        )
        self._cpus, self._gpus = cpus, gpus
        self._pack: Pack | None = None
        self._imported = 0.0  # seconds
        threading.Thread(target=self._work, name="pack", daemon=True).start()

    # ---- asked from outside

    async def wait_ready(self) -> None:
        """Return once the libraries are loaded. What is sent for `call` before that would import
        them in a second thread meanwhile, and transformers does not survive it."""
        await self._ask(lambda: None)

    async def open(self, opening: PackOpening) -> None:
        """Load the base and the data; a pack that was open is closed first."""
        await self._ask(lambda: self._open(opening))

    async def join(self, job: AttemptJob, source: str | None, heard: int) -> None:
        """Admit a trial; its reports after step `heard`, up to the commit it continues from, come
        first.

        Raises:
            NoRoom: not now. ConfigError, InfeasibleError: never.
        """
        name = job.config["name"]
        self._reports[name] = asyncio.Queue()
        self._ended.pop(name, None)
        self._homes[name] = Storage.open(job.config["storage"]).child(name)
        await self._ask(lambda: self._join(job, source, heard))

    async def next(self, trial: str) -> TrialReport:
        """The next report of a trial; its last one again and again once it is over."""
        if trial in self._ended:
            return self._ended[trial]
        report = await self._reports[trial].get()
        if report.status != "running":
            self._ended[trial] = report
        return report

    async def leave(self, trial: str, keep: bool, status: Status) -> None:
        """Free the slot; nothing when the trial has left already. Nothing in its folder is written
        any more on return; its run.json says `status`."""
        try:
            gone = await self._ask(lambda: self._leave(trial, keep, status))
            if gone is not None:
                await asyncio.wrap_future(gone)
        finally:
            # After all it has said: nobody may wait for a trial that says nothing more.
            self._deliver([TrialReport(trial, 0, {}, "failed", "it was told to leave")])

    async def move(self, trial: str) -> bool:
        """Commit a trial and let it out, for another pack; whether it was still in."""
        gone = await self._ask(lambda: self._move(trial))
        if gone is None:
            return False
        try:
            await asyncio.wrap_future(gone)
        except StorageError as error:
            self._deliver([TrialReport(trial, 0, {}, "lost", str(error))])
        else:
            self._deliver([TrialReport(trial, 0, {}, "moved")])
        return True

    async def save(self, trial: str) -> str:
        """Commit a trial's present state; the address of its checkpoint folder. Of a trial that has
        ended meanwhile: where its newest commit is. RayftError: it has none."""
        return await self._ask(lambda: self._save(trial))

    async def stats(self) -> dict[str, float]:
        """How full and how fast; {} before a pack is open. start_seconds holds what this process
        took to load its libraries: a run of its own would too."""
        return await self._ask(self._stats)

    def _stats(self) -> dict[str, float]:
        if self._pack is None:
            return {}
        found = self._pack.stats()
        return found | {"start_seconds": found["start_seconds"] + self._imported}

    async def call(self, function: Callable[..., object], *arguments: object) -> object:
        """Run a function in this warm process, between two steps."""
        return await self._ask(lambda: function(*arguments))

    async def close(self) -> None:
        """Commit whoever is still in, and let go."""
        await self._ask(self._close)

    async def _ask(self, action: Callable[[], Answer]) -> Answer:
        self._loop = asyncio.get_running_loop()
        future: asyncio.Future[Answer] = self._loop.create_future()
        self._commands.put((action, future))
        return await future

    # ---- the training thread

    def _work(self) -> None:
        began = time.perf_counter()
        # Packs compile nothing; bitsandbytes would load the compiler at import, for seconds.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        import torch  # slow; the actor answers meanwhile

        from rayft.models.quiet import hush

        importlib.import_module("rayft.trials.pack")  # so that opening one only loads the model

        self._imported = time.perf_counter() - began
        hush()
        torch.set_num_threads(max(1, int(self._cpus)))
        while True:
            self._obey(wait=not (self._pack and self._pack.trials))
            if self._pack and self._pack.trials:
                self._step()

    def _obey(self, wait: bool) -> None:
        """Carry out every command that waits; with `wait`, at least one."""
        while wait or not self._commands.empty():
            action, future = self._commands.get()
            wait = False
            try:
                self._answer(future, action(), None)
            except Exception as error:  # belongs to whoever asked
                self._answer(future, None, error)

    def _answer(self, future: asyncio.Future[Any], value: object, error: Exception | None) -> None:
        def settle() -> None:
            if future.cancelled():
                return
            if error is None:
                future.set_result(value)
            else:
                future.set_exception(error)

        self._tell(settle)

    def _tell(self, action: Callable[[], None]) -> None:
        """Have the event loop do it. All commands came through that loop, so it is there."""
        if self._loop is None:
            raise RayftError("nobody has asked this process for anything")
        self._loop.call_soon_threadsafe(action)

    def _opened(self) -> Pack:
        if self._pack is None:
            raise RayftError("no pack is open")
        return self._pack

    def _step(self) -> None:
        pack = self._opened()
        inside = pack.trials
        try:
            reports = pack.step()
        except Exception as error:  # the pack is lost; every trial in it must learn why
            # into Ray's log of this process
            print(redact(traceback.format_exc()), file=sys.stderr, flush=True)
            text = redact(f"{type(error).__name__}: {error}")
            reports = [TrialReport(name, 0, {}, "lost", text) for name in inside]
            self._pack = None
        self._tell(lambda: self._deliver(reports))

    def _deliver(self, reports: list[TrialReport]) -> None:
        for one in reports:
            if one.trial in self._reports:
                self._reports[one.trial].put_nowait(one)

    def _open(self, opening: PackOpening) -> None:
        import torch

        from rayft.config.run import Run
        from rayft.trials.memory import memory_limit
        from rayft.trials.pack import Pack

        self._close()
        device = torch.device("cuda", 0) if self._gpus else torch.device("cpu")
        share = min(1.0, self._gpus) if self._gpus else min(1.0, self._cpus / _cpus_here())
        self._pack = Pack(
            Run.model_validate(opening.config),
            opening.data_dir,
            opening.data_hash,
            device,
            slots=opening.slots,
            memory=memory_limit(device, share),
            facts=opening.facts,
            divergence=opening.divergence,
        )

    def _join(self, job: AttemptJob, source: str | None, heard: int) -> None:
        from rayft.trials.report_replay import missed_reports

        step, name = self._opened().admit(job, source), job.config["name"]
        if source is not None:
            return  # what was said in its folder belongs to other settings
        try:
            reports = missed_reports(self._homes[name], heard, step)
        except BaseException:  # cancelled too: nobody is left to let it go
            gone = self._leave(name, keep=True, status="interrupted")
            if gone is not None:
                gone.result()
            raise
        self._tell(lambda: self._deliver(reports))

    def _save(self, trial: str) -> str:
        from rayft.checkpoint.manifest import FOLDER
        from rayft.checkpoint.reader import find_commit

        pack = self._opened()
        if trial in pack.trials:
            return pack.commit(trial)
        home = self._homes[trial]
        found = find_commit(home, set_bad_aside=False)
        if found is None:
            raise RayftError(f"{trial} has left its pack without a commit")
        return home.child(FOLDER, found.name).uri

    def _leave(self, trial: str, keep: bool, status: Status) -> Future[None] | None:
        pack = self._pack
        if pack is None or trial not in pack.trials:
            return None
        return pack.leave(trial, status, keep=keep)

    def _move(self, trial: str) -> Future[None] | None:
        pack = self._pack
        return None if pack is None or trial not in pack.trials else pack.move(trial)

    def _close(self) -> None:
        if self._pack is not None:
            self._pack.close()
            self._pack = None


def _cpus_here() -> float:
    """CPUs that Ray shares out on this node; each pack takes its own."""
    here = ray.get_runtime_context().get_node_id()
    return next(node["Resources"]["CPU"] for node in ray.nodes() if node["NodeID"] == here)
