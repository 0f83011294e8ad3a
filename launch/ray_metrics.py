"""A run's progress in Ray's own metrics, which Ray exports for Prometheus."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shardemb.metrics.exported import EXPORTED

_TAIL_BYTES = 64 * 1024  # of metrics.jsonl; a line has less than one


class RayMetrics:
    """For the actor of the host that rank 0 is on."""

    def __init__(self) -> None:
        from ray.util.metrics import Gauge

        self._gauges: dict[str, Any] = {
            metric.name: Gauge(metric.name, metric.description, ("part",) if metric.part else ())
            for metric in EXPORTED
        }
        self._seen = 0  # when metrics.jsonl was changed, as far as it is shown

    def show(self, metrics: Path) -> None:
        """The newest line about training, if there is one that was not shown."""
        changed = metrics.stat().st_mtime_ns if metrics.exists() else 0
        if changed == self._seen:
            return
        self._seen = changed
        with metrics.open("rb") as file:
            file.seek(max(0, metrics.stat().st_size - _TAIL_BYTES))
            *lines, _ = file.read().split(b"\n")
        for text in reversed(lines):
            if text.startswith(b'{"kind": "train"'):  # the first may have lost its beginning
                self._set(json.loads(text))
                return

    def _set(self, line: dict[str, Any]) -> None:
        for metric in EXPORTED:
            tags = {"part": metric.part} if metric.part else None
            self._gauges[metric.name].set(metric.value(line), tags)
