"""Prometheus metrics of the adaptation service: calls by method and status, their seconds, and cached parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

METHODS = ("Adapt", "Predict", "AdaptPredict", "Forget", "ListModels")
SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 60.0)


class ServiceMetrics:
    """The metrics of one service. ``statistics`` is called at every scrape."""

    def __init__(self, statistics: Callable[[], Mapping[str, float]]) -> None:
        self._registry, self._statistics = CollectorRegistry(), statistics
        self._calls = Counter(
            "metadist_serve_calls", "Calls by method and status.", ("method", "code"), registry=self._registry
        )
        self._seconds = Histogram(
            "metadist_serve_seconds", "Seconds of a call.", ("method",), buckets=SECONDS, registry=self._registry
        )
        gauges = {
            "handles": "Cached adaptations.",
            "handle_bytes": "Bytes of the cached adaptations.",
            "budget_bytes": "Limit of the bytes of cached adaptations.",
            "largest_batch": "Most requests that were computed together.",
        }
        self._gauges = {
            name: Gauge(f"metadist_serve_{name}", text, registry=self._registry) for name, text in gauges.items()
        }
        totals = {
            "evictions": "Adaptations evicted.",
            "adaptations": "Adaptations computed.",
            "predictions": "Predictions computed.",
            "batches": "Batches computed.",
        }
        self._totals = {
            name: Counter(f"metadist_serve_{name}", text, registry=self._registry) for name, text in totals.items()
        }

    def observe(self, method: str, code: str, seconds: float) -> None:
        """Count one finished call. Methods of other services, such as a health check, do not count."""
        if method in METHODS:
            self._calls.labels(method, code).inc()
            self._seconds.labels(method).observe(seconds)

    def text(self) -> bytes:
        """Return all metrics in Prometheus's text format."""
        now = self._statistics()
        for name, gauge in self._gauges.items():
            gauge.set(now[name])
        for name, total in self._totals.items():
            total.reset()
            total.inc(now[name])
        return generate_latest(self._registry)
