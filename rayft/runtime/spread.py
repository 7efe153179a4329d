"""Work items over the cluster: one Ray task each, one CPU each, tried again when a worker dies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ray

from rayft.core.errors import RayftError
from rayft.runtime.driver_context import DriverContext, passed_on
from rayft.runtime.interrupt import Interrupt
from rayft.runtime.types import Mapper

PERIOD = 0.5  # seconds between two looks at signals
TRIES = 3  # of a task whose process died; an exception is final


@ray.remote(num_cpus=1, max_retries=TRIES)
def _apply(function: Callable[[Any], Any], item: Any, driver: DriverContext) -> Any:
    driver.enter()  # a relative model path or chat template means the driver's
    return function(item)


def over_ray(interrupt: Interrupt) -> Mapper:
    """A Mapper that stops on a signal.

    Raises (when used):
        InterruptedRun: a signal came.
        RayftError: what `function` raised, or that its process kept dying.
    """

    def spread(function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        if len(items) == 1:  # a task would only add the start of a process
            return [function(items[0])]
        environment = {"env_vars": passed_on()} if passed_on() else None
        task = _apply.options(runtime_env=environment) if environment else _apply
        return _gathered(
            [task.remote(function, item, DriverContext.here()) for item in items], interrupt
        )

    return spread


def over_hosts(hosts: Sequence[Any], interrupt: Interrupt) -> Mapper:
    """`over_ray` in actors that load torch anyway (`warmed`, `call(function, item)`), in turn."""

    def spread(function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        _gathered([host.warmed.remote() for host in hosts], interrupt)
        asked = [
            hosts[index % len(hosts)].call.remote(function, item)
            for index, item in enumerate(items)
        ]
        return _gathered(asked, interrupt)

    return spread


def _gathered(asked: list[ray.ObjectRef], interrupt: Interrupt) -> list[Any]:
    open_tasks = asked
    while open_tasks:
        interrupt.check()
        _, open_tasks = ray.wait(open_tasks, num_returns=len(open_tasks), timeout=PERIOD)
    return [_result(reference) for reference in asked]


def _result(reference: ray.ObjectRef) -> Any:
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
