"""Find the driver of a run by ``control.json`` in the run directory, which holds the driver's process and address."""

from __future__ import annotations

import platform
from typing import Any

import psutil
from filelock import FileLock, Timeout

from metadist.core.errors import ConfigError
from metadist.storage.run_directory import RunDirectory

RECORD, LOCK = "control.json", "driver.lock"


def driver_of(run: str) -> dict[str, Any]:
    """Return the record of the driver that trains the run in the directory ``run``.

    Raises ``ConfigError``, with the remedy, if no driver trains the run or it cannot be reached from this machine.
    """
    folder = _run_directory(run)
    again = f"resume it with: metadist train {folder.url}/config.yaml --run-dir {folder.url} --resume"
    record = folder.read_json(RECORD)
    here = record is not None and record["host"] == platform.node()
    stale = record is None or bool(record.get("ended")) or (here and not _alive(record["pid"], record["started"]))
    if stale and _locked(folder):
        raise ConfigError(
            f"a driver has just begun the run in {folder.url} and is still starting; try again in a moment"
        )
    if record is None:
        raise ConfigError(
            f"{folder.url}/{RECORD} does not exist: nothing trains this run, or a driver has just begun; {again}"
        )
    ended = record.get("ended")
    if ended and ended["meta_step"] >= ended["meta_steps"]:
        raise ConfigError(
            f"the run in {folder.url} is finished, with {ended['meta_step']} meta-steps; there is nothing to steer"
        )
    if ended:
        raise ConfigError(
            f"nothing trains the run in {folder.url}: it ended at meta-step {ended['meta_step']} of "
            f"{ended['meta_steps']}; {again}"
        )
    if stale:
        raise ConfigError(
            f"the driver of the run in {folder.url} was killed or crashed (process {record['pid']} no longer exists); "
            f"{again}"
        )
    if record["address"] is None:
        raise ConfigError(
            f"the run in {folder.url} can't be steered: {record['off']}. Ctrl-C, or SIGTERM to process {record['pid']} "
            f"on {record['host']}, stops it"
        )
    if not here and record["address"].startswith(("127.", "localhost", "[::1]")):
        raise ConfigError(
            f"the driver runs on {record['host']} and listens on loopback only ({record['address']}); run this command "
            "on that machine, or set control.host, control.tls_cert and control.tls_key in the run's config"
        )
    return record


def _run_directory(run: str) -> RunDirectory:
    folder = RunDirectory(run)
    if folder.read("run.json") is None:
        if (group := folder.read_json("group.json")) is not None:
            children = ", ".join(f"{folder.url}/seed-{seed}" for seed in group["seeds"])
            raise ConfigError(f"'{run}' holds a group of seeds; each seed is a run: {children}")
        raise ConfigError(f"'{run}' is neither a run directory (as printed by train) nor HOST:PORT of a driver")
    return folder


def _locked(folder: RunDirectory) -> bool:
    """Return whether a driver on this machine holds the lock of the run, with or without a record."""
    path = folder.scratch / LOCK
    if not path.exists():
        return False
    try:
        with FileLock(str(path), timeout=0):
            return False
    except Timeout:
        return True
    except (OSError, NotImplementedError):
        return False


def _alive(pid: int, started: float) -> bool:
    """Return whether the process that wrote the record still runs. A later process may have the same number."""
    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and process.create_time() <= started + 1.0
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True
