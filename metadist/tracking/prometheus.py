"""A tracker whose points go to Prometheus as well, where a run is on Ray."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from metadist.config.groups import WorkerGroup


class Exporting:
    """``tracker``, and gauges that hold its newest points."""

    def __init__(self, tracker: Any, gauges: Any) -> None:
        self._tracker, self._gauges = tracker, gauges

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        self._tracker.metrics(step, values)
        self._gauges.set(step, values)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tracker, name)


def exporting(tracker: Any, groups: Iterable[WorkerGroup], run_id: str) -> Any:
    """``tracker`` itself where nothing runs on Ray."""
    if not any(group.max and not group.outside for group in groups):
        return tracker
    from metadist.tracking.ray_metrics import Gauges

    return Exporting(tracker, Gauges(run_id))
