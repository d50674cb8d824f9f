"""``control.json`` in a run's folder: which driver trains it, and where that driver can be reached."""

from __future__ import annotations

import platform
from typing import Any

import psutil
from filelock import FileLock, Timeout

from metadist.core.errors import ConfigError
from metadist.storage.run_directory import RunDirectory

RECORD, LOCK = "control.json", "driver.lock"


def driver_of(run: str) -> dict[str, Any]:
    """The record of the driver that trains the run in the directory ``run``. ConfigError, with what to do, where there is none."""
    folder = RunDirectory(run)
    if folder.read("run.json") is None:
        if (group := folder.read_json("group.json")) is not None:
            children = ", ".join(f"{folder.url}/seed-{seed}" for seed in group["seeds"])
            raise ConfigError(f"'{run}' holds a group of seeds; each is a run of its own: {children}")
        raise ConfigError(
            f"'{run}' is neither a run directory (the folder that train printed) nor HOST:PORT of a driver"
        )
    again = f"go on with: metadist train {folder.url}/config.yaml --run-dir {folder.url} --resume"
    record = folder.read_json(RECORD)
    here = record is not None and record["host"] == platform.node()
    stale = record is None or bool(record.get("ended")) or (here and not _alive(record["pid"], record["started"]))
    if stale and _locked(folder):
        raise ConfigError(
            f"a driver has just taken the run in {folder.url} and is still starting; ask again in a moment"
        )
    if record is None:
        raise ConfigError(
            f"no driver has left word in {folder.url}/{RECORD}: nothing trains this run, or it has just begun; {again}"
        )
    ended = record.get("ended")
    if ended and ended["meta_step"] >= ended["meta_steps"]:
        raise ConfigError(
            f"the run in {folder.url} is finished, with {ended['meta_step']} meta-steps; there is nothing to steer"
        )
    if ended:
        raise ConfigError(
            f"nothing trains the run in {folder.url}: it ended at meta-step {ended['meta_step']} of {ended['meta_steps']}; {again}"
        )
    if stale:
        raise ConfigError(
            f"the driver of the run in {folder.url} is gone without a word (process {record['pid']}: killed, or crashed); {again}"
        )
    if record["address"] is None:
        raise ConfigError(
            f"the run in {folder.url} can't be steered: {record['off']}. Ctrl-C or SIGTERM to process {record['pid']} on {record['host']} stops it"
        )
    if not here and record["address"].startswith(("127.", "localhost", "[::1]")):
        raise ConfigError(
            f"the driver runs on {record['host']} and listens there alone ({record['address']}); run this command on that machine, or give the "
            "run control.host, control.tls_cert and control.tls_key"
        )
    return record


def _locked(folder: RunDirectory) -> bool:
    """Whether a driver on this machine has the run, word of it or not."""
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
    """Whether the process is there, and is the one that wrote the record: not a later one with its number."""
    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and process.create_time() <= started + 1.0
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True
