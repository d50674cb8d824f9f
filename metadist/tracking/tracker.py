"""What a driver sees of experiment tracking: calls that return at once, whatever the server does."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from metadist.core.errors import ConfigError
from metadist.tracking.base import NullTracker, Tracker
from metadist.tracking.delivery import Delivery
from metadist.tracking.mlflow import MLflowTracker
from metadist.tracking.mlflow_uri import require_mlflow, resolve_uri, sqlite_path
from metadist.tracking.spool import legal_key, read_json


def make_tracker(
    uri: str | None, *, spool: str | Path, experiment: str, runs_root: str | Path, interval: float = 2.0
) -> Tracker:
    """The tracker for ``tracking.uri``: ``none``, ``auto`` (``MLFLOW_TRACKING_URI``, else a SQLite file under ``runs_root``) or
    any MLflow tracking URI. ConfigError if it needs MLflow and that isn't installed."""
    if uri == "none":
        return NullTracker()
    require_mlflow()
    tracking_uri = resolve_uri(uri, Path(runs_root))
    if tracking_uri.startswith("sqlite") and sqlite_path(tracking_uri) is None:
        raise ConfigError(f"tracking.uri={tracking_uri} names no file; write sqlite:////absolute/path/mlflow.db")
    return MLflowTracker(
        spool, tracking_uri=tracking_uri, experiment=experiment, runs_root=runs_root, interval=interval
    )


def log_group(
    tracker: Tracker,
    *,
    run_id: str,
    name: str,
    results: Mapping[int, Sequence[Mapping[str, float]]],
    params: Mapping[str, object] | None = None,
    tags: Mapping[str, str] | None = None,
    status: str = "FINISHED",
    timeout: float = 30.0,
) -> int:
    """Records several seeds' results on their parent run: ``<key>/mean`` and ``<key>/sd`` (sample SD) for every key of each step.

    ``run_id`` is what the children gave as ``parent``; ``results`` maps a step to one mapping per seed. The first values count
    here too, so let the id name the seeds. Returns the number of undelivered records.
    """
    tracker.start(run_id=run_id, name=name, params=params or {}, tags=tags or {})
    for step, seeds in sorted(results.items()):
        tracker.metrics(step, mean_sd(seeds))
    return tracker.finish(status, timeout)


def mean_sd(seeds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """``<key>/mean`` and ``<key>/sd`` over the seeds that have the key; one seed has no SD."""
    summary: dict[str, float] = {}
    for key in dict.fromkeys(key for seed in seeds for key in seed):
        values = [float(seed[key]) for seed in seeds if key in seed]
        key = legal_key(key)[:245]
        mean = summary[f"{key}/mean"] = sum(values) / len(values)
        if len(values) > 1:
            summary[f"{key}/sd"] = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return summary


def undelivered(spool: str | Path) -> int:
    """How many records of a spool folder MLflow doesn't have yet."""
    path = Path(spool) / "spool.jsonl"
    if not path.exists():
        return 0
    with open(path, "rb") as file:
        file.seek(read_json(Path(spool) / "acked.json").get("offset", 0))
        return sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(1 << 20), b""))


def replay(spool: str | Path, *, tracking_uri: str | None = None, timeout: float = 60.0) -> int:
    """Delivers what an earlier process left in a spool folder; returns how many records are still left.

    ``tracking_uri`` is needed only where the recorded one had a password, which isn't kept.
    """
    folder = Path(spool)
    identity = read_json(folder / "run.json")
    left = undelivered(folder)
    if not identity or not left:
        return left
    require_mlflow()
    uri = tracking_uri or identity["tracking_uri"]
    if ":***@" in uri:
        uri = resolve_uri("auto", Path(identity["runs_root"]))
    delivery = Delivery(folder, uri, identity=identity)
    already = delivery.delivered()
    delivery.start()
    delivery.drain(already + left, timeout)
    return undelivered(folder)
