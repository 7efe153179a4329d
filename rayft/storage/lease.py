"""One driver per folder: a lease in `driver.lease`, renewed while its holder lives.

A lease names its holder and counts up every few seconds. A holder on this machine is looked for
directly: dead, its lease is taken over at once. A holder elsewhere is dead when its counter stands
still for longer than `PATIENCE`, measured by this process's monotonic clock: clocks of two machines
are never compared. Storage offers no compare-and-swap, so a claim is written and read back: of
several at once the last writer holds the lease, and everyone else sees its name there. Whoever is
slower than the wait before reading back finds out at the next renewal, and is `lost`.

A lease that was deleted or damaged proves nothing any more: another driver may have taken it for
free. Its holder is lost as well, and the same command goes on.
"""

from __future__ import annotations

import json
import logging
import math
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace

from rayft.core.errors import InUseError, RayftError, StorageError
from rayft.core.process import machine, started
from rayft.storage.folder import Storage, folder_gone

log = logging.getLogger(__name__)

LEASE = "driver.lease"
RENEW = 3.0  # seconds between two renewals
PATIENCE = 30.0  # seconds without a renewal after which a holder elsewhere is dead
SETTLE, FAR_SETTLE = 0.2, 1.0  # seconds between a claim and reading it back; on object stores


@dataclass(frozen=True)
class LeaseHolder:
    """Who holds a lease, as the file says."""

    id: str  # of this claim, random
    host: str  # for people
    machine: str  # equal for processes that see each other's pids
    pid: int
    started: str  # when the process did, so that a pid used again is not taken for it
    counter: int = 0

    @staticmethod
    def here() -> LeaseHolder:
        """This process."""
        pid = os.getpid()
        return LeaseHolder(secrets.token_hex(8), socket.gethostname(), machine(), pid, started(pid))

    @property
    def alive(self) -> bool | None:
        """Whether the process lives; None where that cannot be seen from here."""
        if not self.machine or self.machine != machine():
            return None
        return started(self.pid) == self.started


class Lease:
    """A lease that this process holds."""

    def __init__(self, storage: Storage, holder: LeaseHolder, on_lost: Callable[[], None]) -> None:
        self._storage, self._holder, self._on_lost = storage, holder, on_lost
        self._why: RayftError | None = None
        self._looked = time.monotonic()
        self._looking = threading.Lock()
        self._lost, self._ended = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    @staticmethod
    @contextmanager
    def held(storage: Storage, on_lost: Callable[[], None] = lambda: None) -> Generator[Lease]:
        """Hold the lease of the folder `storage` inside the block.

        Args:
            on_lost: called once, from the thread that notices, when the lease is lost.

        Raises:
            InUseError: another driver has it; names its host and pid.
            StorageError: it cannot be read or written.
        """
        holder = _claim(storage)
        lease = Lease(storage.existing(), holder, on_lost)
        lease._thread.start()
        try:
            yield lease
        finally:
            lease._release()

    @property
    def id(self) -> str:
        """Of this claim."""
        return self._holder.id

    @property
    def lost(self) -> bool:
        """Another driver has taken over, or may have: stop, and write nothing more."""
        return self._lost.is_set()

    def check(self, now: bool = False) -> None:
        """Return while this process holds the lease. To be asked before every write: a process that
        stood still for long (suspended, out of memory) must not trust what it knew before.

        Args:
            now: look at the file in any case; else only where the last look is too old.

        Raises:
            InUseError: another driver has taken over.
            RayftError: the lease was deleted or damaged.
            StorageError: it cannot be read, or the whole folder is gone.
        """
        if not self.lost and (now or time.monotonic() - self._looked > 2 * RENEW):
            self._look()
        if self._why is not None:
            raise self.error()

    def error(self) -> RayftError:
        """How it was lost."""
        why = self._why
        if why is None:
            return RayftError("the lease is not lost")
        return type(why)(why.what, cause=why.cause, fix=why.fix)

    def _look(self) -> None:
        """Read the lease."""
        with self._looking:
            if self.lost or self._ended.is_set():
                return
            seen = _see(self._storage)
            self._looked = time.monotonic()
            if isinstance(seen, LeaseHolder) and seen.id == self._holder.id:
                return
            self._why = _why_lost(self._storage, seen)
            self._lost.set()
        self._on_lost()

    def _renew(self) -> None:
        while not self._ended.wait(RENEW):
            try:
                self._look()
                if self.lost or self._ended.is_set():
                    return
                self._holder = replace(self._holder, counter=self._holder.counter + 1)
                _write(self._storage, self._holder)
            except StorageError as error:  # while storage is away nobody else can take over either
                log.warning("the lease could not be renewed: %s", error.what)
            except FileNotFoundError:  # deleted in this very moment: the next look finds out
                continue

    def _release(self) -> None:
        self._ended.set()
        self._thread.join(RENEW)
        with suppress(StorageError):  # what stays behind is taken over: this process is gone then
            now = _read(self._storage)
            if now is not None and now.id == self._holder.id:
                self._storage.delete(LEASE)
                _leave_no_folder(self._storage)


