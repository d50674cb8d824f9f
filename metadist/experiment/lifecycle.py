"""A driver that can be steered: its claim on the run's folder, its command log, its control plane and the record by which that is found."""

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
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from metadist.config.settings import ControlSettings
from metadist.control.command_log import CommandLog
from metadist.control.driver_record import LOCK, RECORD
from metadist.control.feed import Board
from metadist.control.steering import Recorder, Steering
from metadist.core.errors import ConfigError, MetadistError
from metadist.storage.checkpoints import Loaded
from metadist.storage.run_directory import RunDirectory

if TYPE_CHECKING:
    from metadist.experiment.description import Experiment

log = logging.getLogger(__name__)

TOKEN = "control.token"


@contextmanager
def claimed(folder: RunDirectory) -> Iterator[None]:
    """One driver trains a run at a time. The lock ends with the process, however that ends; it holds on this machine (where the
    folder is local, on all that share it and its locks)."""
    lock = FileLock(str(folder.scratch / LOCK), thread_local=False)
    try:
        folder.scratch.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=2.0)
    except Timeout:
        record = folder.read_json(RECORD) or {}
        who = f"process {record['pid']} on {record['host']}" if "pid" in record else "another process"
        raise ConfigError(
            f"run_dir '{folder.url}' is being trained by {who}; stop that first (metadist control {folder.url} stop), or choose another --run-dir"
        ) from None
    except (OSError, NotImplementedError) as error:
        log.warning("%s can't be locked (%s): nothing keeps a second driver from this run", folder.url, error)
        yield
        return
    try:
        yield
    finally:
        lock.release()


def steering_of(
    experiment: Experiment,
    folder: RunDirectory,
    run_id: str,
    earlier: Loaded | None,
    board: Board,
    tracker: Recorder,
    stop: Callable[[], bool],
) -> Steering:
    """What steers the run, with the commands that earlier attempts were given. CheckpointError where they contradict ``earlier``."""
    commands = CommandLog(folder.url, copy=folder.scratch / "commands.jsonl")
    if earlier is not None and (note := commands.reconcile(earlier.manifest.get("commands", ()), earlier.meta_step)):
        board.note(note)
    asked: dict[str, int] = {}
    for group in experiment.workers:
        if not group.outside:  # those come and go by themselves
            asked[group.role] = asked.get(group.role, 0) + group.max
    steering = Steering(
        commands, board, experiment.learner, tracker, run_id=run_id, run_dir=folder.url, asked=asked, stop=stop
    )
    if earlier is not None:
        steering.saved(earlier.meta_step)
    return steering


def checked(settings: ControlSettings) -> None:
    """A mistake in the config is told before anything begins. What isn't the config's fault never keeps a run from training."""
    if not settings.enabled:
        return
    try:
        from metadist.rpc.credentials import read_token
        from metadist.rpc.endpoint import is_loopback
    except ModuleNotFoundError:
        return
    if not is_loopback(settings.host) and settings.tls_cert is None:
        raise ConfigError(
            f"control.host: {settings.host}: other machines could steer this run in the clear; give control.tls_cert and control.tls_key, or "
            "stay on 127.0.0.1"
        )
    if settings.token_file is not None:
        with _named("control.token_file"):
            read_token(settings.token_file)
    for key in ("tls_cert", "tls_key", "tls_ca"):
        path = getattr(settings, key)
        if path is not None and not os.path.isfile(path):
            raise ConfigError(f"control.{key}: there is no file '{path}'")


@contextmanager
def served(
    steering: Steering, board: Board, settings: ControlSettings, folder: RunDirectory, run_id: str
) -> Iterator[None]:
    """Serve the control plane while the run trains, and leave word of it in ``control.json``. Where that can't be, the run goes on."""
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
            board.note(f"this run can't be steered while it trains: {record['off']}")
        _write(folder, record)
        stack.callback(board.close)
        try:
            yield
        finally:
            standing = steering.standing()
            _write(
                folder,
                {
                    **record,
                    "ended": {"time": time.time(), "meta_step": standing.meta_step, "meta_steps": standing.meta_steps},
                },
            )


def _serve(stack: ExitStack, steering: Steering, settings: ControlSettings, folder: RunDirectory) -> dict[str, Any]:
    if not settings.enabled:
        return {"off": "control.enabled is false"}
    from metadist.control import service as plane
    from metadist.rpc.endpoint import Endpoint, serve

    token_file = settings.token_file or str(_new_token(folder.scratch / TOKEN))
    endpoint = Endpoint(
        settings.host,
        settings.port,
        settings.tls_cert,
        settings.tls_key,
        token_file,
        message_bytes=plane.MESSAGE_BYTES,
        concurrent=plane.CONCURRENT,
    )
    running = stack.enter_context(serve(endpoint, plane.services(steering), grace=2.0))
    return {"address": running.address, "token_file": os.path.abspath(token_file)}


def _new_token(path: Path) -> Path:
    """For this driver alone: another one of the same run makes another token."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32) + "\n")
    return path


def _write(folder: RunDirectory, record: dict[str, Any]) -> None:
    try:
        folder.write(RECORD, json.dumps(record, indent=1))
    except (MetadistError, OSError) as error:  # not worth a run
        log.warning("%s: the run goes on, but 'metadist control' won't find it", error)


@contextmanager
def _named(key: str) -> Iterator[None]:
    try:
        yield
    except MetadistError as error:
        raise ConfigError(f"{key}: {error}") from error
