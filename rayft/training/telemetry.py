"""Numbers for Ray's metrics exporter, and from there Prometheus and Grafana (prefix `ray_rayft_`).

Tags are few on purpose: run and rank, never the step.
"""

from __future__ import annotations

import math
import time

from ray.util.metrics import Gauge

from rayft.compose.job import ProgressEvent

_NAMES = {
    "step": "Finished optimizer steps",
    "loss": "Training loss of the last step, nats per counted unit",
    "grad_norm": "Gradient norm before clipping",
    "tokens_per_s": "Tokens per second over all ranks",
    "memory": "Peak memory of this rank, bytes",
    "eval_loss": "Last held-out loss",
}
PERIOD = 1.0  # seconds between two updates; the exporter is scraped far more slowly


class RayGauges:
    """Feeds Ray's gauges from progress events."""

    def __init__(self, run: str, rank: int) -> None:
        tags = {"run": run, "rank": str(rank)}
        self._gauges = {name: _gauge(name, text, tags) for name, text in _NAMES.items()}
        self._lr = Gauge("rayft_lr", "Learning rate", tag_keys=("run", "rank", "group"))
        self._lr.set_default_tags(tags)
        self._age = _gauge("checkpoint_age", "Seconds since the last committed checkpoint", tags)
        self._saved = time.monotonic()
        self._next = 0.0

    def observe(self, event: ProgressEvent) -> None:
        """Take the numbers of one event; steps at most once per PERIOD."""
        kind = event.kind
        if kind == "save":
            self._saved = time.monotonic()
        if kind not in ("step", "eval"):
            return
        now = time.monotonic()
        if kind == "step" and now < self._next:
            return
        self._next = now + PERIOD
        for name, gauge in self._gauges.items():
            value = float(event.step) if name == "step" else event.numbers.get(name, math.nan)
            if math.isfinite(value):
                gauge.set(value)
        for group, lr in event.lr.items():
            self._lr.set(lr, tags={"group": group})
        self._age.set(now - self._saved)


def _gauge(name: str, text: str, tags: dict[str, str]) -> Gauge:
    gauge = Gauge(f"rayft_{name}", text, tag_keys=("run", "rank"))
    gauge.set_default_tags(tags)
    return gauge
