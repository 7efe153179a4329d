"""What would fail after minutes is refused in seconds: resources, and storage on every node."""

from __future__ import annotations

import uuid
from collections.abc import Sequence

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rayft.cluster.connect import Node, ceiling
from rayft.cluster.driver_context import DriverContext
from rayft.config.run import Run, ScaleSpec
from rayft.core.errors import InfeasibleError, StorageError
from rayft.storage.folder import Storage, probe

PROBE_TIMEOUT = 60  # seconds for every node to answer
_KEYS = {"CPU": "scale.cpus", "GPU": "scale.gpus"}


def resources(scale: ScaleSpec, gpus: float) -> dict[str, float]:
    """What Ray reserves for one worker."""
    need = {"CPU": scale.cpus, **scale.resources}
    return need | {"GPU": gpus} if gpus else need


def fitting(living: Sequence[Node], need: dict[str, float], placement: str) -> int:
    """How many workers that need `need` fit on these nodes, if nothing else ran there."""
    slots = [
        min(int(node.resources.get(name, 0) / amount + 1e-9) for name, amount in need.items())
        for node in living
    ]
    if placement == "STRICT_PACK":
        return max(slots, default=0)
    if placement == "STRICT_SPREAD":
        return sum(slot > 0 for slot in slots)
    return sum(slots)


def gpus_per_worker(run: Run, living: Sequence[Node]) -> float:
    """scale.gpus, or its default: 1 where the cluster has GPUs."""
    if run.scale.gpus is not None:
        return run.scale.gpus
    limit = ceiling() or {}
    return float(any(node.resources.get("GPU") for node in living) or limit.get("GPU", 0) > 0)


def span(scale: ScaleSpec) -> tuple[int, int]:
    """Fewest and most workers."""
    asked = scale.workers
    return (asked, asked) if isinstance(asked, int) else asked


def workers_now(scale: ScaleSpec, living: Sequence[Node], gpus: float) -> int:
    """How many workers to start: of an elastic range, what the cluster's nodes can hold. The number
    is fixed for an attempt; nodes that come or go count at the next one."""
    low, high = span(scale)
    return max(low, min(high, fitting(living, resources(scale, gpus), scale.placement)))


def feasible(run: Run, living: Sequence[Node], gpus: float, limit: dict[str, float] | None) -> None:
    """Raises InfeasibleError when the workers can never be placed.

    Args:
        limit: what an autoscaler may grow the cluster to; with one, a shortage only means waiting.
    """
    need = resources(run.scale, gpus)
    low, _ = span(run.scale)
    fits = fitting(living, need, run.scale.placement)
    if fits >= low:
        return
    if limit is None or any(limit.get(name, 0) < one * low for name, one in need.items()):
        raise _infeasible(run, living, need, low, fits)


def _infeasible(
    run: Run, living: Sequence[Node], need: dict[str, float], low: int, fits: int
) -> InfeasibleError:
    each = ", ".join(f"{amount:g} {name}" for name, amount in need.items())
    keys = ["scale.workers", *(_KEYS.get(name, f"scale.resources.{name}") for name in need)]
    there = [
        f"  {node.ip}: " + ", ".join(f"{node.resources.get(name, 0):g} {name}" for name in need)
        for node in living
    ]
    head = (
        f"{low} workers of {each} ({run.scale.placement}) do not fit: there is room for {fits} on"
    )
    return InfeasibleError(
        "\n".join([head, *there[:6], *(["  ..."] if len(there) > 6 else [])]),
        where=", ".join(keys),
        fix="lower them, or join a larger cluster (RAY_ADDRESS, or ray job submit)",
    )


@ray.remote(num_cpus=0, max_retries=0)
def _probe(uri: str, token: str, driver: DriverContext) -> str:
    """On one node: write and read, and report what this node reads under the driver's token."""
    driver.enter()
    storage = Storage.open(uri)
    try:
        probe(storage)
        return storage.read_text(token)
    except StorageError as error:
        return f"! {error.what}"
    except FileNotFoundError:
        return ""


def storage_everywhere(home: Storage, living: Sequence[Node], key: str = "storage") -> None:
    """Every node must be able to write there, and see the same files as the driver.

    Args:
        key: the setting that names the place.

    Raises:
        StorageError: naming the nodes.
    """
    probe(home)
    name, token = f".seen-{uuid.uuid4().hex}", uuid.uuid4().hex
    home.write_text(name, token)
    try:
        asked = [
            _probe.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False)
            ).remote(home.uri, name, DriverContext.here())
            for node in living
        ]
        answers = ray.get(asked, timeout=PROBE_TIMEOUT)
    except (ray.exceptions.RayError, TimeoutError) as error:
        raise StorageError(f"a node did not answer whether it sees {home.shown()}: {error}") from (
            error
        )
    finally:
        home.delete(name)
    found = {node.ip: answer for node, answer in zip(living, answers, strict=True)}
    judge(home.shown(), home.is_local, token, found, key)


def judge(
    place: str, local: bool, token: str, answers: dict[str, str], key: str = "storage"
) -> None:
    """Raises StorageError unless every node answered with the driver's token.

    Args:
        answers: by node address: the token it read, "" when it saw no such file, "! reason".
    """
    broken = [f"  {ip}: {text[2:]}" for ip, text in answers.items() if text.startswith("! ")]
    if broken:
        raise StorageError(
            "\n".join([f"storage {place} is not usable from every node:", *broken]),
            fix=f"give the nodes access, or set {key}: to another place",
        )
    blind = [f"  {ip}" for ip, text in answers.items() if text != token]
    if blind:
        raise StorageError(
            "\n".join([f"storage {place} is not the same place on every node; not on:", *blind]),
            where=key,
            cause="a local path on a cluster of several machines" if local else "",
            fix="use s3://, gs:// or a shared file system (NFS) mounted at the same path",
        )
