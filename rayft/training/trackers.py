"""TensorBoard, MLflow, W&B: optional listeners that can fail without touching the run.

They listen on the driver. Events go through a bounded queue to one thread per tracker; a slow
tracker loses points, a failing one is dropped after one warning. metrics.jsonl on storage is the
record that counts.
"""

from __future__ import annotations

import importlib.util
import math
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from rayft.compose.job import ProgressEvent
from rayft.config.override import flattened
from rayft.config.run import Run
from rayft.core.address import redact
from rayft.core.errors import ConfigError
from rayft.storage.folder import Storage

KEPT = 10_000  # events waiting per tracker
LAST_WORDS = 10.0  # seconds a tracker gets at the end
_PACKAGES = {"tensorboard": "tensorboardX", "mlflow": "mlflow", "wandb": "wandb"}


def installed(names: Sequence[str]) -> None:
    """Raises ConfigError when the package of a tracker is not installed."""
    for name in names:
        if importlib.util.find_spec(_PACKAGES[name]) is None:
            raise ConfigError(
                f"tracker {name} needs the package {_PACKAGES[name]}, which is not installed",
                where="trackers",
                fix=f"pip install 'rayft[{name}]', or remove {name} from trackers",
            )


class TrackerSink(Protocol):
    """One tracker. Any method may raise."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Numbers of one step."""
        ...

    def close(self) -> None:
        """Flush and finish."""
        ...


class TensorBoard:
    """Event files in `<run>/tensorboard`, or in ./tensorboard/<name> when storage is remote."""

    def __init__(self, run: Run, home: Storage) -> None:
        from tensorboardX import SummaryWriter

        local = home.local_path("tensorboard")
        self._writer = SummaryWriter(str(local or f"tensorboard/{run.name}"))

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class MLflow:
    """MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME say where; every command is an MLflow run,
    and the tag rayft.digest ties those of one rayft run together."""

    def __init__(self, run: Run, home: Storage) -> None:
        import mlflow  # pyright: ignore[reportMissingImports]  # an extra

        self._client = mlflow.MlflowClient()
        active = mlflow.start_run(run_name=run.name, tags={"rayft.digest": run.digest()})
        self._id = active.info.run_id
        mlflow.log_params(flattened(run.resolved(), join="/"))

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._client.log_metric(self._id, name.replace("=", "_"), value, step=step)

    def close(self) -> None:
        self._client.set_terminated(self._id)


class Wandb:
    """WANDB_PROJECT and WANDB_API_KEY as usual; the id is name + digest, so a continued run goes
    on in the same W&B run."""

    def __init__(self, run: Run, home: Storage) -> None:
        import wandb  # pyright: ignore[reportMissingImports]  # an extra

        self._run = wandb.init(
            name=run.name, id=f"{run.name}-{run.digest()}", resume="allow", config=run.resolved()
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


KINDS: dict[str, Callable[[Run, Storage], TrackerSink]] = {
    "tensorboard": TensorBoard,
    "mlflow": MLflow,
    "wandb": Wandb,
}


class Trackers:
    """All trackers of a run."""

    def __init__(
        self,
        run: Run,
        home: Storage,
        warn: Callable[[str], None],
        kinds: dict[str, Callable[[Run, Storage], TrackerSink]] = KINDS,
    ) -> None:
        self._feeds = [
            _TrackerFeed(name, lambda make=kinds[name]: make(run, home), warn)
            for name in run.trackers
        ]

    def observe(self, event: ProgressEvent) -> None:
        """Pass on the numbers of a step or an evaluation; never blocks, never raises."""
        if event.kind in ("step", "eval") and self._feeds:
            values = dict(numbers(event))
            for feed in self._feeds:
                feed.put(event.step, values)

    def close(self) -> None:
        """Give every tracker a bounded time to finish."""
        for feed in self._feeds:
            feed.close()


class _TrackerFeed:
    def __init__(
        self, name: str, make: Callable[[], TrackerSink], warn: Callable[[str], None]
    ) -> None:
        self._name, self._make, self._warn = name, make, warn
        self._queue: queue.Queue[tuple[int, dict[str, float]] | None] = queue.Queue(KEPT)
        self._thread = threading.Thread(target=self._run, name=f"rayft-{name}", daemon=True)
        self._thread.start()

    def put(self, step: int, values: dict[str, float]) -> None:
        if not self._queue.full():
            self._queue.put_nowait((step, values))

    def close(self) -> None:
        if not self._queue.full():
            self._queue.put_nowait(None)
        self._thread.join(LAST_WORDS)

    def _run(self) -> None:
        try:
            sink = self._make()
            while (item := self._queue.get()) is not None:
                sink.log(*item)
            sink.close()
        except Exception as error:  # whatever a tracker does, training goes on without it
            self._warn(redact(f"tracker {self._name} stopped: {type(error).__name__}: {error}"))


def numbers(event: ProgressEvent) -> Iterator[tuple[str, float]]:
    """(name, value) of every finite number of an event: loss, lr/<group>, eval_loss, ..."""
    rates = {f"lr/{group}": rate for group, rate in event.lr.items()}
    for name, value in {**event.numbers, **rates}.items():
        if math.isfinite(value):
            yield name, value
