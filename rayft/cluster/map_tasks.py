"""Work items over the cluster: one Ray task each, one CPU each, tried again when a worker dies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ray
import ray.exceptions

from rayft.cluster.driver_context import DriverContext, passed_on
from rayft.cluster.interrupt import Interrupt
from rayft.compose.job import Item, Made, TaskMapper
from rayft.core.errors import RayftError

PERIOD = 0.5  # seconds between two looks at signals
TRIES = 3  # of a task whose process died; an exception is final


@ray.remote(num_cpus=1, max_retries=TRIES)
def _apply(function: Callable[[Item], Made], item: Item, driver: DriverContext) -> Made:
    driver.enter()  # a relative model path or chat template means the driver's
    return function(item)


def map_on_ray(interrupt: Interrupt) -> TaskMapper:
    """A TaskMapper that stops on a signal.

    Raises (when used):
        InterruptedRun: a signal came.
        RayftError: what `function` raised, or that its process kept dying.
    """

    def map_items(function: Callable[[Item], Made], items: Sequence[Item]) -> list[Made]:
        if len(items) == 1:  # a task would only add the start of a process
            return [function(items[0])]
        environment = {"env_vars": passed_on()} if passed_on() else None
        task = _apply.options(runtime_env=environment) if environment else _apply
        return _gathered(
            [task.remote(function, item, DriverContext.here()) for item in items], interrupt
        )

    return map_items


def map_on_hosts(hosts: Sequence[Any], interrupt: Interrupt) -> TaskMapper:
    """`map_on_ray` in actors that load torch anyway (`wait_ready`, `call(f, item)`), in turn."""

    def map_items(function: Callable[[Item], Made], items: Sequence[Item]) -> list[Made]:
        _gathered([host.wait_ready.remote() for host in hosts], interrupt)
        asked = [
            hosts[index % len(hosts)].call.remote(function, item)
            for index, item in enumerate(items)
        ]
        return _gathered(asked, interrupt)

    return map_items


def _gathered(asked: list[ray.ObjectRef[Made]], interrupt: Interrupt) -> list[Made]:
    open_tasks = asked
    while open_tasks:
        interrupt.check()
        _, open_tasks = ray.wait(open_tasks, num_returns=len(open_tasks), timeout=PERIOD)
    return [_result(reference) for reference in asked]


def _result(reference: ray.ObjectRef[Made]) -> Made:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, RayftError):
            raise cause from error
        raise RayftError(f"preparing data failed: {type(cause).__name__}: {cause}") from error
    except ray.exceptions.RayError as error:
        raise RayftError(
            f"preparing data failed: {error}", cause="its process died, perhaps for lack of memory"
        ) from error