def _claim(storage: Storage) -> LeaseHolder:
    """Take the lease.

    Raises:
        InUseError: somebody has it, or was faster.
    """
    now = _read(storage)
    if now is not None and not _dead(storage, now):
        raise _taken(storage, now)
    mine = LeaseHolder.here()
    _write(storage, mine)
    time.sleep(SETTLE if storage.is_local else FAR_SETTLE)
    now = _read(storage)
    if now is None or now.id != mine.id:
        raise _taken(storage, now)
    return mine


def _dead(storage: Storage, seen: LeaseHolder) -> bool:
    """Whether nobody renews the lease any more; takes `PATIENCE` for a holder elsewhere."""
    if seen.alive is not None:
        return not seen.alive
    log.warning(
        "%s is held by %s; waiting %.0f s to see whether it still lives",
        storage.shown(),
        _named(seen),
        PATIENCE,
    )
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        time.sleep(min(1.0, PATIENCE / 10))
        now = _read(storage)
        if now is None:
            return True
        if (now.id, now.counter) != (seen.id, seen.counter):
            return False
    return True


@dataclass
class LeaseWatch:
    """For whoever writes in the name of a lease's holder from elsewhere: a training loop that may
    have stood still for long, a worker whose driver does.

    Args:
        storage: the folder of the lease.
        id: of the claim; "" where there is none, and nothing is looked at.
    """

    storage: Storage
    id: str
    looked: float = -math.inf  # by time.monotonic

    def check(self) -> None:
        """To be asked before every write; reads the lease once in a while.

        Raises:
            InUseError: another driver has taken over.
            RayftError: the lease is gone or damaged. Another driver may have taken over, and ended.
        """
        if not self.id or time.monotonic() - self.looked <= 2 * RENEW:
            return
        try:
            seen = _see(self.storage)
        except StorageError:  # for the driver to judge
            return
        if not isinstance(seen, LeaseHolder) or seen.id != self.id:
            raise _why_lost(self.storage, seen)
        self.looked = time.monotonic()


def superseded(storage: Storage, id: str) -> bool:
    """Whether the lease names another holder than the claim `id`. Not where it cannot be read: that
    is for the driver to judge.
    """
    try:
        seen = _see(storage)
    except StorageError:
        return False
    return isinstance(seen, LeaseHolder) and seen.id != id


def _why_lost(storage: Storage, seen: LeaseHolder | str) -> RayftError:
    """What its former holder tells: a successor, or what happened to the file."""
    if isinstance(seen, LeaseHolder):
        return InUseError(
            f"another driver took over {storage.shown()}: {_named(seen)}",
            fix="nothing: that one goes on",
        )
    if not storage.exists():
        return folder_gone(storage)
    return RayftError(
        f"stopped: {storage.shown(LEASE)} {seen}",
        cause="without it nobody can tell that this is the only driver",
        fix="the same command goes on from the last checkpoints",
    )


def _taken(storage: Storage, now: LeaseHolder | None) -> InUseError:
    return InUseError(
        f"{storage.shown()} has another driver: {_named(now)}",
        fix="wait for it or stop it; or choose another name",
    )


def _named(holder: LeaseHolder | None) -> str:
    return f"process {holder.pid} on {holder.host}" if holder else "it has ended since"


def _read(storage: Storage) -> LeaseHolder | None:
    """Whom the lease names; nobody to wait for where it is damaged, or of another version."""
    seen = _see(storage)
    return seen if isinstance(seen, LeaseHolder) else None


def _see(storage: Storage) -> LeaseHolder | str:
    """The holder, or what happened to the file."""
    try:
        return LeaseHolder(**json.loads(storage.read_text(LEASE)))
    except FileNotFoundError:
        return "was deleted"
    except (ValueError, TypeError):
        return "is damaged"


def _write(storage: Storage, holder: LeaseHolder) -> None:
    storage.write_text(LEASE, json.dumps(asdict(holder)) + "\n")


def _leave_no_folder(storage: Storage) -> None:
    """A run that was refused before it wrote anything leaves no empty folder."""
    folder = storage.local_path()
    if folder is not None:
        with suppress(OSError):  # not empty, as a rule
            folder.rmdir()
