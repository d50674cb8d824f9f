"""A run's measurements as Ray metrics: Prometheus finds them on every node's metrics port, beside Ray's own."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from ray.util.metrics import Gauge

#: first part of a measurement's name → the label that takes the rest
LABELS = {"engine/seconds_per_step": "phase", "meta": "name"}


def exported(name: str) -> tuple[str, dict[str, str]]:
    """``engine/tasks_per_second`` → its Prometheus name, and labels for what there are several of: phases, workers, splits.

    One name with labels can be drawn in one panel, whatever the workers are called.
    """
    for prefix, label in LABELS.items():
        if name.startswith(f"{prefix}/"):
            return _legal(prefix), {label: name[len(prefix) + 1 :]}
    parts = name.split("/")
    if parts[0] == "sys" and len(parts) == 3:
        return _legal(f"sys/{parts[2]}"), {"worker": parts[1]}
    if parts[0] == "eval" and len(parts) > 2:
        return "metadist_eval", {"split": parts[1], "name": "/".join(parts[2:])}
    return _legal(name), {}


def _legal(name: str) -> str:
    return "metadist_" + re.sub(r"\W", "_", name)


class Gauges:
    """The newest values of one run. Needs a connection to Ray."""

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
