"""Rates and times of the outer loop."""

from __future__ import annotations

import time
from collections.abc import Mapping

from metadist.training.scheduler import Scheduler


class Meter:
    """Measures tasks per second, and reads the scheduler's measurements. A context around every meta-step."""

    def __init__(self, workers: Scheduler) -> None:
        self._workers = workers
        self._seconds = self._tasks = 0.0
        self._window_seconds = self._window_tasks = self._steps = 0.0
        #: environment steps since the last reading
        self.environment_steps = 0.0
        self.rate = 0.0

    def __enter__(self) -> None:
        self._began, self._before = time.perf_counter(), self._workers.tasks_done

    def __exit__(self, *_: object) -> None:
        seconds, tasks = time.perf_counter() - self._began, self._workers.tasks_done - self._before
        self._seconds, self._tasks = self._seconds + seconds, self._tasks + tasks
        self._window_seconds, self._window_tasks = self._window_seconds + seconds, self._window_tasks + tasks
        self._steps += 1
        now = tasks / seconds
        self.rate = now if not self.rate else 0.95 * self.rate + 0.05 * now

    @property
    def average(self) -> float:
        """Tasks per second since the start."""
        return self._tasks / self._seconds if self._seconds else 0.0

    def read(self) -> dict[str, float]:
        """Return ``engine/…`` and ``system/<worker>/…`` since the last reading. Seconds are per meta-step."""
        workers = self._workers
        taken, steps = workers.measured.read(), self._steps or 1.0
        values = {
            "engine/tasks_per_second": self._window_tasks / self._window_seconds if self._window_seconds else 0.0,
            "engine/workers": float(len(workers.executor.workers())),
            "engine/shards_retried": float(sum(workers.retried.values())),
            "engine/results_too_late": float(taken.counts["duplicates"]),
        }
        for name in ("bytes_published", "bytes_received"):
            values[f"engine/{name}_per_step"] = taken.counts[name] / steps
        for name in (
            "publish",
            "gather",
            "compute",
            "reduce",
            *sorted(n for n in taken.seconds if n.startswith("compute/")),
        ):
            values[f"engine/seconds_per_step/{name}"] = taken.seconds[name] / steps
        if self.environment_steps:
            values |= self._rates(taken.seconds)
        for worker, stats in sorted(taken.workers.items()):
            values |= {
                f"system/{worker}/{k}": stats[k]
                for k in ("cpu_percent", "memory_bytes", "gpu_percent", "gpu_memory_bytes")
                if k in stats
            }
        self._window_seconds = self._window_tasks = self._steps = self.environment_steps = 0.0
        return values

    def _rates(self, seconds: Mapping[str, float]) -> dict[str, float]:
        """Return environment steps per second: of the run, and of the workers' time for each part of a rollout."""
        learning = sum(
            s
            for n, s in seconds.items()
            if n.startswith("compute/") and not n.startswith(("compute/rollout", "compute/evaluate"))
        )
        parts = {
            "": self._window_seconds,
            "/environment": seconds.get("compute/rollout/environment", 0.0),
            "/inference": seconds.get("compute/rollout/inference", 0.0),
            "/learning": learning,
        }
        return {f"engine/steps_per_second{n}": self.environment_steps / s for n, s in parts.items() if s}
