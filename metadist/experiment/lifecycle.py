"""Lock the run directory, make the steering of a run, and serve its control plane."""

from __future__ import annotations

import json
import logging
import os
import platform
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from metadist.config.settings import ControlSettings
from metadist.control.command_log import CommandLog
from metadist.control.driver_record import LOCK, RECORD
from metadist.control.feed import Feed
from metadist.control.steering import Recorder, RunControl, RunInfo
from metadist.core.errors import ConfigError, MetadistError
from metadist.experiment.attempt import Attempt
from metadist.storage.run_directory import RunDirectory

log = logging.getLogger(__name__)

TOKEN = "control.token"


@contextmanager
def locked(folder: RunDirectory) -> Iterator[None]:
    """Hold the lock of a run directory: one driver trains a run at a time.

    The lock ends with the process. It is valid on this machine; for a local directory, on all machines that share the
    directory and its locks.
    """
    lock = FileLock(str(folder.scratch / LOCK), thread_local=False)
    try:
        folder.scratch.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=2.0)
    except Timeout:
        record = folder.read_json(RECORD) or {}
        who = f"process {record['pid']} on {record['host']}" if "pid" in record else "another process"
        raise ConfigError(
            f"run_dir '{folder.url}' is being trained by {who}; stop that process first (metadist control {folder.url} "
            "stop), or choose another --run-dir"
        ) from None
    except (OSError, NotImplementedError) as error:
        log.warning("%s can't be locked (%s): a second driver of this run would not be refused", folder.url, error)
        yield
        return
    try:
        yield
    finally:
        lock.release()


def steering_of(attempt: Attempt, feed: Feed, tracker: Recorder, stop: Callable[[], bool]) -> RunControl:
    """Return the steering of a run, with the commands of earlier attempts.

    Raises CheckpointError where the commands contradict the checkpoint that the attempt resumes.
    """
    experiment, directory, earlier = attempt.experiment, attempt.directory, attempt.earlier
    commands = CommandLog(directory.url, copy=directory.scratch / "commands.jsonl")
    if earlier is not None and (note := commands.reconcile(earlier.manifest.get("commands", ()), earlier.meta_step)):
        feed.note(note)
    asked: dict[str, int] = {}
    for group in experiment.workers:
        if not group.outside:  # commands do not change the number of remote workers
            asked[group.role] = asked.get(group.role, 0) + group.max
    info = RunInfo(attempt.run_id, directory.url, asked)
    steering = RunControl(commands, feed, experiment.learner, tracker, info, stop)
    if earlier is not None:
        steering.saved(earlier.meta_step)
    return steering


def check_control(settings: ControlSettings) -> None:
    """Raise ConfigError for a mistake in the ``control`` section. Other failures of the control plane only warn."""
    if not settings.enabled:
        return
    try:
        from metadist.rpc.credentials import read_token
        from metadist.rpc.endpoint import is_loopback
    except ModuleNotFoundError:
        return
    if not is_loopback(settings.host) and settings.tls_cert is None:
        raise ConfigError(
            f"control.host: {settings.host}: other machines could steer this run without encryption; give "
            "control.tls_cert and control.tls_key, or stay on 127.0.0.1"
        )
    if settings.token_file is not None:
        with _named("control.token_file"):
            read_token(settings.token_file)
    for key in ("tls_cert", "tls_key", "tls_ca"):
        path = getattr(settings, key)
        if path is not None and not os.path.isfile(path):
            raise ConfigError(f"control.{key}: there is no file '{path}'")


@contextmanager
def serve_control(steering: RunControl, feed: Feed, attempt: Attempt) -> Iterator[None]:
    """Serve the control plane while the run trains, and write its address to control.json.

    On failure, warn and continue.
    """
    settings, folder, run_id = attempt.experiment.control, attempt.directory, attempt.run_id
    record: dict[str, Any] = {
        "run_id": run_id,
        "pid": os.getpid(),
        "host": platform.node(),
        "started": time.time(),
        "address": None,
        "token_file": None,
        "tls": settings.tls_cert is not None,
        "tls_ca": settings.tls_ca,
        "off": None,
        "ended": None,
    }
    with ExitStack() as stack:
        try:
            record.update(_serve(stack, steering, settings, folder))
        except ModuleNotFoundError as error:
            record["off"] = f"{error.name} is not installed"
        except (MetadistError, OSError, RuntimeError) as error:
            record["off"] = str(error)
        if record["off"] and settings.enabled:
            feed.note(f"this run can't be steered while it trains: {record['off']}")
        _write(folder, record)
        stack.callback(feed.close)
        try:
            yield
        finally:
            status = steering.status()
            _write(
                folder,
                {
                    **record,
                    "ended": {"time": time.time(), "meta_step": status.meta_step, "meta_steps": status.meta_steps},
                },
            )


def _serve(stack: ExitStack, steering: RunControl, settings: ControlSettings, folder: RunDirectory) -> dict[str, Any]:
    if not settings.enabled:
        return {"off": "control.enabled is false"}
    from metadist.control import service
    from metadist.rpc.endpoint import Endpoint, serve

    token_file = settings.token_file or str(_new_token(folder.scratch / TOKEN))
    endpoint = Endpoint(
        settings.host,
        settings.port,
        settings.tls_cert,
        settings.tls_key,
        token_file,
        message_bytes=service.MESSAGE_BYTES,
        concurrent=service.CONCURRENT,
    )
    running = stack.enter_context(serve(endpoint, service.services(steering), grace=2.0))
    return {"address": running.address, "token_file": os.path.abspath(token_file)}


def _new_token(path: Path) -> Path:
    """Write a new token; every driver of a run makes its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32) + "\n")
    return path


def _write(folder: RunDirectory, record: dict[str, Any]) -> None:
    try:
        folder.write(RECORD, json.dumps(record, indent=1))
    except (MetadistError, OSError) as error:  # the run continues without control
        log.warning("%s: the run continues, but 'metadist control' won't find it", error)


@contextmanager
def _named(key: str) -> Iterator[None]:
    try:
        yield
    except MetadistError as error:
        raise ConfigError(f"{key}: {error}") from error
