"""Connect remote workers: the gRPC endpoint of the driver, and the process of a worker."""

from __future__ import annotations

import functools
import os
import platform
import re
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import yaml

import metadist
from metadist.config.build import build_foreign
from metadist.config.groups import ROLES
from metadist.config.schema import parse_document
from metadist.config.trust import modules_of, trusted
from metadist.core.errors import ConfigError, WorkerError, nearest
from metadist.core.imports import within
from metadist.learners.base import Learner
from metadist.workers.numerics import Numerics
from metadist.workers.remote.executor import RemoteExecutor
from metadist.workers.remote.messages import Applicant, Dismissal
from metadist.workers.remote.server import Offer
from metadist.workers.settings import RunSettings

if TYPE_CHECKING:
    from metadist.config.experiment import Experiment
    from metadist.rpc.endpoint import Endpoint
    from metadist.workers.remote.client import Shell

#: Config keys that workers do not need.
DRIVER_KEYS = ("workers", "outside", "control", "checkpoint", "tracking", "init_from")
#: A worker's call lasts as long as the run: this is the longest deadline that gRPC accepts.
LONGEST_SECONDS = 24 * 24 * 3600.0
#: Calls in addition to those of workers: health, reflection, workers that are being refused.
OTHER_CALLS = 16
#: Seconds to dismiss every worker on a busy machine; a worker without a dismissal waits for a driver in vain.
GRACE_SECONDS = 10.0


def versions() -> dict[str, str]:
    """Return the versions that a worker and its driver compare."""
    return {"metadist": metadist.__version__, "torch": torch.__version__, "python": platform.python_version()}


@contextmanager
def remote_executor(
    experiment: Experiment, settings: RunSettings, numerics: Numerics, farewell: Callable[[], Dismissal]
) -> Iterator[RemoteExecutor]:
    """Serve an executor to which workers can connect. At the end all of them are dismissed with ``farewell()``."""
    try:
        from metadist.rpc.endpoint import serve
        from metadist.workers.remote.service import Leases, add_to_server
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"outside: {error.name} is not installed; pip install 'grpcio grpcio-health-checking grpcio-reflection'"
        ) from error
    if not experiment.document:
        raise ConfigError(
            "outside: remote workers build their learner from a config, but this experiment was made in Python without "
            "one"
        )
    groups = [g for g in experiment.workers if g.outside and g.max]
    document = {k: v for k, v in experiment.document.items() if k not in DRIVER_KEYS}
    config = yaml.safe_dump(document, sort_keys=False, allow_unicode=True)
    offer = Offer(config, versions(), experiment.outside.lease)
    executor = RemoteExecutor(experiment.learner, groups, settings, offer, numerics)
    endpoint = _endpoint(experiment, workers=sum(g.max for g in groups))
    with serve(endpoint, {add_to_server: Leases(executor.server)}, grace=GRACE_SECONDS) as served:
        executor.how = _command(experiment, served.port)
        settings.note(f"remote workers can join: {executor.how}")
        try:
            yield executor
        finally:
            executor.close(farewell())


def _endpoint(experiment: Experiment, workers: int) -> Endpoint:
    from metadist.rpc.endpoint import Endpoint

    settings = experiment.outside
    return Endpoint(
        settings.host,
        settings.port,
        settings.tls_cert,
        settings.tls_key,
        settings.token_file,
        concurrent=workers + OTHER_CALLS,
        stream_seconds=LONGEST_SECONDS,
        connection_seconds=LONGEST_SECONDS,
    )


def _command(experiment: Experiment, port: int) -> str:
    """Return the command that starts a worker for this run."""
    settings = experiment.outside
    host = platform.node() if settings.host in ("0.0.0.0", "::") else settings.host
    command = f"metadist worker --connect {host}:{port}"
    command += " --token-file FILE" if settings.token_file else ""
    command += " --tls-ca FILE" if settings.tls_cert else ""
    own = (name for name in modules_of(experiment.document) if not within(name, ["metadist"]))
    return command + "".join(f" --trust {name}" for name in own)


# The worker -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WorkerOptions:
    """The options of ``metadist worker``.

    ``patience`` is the time in seconds to wait for a driver that can't be reached; with ``stay`` the worker waits for
    the next run at the end of a run. ``trust``: the modules that the driver's config may name.
    """

    token_file: str | None = None
    tls_ca: str | None = None
    role: str = "learner"
    name: str | None = None
    device: str | None = None
    patience: float = 600.0
    stay: bool = False
    trust: Sequence[str] = ()


def build(config: str, trust: Sequence[str] = ()) -> Learner:
    """Build the learner of a run from the document that its driver sent. It may name the modules in ``trust``."""
    document = parse_document(config, "the run's config")
    return build_foreign(document, "the driver's config", trust).learner


def work(address: str, options: WorkerOptions, shell: Shell) -> str:
    """Work for the driver at ``address`` until its run is over, and return the reason of the end.

    With ``options.stay`` it continues with later runs. The worker waits for a driver that can't be reached or that
    disappears during a run, ``options.patience`` seconds at a time. Raises MetadistError where waiting can't help.
    """
    from metadist.workers.remote.client import ServiceError, connect, converse, passing, wait_until_ready
    from metadist.workers.remote.runner import Runner

    applicant = _applicant(options)
    gpus = 1.0 if options.role == "learner" and torch.cuda.is_available() else 0.0
    runner = Runner(functools.partial(build, trust=trusted(options.trust)), options.device, gpus)
    waiting_for, pause = "", 1.0
    while not shell.stopped():
        channel = connect(address, options.token_file, options.tls_ca)
        try:
            if waiting_for:
                shell.say(f"{waiting_for}; waiting up to {options.patience:g} s for a driver")
                if not wait_until_ready(channel, options.patience, shell.stopped):
                    break
                waiting_for = ""
            began = time.monotonic()
            ended = converse(channel, address, applicant, runner, shell)
            if ended is None:
                break
            if ended.then == "refused":
                raise WorkerError(f"the driver at {address} refused this worker: {ended.reason}")
            if ended.then == "over" and not options.stay:
                return ended.reason
            waiting_for = ended.reason
            # This pause is for a driver that answers but needs no worker: gRPC's own pauses are for unreachable
            # drivers.
            pause = 1.0 if time.monotonic() - began > 30 else min(2 * pause, 15.0)
            time.sleep(pause)
        except ServiceError as error:
            if not passing(error):
                raise
            waiting_for = str(error)
        finally:
            channel.close()
    if shell.stopped():
        return "stopped by its user"
    raise WorkerError(f"{waiting_for}; gave up after {options.patience:g} s (--patience)")


def _applicant(options: WorkerOptions) -> Applicant:
    """Return this process as an applicant. Raises ConfigError for a role that does not exist."""
    if options.role not in ROLES:
        raise ConfigError(f"--role: '{options.role}' is not one of {', '.join(ROLES)}{nearest(options.role, ROLES)}")
    name = options.name or re.sub(r"[^A-Za-z0-9_.-]", "-", platform.node()).strip("-._")[:48] or "worker"
    return Applicant(name, options.role, platform.node(), os.getpid(), versions(), secrets.token_hex(16))
