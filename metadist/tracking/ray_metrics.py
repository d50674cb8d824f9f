"""Export a run's measurements as Ray metrics: Prometheus reads them from every node's metrics port."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from ray.util.metrics import Gauge

#: The first part of a measurement's name → the label that holds the rest of the name.
LABELS = {"engine/seconds_per_step": "phase", "meta": "name"}


def exported(name: str) -> tuple[str, dict[str, str]]:
    """Return the Prometheus name of a measurement such as ``engine/tasks_per_second``, and its labels.

    Phases, workers and splits become labels: one panel can then draw one name for all of them.
    """
    for prefix, label in LABELS.items():
        if name.startswith(f"{prefix}/"):
            return _legal(prefix), {label: name[len(prefix) + 1 :]}
    parts = name.split("/")
    if parts[0] == "system" and len(parts) == 3:  # dashboards know the names of version 0.1
        return _legal(f"sys/{parts[2]}"), {"worker": parts[1]}
    if parts[0] == "eval" and len(parts) > 2:
        return "metadist_eval", {"split": parts[1], "name": "/".join(parts[2:])}
    return _legal(name), {}


def _legal(name: str) -> str:
    return "metadist_" + re.sub(r"\W", "_", name)


class Gauges:
    """Gauges of the newest values of one run. They need a connection to Ray."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._gauges: dict[str, Gauge] = {}

    def set(self, meta_step: int, values: Mapping[str, float]) -> None:
        for name, value in {"meta_step": float(meta_step), **values}.items():
            if not math.isfinite(value):
                continue
            metric, labels = exported(name)
            if metric not in self._gauges:
                self._gauges[metric] = Gauge(metric, description=f"metadist: {name}", tag_keys=("run", *labels))
            self._gauges[metric].set(value, tags={"run": self._run, **labels})
