"""The numbers that the server reports in the format of Prometheus."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from transformer_jax.serving.served_model import ServedModel

_PREFIX = "transformer_jax"


class Metrics(Collector):
    """Counts requests, and reads the counts of the engines when somebody asks."""

    def __init__(self, models: Mapping[str, ServedModel]):
        """Makes a registry for the engines of these models."""
        self._models = models
        self._registry = CollectorRegistry()
        self._registry.register(self)
        self._responses = Counter(f"{_PREFIX}_http_responses", "Responses by route and status.", ("route", "status"),
                                  registry=self._registry)
        self._seconds = Histogram(f"{_PREFIX}_http_seconds", "Time until a response begins.", ("route",),
                                  registry=self._registry)
        self._first = Histogram(f"{_PREFIX}_first_token_seconds", "Time to the first token of streamed texts.",
                                registry=self._registry)

    def observe(self, route: str, status: int, seconds: float) -> None:
        """Counts a response."""
        self._responses.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def first_token(self, seconds: float) -> None:
        """Records the time to the first token of a stream."""
        self._first.observe(seconds)

    def collect(self) -> Iterator[Metric]:
        """Yields the numbers of the engines."""
        engines = [(name, served.engine) for name, served in self._models.items() if served.engine is not None]
        for kind in ("requests", "completed", "cancelled", "failed", "tokens", "prompt_tokens", "prompt_tokens_read",
                     "prompt_tokens_reused"):
            family = CounterMetricFamily(f"{_PREFIX}_{kind}", f"The number of {kind.replace('_', ' ')}.",
                                         labels=["model"])
            for name, engine in engines:
                family.add_metric([name], engine.counts[kind])
            yield family
        for kind in ("num_waiting", "num_running", "num_programs"):
            gauge = GaugeMetricFamily(f"{_PREFIX}_{kind}", f"The {kind.replace('num_', 'number of ')} now.",
                                      labels=["model"])
            for name, engine in engines:
                gauge.add_metric([name], getattr(engine, kind))
            yield gauge

    def text(self) -> tuple[bytes, str]:
        """Returns all numbers in the text format, and its content type."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST
