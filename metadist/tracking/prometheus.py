"""Export the newest points of a run on Ray as Prometheus gauges."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from metadist.config.groups import WorkerGroup
from metadist.training.observers import Observer


class GaugeObserver(Observer):
    """Set gauges to the newest points."""

    def __init__(self, gauges: Any) -> None:
        self._gauges = gauges

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        self._gauges.set(step, values)


def exporters(groups: Iterable[WorkerGroup], run_id: str) -> list[Observer]:
    """Return the exporters of a run: none where no worker is on Ray."""
    if not any(group.max and not group.outside for group in groups):
        return []
    from metadist.tracking.ray_metrics import Gauges

    return [GaugeObserver(Gauges(run_id))]
