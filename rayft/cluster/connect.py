"""Ray itself: join the cluster we are told of, else start one on this machine."""

from __future__ import annotations

import atexit
import io
import logging
import os
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import ray
import ray.exceptions

from rayft.cluster.driver_context import hide_arguments
from rayft.cluster.gcs_watch import GcsWatch, patience
from rayft.cluster.interrupt import Interrupt
from rayft.core import process
from rayft.core.errors import ConfigError, RayftError

NAMESPACE = "rayft"
OBJECT_STORE = 2**30  # bytes at most, for tokenised shards on their way to the cache
_QUIET = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # no warning about CPU workers and CUDA devices
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",  # the dashboard's Train tab
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths keep their meaning
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",  # how soon the end, or the death, of a worker is seen
    "RAY_DEDUP_LOGS": "1",
}
_LOCAL = {"RAY_USAGE_STATS_ENABLED": "0"}


@contextmanager
def connected(
    dashboard: bool = False, interrupt: Interrupt | None = None
) -> Generator[GcsWatch | None]:
    """A Ray cluster inside the block. One that was there before (ray.init in a notebook,
    RAY_ADDRESS, a job) stays; one that was started here ends with the block.

    Args:
        dashboard: a local Ray gets its dashboard even where the environment says otherwise.
        interrupt: told when the cluster is lost (and then the block's end waits for nothing).

    Yields:
        The watch that tells it; None without `interrupt`.

    Environment: RAY_ADDRESS joins; RAYFT_DASHBOARD=0 starts a local Ray without its dashboard;
    RAYFT_RAY_LOGS=1 shows the workers' output; RAY_TMPDIR moves Ray's files.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    process.remove_dead()
    if ray.is_initialized():
        with _watched(interrupt, own=False) as watch:
            yield watch
        return
    loud = os.environ.get("RAYFT_RAY_LOGS") == "1"
    options = {
        "namespace": NAMESPACE,
        "log_to_driver": loud,
        "logging_level": logging.INFO if loud else logging.ERROR,
    }
    _start(options, dashboard)
    own = options.get("address") == "local"
    try:
        quiet = nullcontext() if loud else redirect_stdout(_WithoutRaylet(sys.stdout))
        with quiet, _watched(interrupt, own=own) as watch:
            yield watch
    finally:
        if interrupt is not None and interrupt.cut_off:
            _abandon(own)
        else:
            ray.shutdown()


@contextmanager
def _watched(interrupt: Interrupt | None, *, own: bool) -> Generator[GcsWatch | None]:
    if interrupt is None:
        yield None
        return
    watch = GcsWatch(ray.get_runtime_context().gcs_address, interrupt, patience(own))
    try:
        yield watch
    finally:
        watch.end()


def _abandon(own: bool) -> None:
    """Leave a dead cluster. ray.shutdown would wait for it until Ray ends this process; without it
    the process can still work, but must leave by `os._exit` (`process.abandoned`).

    Ray has no public call that ends a local Ray's processes without asking them; the private one is
    held by a test.
    """
    atexit.unregister(ray.shutdown)
    if own:
        node = ray._private.worker._global_node  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]  # see above
        servers = [info.process.pid for each in node.all_processes.values() for info in each]
        below = process.families(servers)  # workers and agents would wait for the GCS as well
        node.kill_all_processes(check_alive=False, allow_graceful=False)
        process.kill(below)
    process.abandoned.set()


class _WithoutRaylet(io.TextIOBase):
    """Standard output without what Ray's listener prints when a worker dies, at any log level:
    a paragraph of guesses. rayft says what died, and keeps Ray's text in the traceback file."""

    def __init__(self, out: TextIO) -> None:
        self._out = out

    def write(self, text: str) -> int:
        if threading.current_thread().name == "ray_listen_error_messages":
            return len(text)
        return self._out.write(text)

    def flush(self) -> None:
        self._out.flush()


def _start(options: dict[str, Any], dashboard: bool) -> None:
    address = os.environ.get("RAY_ADDRESS", "")
    if address.startswith(("http://", "https://", "ray://")):
        raise ConfigError(
            f"RAY_ADDRESS={address} is not an address that training can join",
            cause="http:// is the job server, ray:// is Ray Client; drivers run in the cluster",
            fix="`ray job submit -- rayft train CONFIG`, or unset RAY_ADDRESS",
        )
    if not address:
        for name, value in _LOCAL.items():
            os.environ.setdefault(name, value)
        options |= {
            "address": "local",
            "object_store_memory": min(OBJECT_STORE, _memory() // 10),
            "include_dashboard": dashboard or os.environ.get("RAYFT_DASHBOARD", "1") != "0",
        }
    hide_arguments()
    try:
        ray.init(**options)
    except (ConnectionError, ray.exceptions.RayError, RuntimeError, ValueError) as error:
        raise RayftError(
            f"cannot {'join the Ray cluster at ' + address if address else 'start Ray'}: {error}",
            cause="no cluster there, or another token (RAY_AUTH_TOKEN)" if address else "",
            fix="ray status" if address else "look into /tmp/ray/session_latest/logs",
        ) from error
    if not address:
        node = ray._private.worker._global_node  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]  # see `_abandon`
        session = Path(node.get_session_dir_path())
        process.own_session(session)
        process.remove_dead_sessions(session.parent)


def _memory() -> int:
    """Physical memory of this machine, bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@dataclass(frozen=True)
class Node:
    """A living node: its id, address and total resources."""

    id: str
    ip: str
    resources: dict[str, float]


def nodes() -> list[Node]:
    """The living nodes."""
    return [
        Node(node["NodeID"], node["NodeManagerAddress"], node["Resources"])
        for node in ray.nodes()
        if node["Alive"]
    ]


def ceiling() -> dict[str, float] | None:
    """What an autoscaler may grow the cluster to; None without an autoscaler.

    Ray has no public call for this; the private one is held by a test.
    """
    state = ray._private.state.state  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]  # see above
    return state.get_max_resources_from_cluster_config()


def has_dashboard() -> bool:
    """Whether this cluster has one; Ray has no public call for this."""
    worker = ray._private.worker  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]  # see above
    return bool(worker.get_dashboard_url())


def cluster_hardware() -> dict[str, object]:
    """What run.json says of the cluster."""
    living = nodes()
    total: dict[str, float] = {}
    for node in living:
        for name, amount in node.resources.items():
            total[name] = total.get(name, 0) + amount
    prefix = "accelerator_type:"
    return {
        "nodes": len(living),
        "cpus": total.get("CPU", 0),
        "gpus": total.get("GPU", 0),
        "accelerators": sorted(
            name.removeprefix(prefix) for name in total if name.startswith(prefix)
        ),
        "memory": int(total.get("memory", 0)),
    }
