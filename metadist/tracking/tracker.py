"""Choose the tracker for ``tracking.uri``; record groups of seeds; deliver the records of earlier processes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, cast

from metadist.config.plugins import Kind, Plugin, entry_point_names, plugins
from metadist.core.errors import ConfigError, first_line, nearest
from metadist.tracking.base import NullTracker, Tracker
from metadist.tracking.delivery import Delivery
from metadist.tracking.mlflow import MLflowTracker
from metadist.tracking.mlflow_uri import require_mlflow, resolve_uri, sqlite_path
from metadist.tracking.spool import legal_key, read_json


class TrackerFactory(Protocol):
    """The object that an entry point in the group ``metadist.trackers`` names: a class or a function.

    ``uri`` is the whole ``tracking.uri``, its scheme included. ``spool`` is a folder of the run that the tracker may
    write to, ``experiment`` is ``tracking.experiment``, and ``runs_root`` is the folder of all runs.
    """

    def __call__(self, uri: str, *, spool: Path, experiment: str, runs_root: Path) -> Tracker: ...


TRACKER = Kind[object](
    "trackers",
    {
        "auto": "The MLflow store in MLFLOW_TRACKING_URI, or a SQLite file in the folder of the runs.",
        "databricks": "MLflow on Databricks: databricks://PROFILE",
        "databricks-uc": "MLflow on Databricks with Unity Catalog: databricks-uc://PROFILE",
        "file": "MLflow files in a folder: file:///PATH",
        "http": "An MLflow server: http://HOST:PORT",
        "https": "An MLflow server with TLS: https://HOST:PORT",
        "mssql": "MLflow tables in a SQL Server database: mssql+pymssql://USER:PASSWORD@HOST/DATABASE",
        "mysql": "MLflow tables in a MySQL database: mysql+pymysql://USER:PASSWORD@HOST/DATABASE",
        "none": "No tracking: nothing is recorded.",
        "postgresql": "MLflow tables in a PostgreSQL database: postgresql://USER:PASSWORD@HOST/DATABASE",
        "sqlite": "MLflow tables in a SQLite file: sqlite:////PATH/mlflow.db",
        "uc": "MLflow with the open-source Unity Catalog: uc:http://HOST:PORT",
    },
    callable,
    "a class derived from metadist.tracking.Tracker, or a function (uri, *, spool, experiment, runs_root) that makes "
    "one",
)
"""The values of ``tracking.uri`` or their schemes; plug-ins add schemes."""


def check_uri(uri: str | None) -> None:
    """Raise ConfigError where neither metadist, nor MLflow, nor a usable plug-in has the scheme of ``uri``."""
    if plugin := _plugin(uri):
        _factory(plugin)


def make_tracker(
    uri: str | None, *, spool: str | Path, experiment: str, runs_root: str | Path, interval: float = 2.0
) -> Tracker:
    """Make the tracker for ``tracking.uri``.

    ``uri`` is ``none``, ``auto`` (``MLFLOW_TRACKING_URI``, or a SQLite file under ``runs_root``), any MLflow tracking
    URI, or a URI whose scheme is the name of a plug-in (``console://…``). Raises ConfigError where MLflow is needed but
    not installed, and where the plug-in is unusable.
    """
    if uri == "none":
        return NullTracker()
    if plugin := _plugin(uri):
        return _made_by(plugin, str(uri), Path(spool), experiment, Path(runs_root))
    require_mlflow()
    tracking_uri = resolve_uri(uri, Path(runs_root))
    if tracking_uri.startswith("sqlite") and sqlite_path(tracking_uri) is None:
        raise ConfigError(f"tracking.uri={tracking_uri} names no file; write sqlite:////absolute/path/mlflow.db")
    return MLflowTracker(
        spool, tracking_uri=tracking_uri, experiment=experiment, runs_root=runs_root, interval=interval
    )


def _plugin(uri: str | None) -> Plugin | None:
    """Return the plug-in that the scheme of ``uri`` names; None where the scheme belongs to metadist or MLflow."""
    scheme, separator, _ = (uri or "auto").partition("://")
    scheme = scheme.partition("+")[0].lower()
    if not separator or scheme.partition(":")[0] in TRACKER.own:
        return None
    found = plugins(TRACKER)
    if scheme in found.refused:
        raise ConfigError(f"tracking.uri: {found.refused[scheme]}")
    if scheme in found.usable or scheme in entry_point_names("mlflow.tracking_store"):
        return found.usable.get(scheme)
    known = sorted([*TRACKER.own, *found.usable])
    raise ConfigError(
        f"tracking.uri: '{scheme}://' is neither one of {', '.join(known)} nor a store of MLflow"
        f"{nearest(scheme, known)}"
    )


def _factory(plugin: Plugin) -> TrackerFactory:
    try:
        return cast(TrackerFactory, plugin.load(TRACKER))
    except ConfigError as error:
        raise ConfigError(f"tracking.uri: {error}") from error


def _made_by(plugin: Plugin, uri: str, spool: Path, experiment: str, runs_root: Path) -> Tracker:
    factory = _factory(plugin)
    try:
        tracker = factory(uri, spool=spool, experiment=experiment, runs_root=runs_root)
    except ConfigError as error:
        raise ConfigError(f"tracking.uri: {error}") from error
    except Exception as error:
        raise ConfigError(f"tracking.uri: {plugin} can't make a tracker: {first_line(error)}") from error
    if not isinstance(tracker, Tracker):
        raise ConfigError(
            f"tracking.uri: {plugin} makes a {type(tracker).__name__}; expected an object of a class derived from "
            "metadist.tracking.Tracker"
        )
    return tracker


def log_group(
    tracker: Tracker,
    *,
    run_id: str,
    name: str,
    results: Mapping[int, Sequence[Mapping[str, float]]],
    timeout: float = 30.0,
) -> int:
    """Record the results of several seeds on their parent run; return the number of undelivered records.

    Every key of each step gets ``<key>/mean`` and ``<key>/sd`` (sample SD). ``run_id`` is the ``parent`` of the seeds'
    runs; ``results`` maps a step to one mapping per seed. Of several values for one (key, step) the first counts, so
    another set of seeds needs another id. ``timeout`` is in seconds.
    """
    tracker.start(run_id=run_id, name=name, params={}, tags={})
    for step, seeds in sorted(results.items()):
        tracker.metrics(step, mean_sd(seeds))
    return tracker.finish("FINISHED", timeout)


def mean_sd(seeds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return ``<key>/mean`` and ``<key>/sd`` over the seeds that have the key; a single seed has no SD."""
    summary: dict[str, float] = {}
    for key in dict.fromkeys(key for seed in seeds for key in seed):
        values = [float(seed[key]) for seed in seeds if key in seed]
        key = legal_key(key)[:245]
        mean = summary[f"{key}/mean"] = sum(values) / len(values)
        if len(values) > 1:
            summary[f"{key}/sd"] = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return summary


def undelivered(spool: str | Path) -> int:
    """Return the number of records in a spool folder that MLflow does not have yet."""
    path = Path(spool) / "spool.jsonl"
    if not path.exists():
        return 0
    with open(path, "rb") as file:
        file.seek(read_json(Path(spool) / "acked.json").get("offset", 0))
        return sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(1 << 20), b""))


def replay(spool: str | Path, *, tracking_uri: str | None = None, timeout: float = 60.0) -> int:
    """Deliver the records that an earlier process left in a spool folder; return the number of undelivered records.

    ``tracking_uri`` is needed only where the recorded URI had a password: passwords are not recorded.
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
