"""A run's progress for Prometheus: what it is called there, and a server that shows it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from planner import RequestError, UserError
from shardemb.metrics.wall_time import PARTS

if TYPE_CHECKING:
    from prometheus_client.core import Metric


@dataclass(frozen=True)
class Exported:
    """One metric; `value` takes it from a line of metrics.jsonl about training."""

    name: str
    description: str
    value: Callable[[Mapping[str, Any]], float]
    is_counter: bool = False
    part: str | None = None  # a label


def _seconds(part: str) -> Exported:
    text = "Seconds since the launch, by what they went into"
    return Exported("shardemb_seconds", text, lambda line: line["seconds"][part], True, part)


# Steps and rows are gauges: a run that goes on from a checkpoint is back at fewer.
EXPORTED = (
    Exported("shardemb_step", "The last step trained", lambda line: line["step"]),
    Exported("shardemb_samples", "Rows trained, over all ranks", lambda line: line["samples"]),
    Exported(
        "shardemb_samples_per_second",
        "Rows a second, over all ranks",
        lambda line: line["samples_per_second"],
    ),
    Exported("shardemb_train_loss", "Mean loss", lambda line: line["train_loss"]),
    Exported(
        "shardemb_data_wait_ratio",
        "Of rank 0's time, the part spent waiting for data",
        lambda line: line["data_wait_fraction"],
    ),
    Exported("shardemb_step_seconds", "Mean time of a step", lambda line: line["step_ms"] / 1000),
    Exported("shardemb_restarts", "After failures", lambda line: line["restarts"], True),
    *(_seconds(part) for part in PARTS),
)


def refuse_unavailable() -> None:
    """RequestError where the library is not installed."""
    if importlib.util.find_spec("prometheus_client") is None:
        raise RequestError(
            "launch.metrics_port needs prometheus-client: pip install 'shardemb[metrics]'"
        )


class MetricsServer:
    """Shows the newest line at http://HOST:PORT/metrics; nothing before there is one."""

    def __init__(self, host: str, port: int) -> None:
        refuse_unavailable()
        from prometheus_client import CollectorRegistry, start_http_server

        self._line: Mapping[str, Any] | None = None
        registry = CollectorRegistry()
        registry.register(self)
        try:
            self._server, _ = start_http_server(port, host, registry)
        except OSError as error:
            raise UserError(
                f"launch.metrics_port: cannot listen on {host}:{port} ({error.strerror}); choose "
                "another port, or launch.metrics_host"
            ) from error

    def show(self, line: Mapping[str, Any]) -> None:
        self._line = line

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def collect(self) -> Iterator[Metric]:
        """What the library asks for when it is asked."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        line, families = self._line, dict[str, Any]()
        if line is None:
            return
        for metric in EXPORTED:
            kind = CounterMetricFamily if metric.is_counter else GaugeMetricFamily
            labels = ["part"] if metric.part else []
            made = kind(metric.name, metric.description, labels=labels)
            family = families.setdefault(metric.name, made)
            family.add_metric([metric.part] if metric.part else [], metric.value(line))
        yield from families.values()
