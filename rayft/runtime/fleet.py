"""scale.workers >= 1: connect, preflight, prepare the data in Ray tasks, attempts."""

from __future__ import annotations

import os

from rayft.compose.job import Outcome, Prepared
from rayft.config.run import Run
from rayft.core.storage import Storage
from rayft.runtime import launch, preflight
from rayft.runtime.attempts import persevere
from rayft.runtime.book import Book
from rayft.runtime.cluster import ceiling, connected, hardware, nodes
from rayft.runtime.interrupt import Interrupt
from rayft.runtime.spread import over_ray
from rayft.runtime.types import Engine, Prepare


def run_fleet(
    run: Run, book: Book, interrupt: Interrupt, engine: Engine | None, prepare: Prepare, again: str
) -> Outcome:
    """All attempts of a run on Ray.

    Raises:
        RayftError: refused, failed for good, or interrupted.
    """
    interrupt.check()
    address = os.environ.get("RAY_ADDRESS")
    book.note(f"joining Ray at {address}" if address else "starting Ray on this machine")
    with connected(interrupt=interrupt) as watch:
        interrupt.arm()  # ray.init installs a SIGTERM handler that ends the process
        interrupt.check()
        living, limit = nodes(), ceiling()
        gpus = preflight.gpus_per_worker(run, living)
        preflight.feasible(run, living, gpus, limit)
        preflight.storage_everywhere(book.home, living)
        if run.data.cache is not None:  # by default it lies in the storage just checked
            preflight.storage_everywhere(Storage.open(run.data.cache), living, "data.cache")
        prepared: Prepared = prepare(run, over_ray(interrupt))
        interrupt.check()
        book.begin(prepared, hardware())

        def once(number: int) -> Outcome:
            if watch is not None:
                watch.settle()
            workers = preflight.workers_now(run.scale, nodes(), gpus)
            book.note(f"starting {workers} workers" + f", attempt {number + 1}" * bool(number))
            return launch.launch(
                book.job(prepared),
                run.scale,
                workers=workers,
                gpus=gpus,
                engine=engine,
                patient=limit is not None,
                interrupt=interrupt,
                heard=book.hear,
            )

        return persevere(
            once,
            retries=run.scale.retries,
            reached=lambda: book.reached,
            wait=interrupt.sleep,
            failed=book.failed,
            again=again,
        )
