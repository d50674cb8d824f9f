"""Workers from outside, wired: the desk of a driver behind its gRPC endpoint, and the process that joins one."""

from __future__ import annotations

import logging
import platform
import re
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import yaml

import metadist
from metadist.config.build import build as build_config
from metadist.config.groups import ROLES
from metadist.config.schema import parse_yaml
from metadist.core.errors import ConfigError, WorkerError, nearest
from metadist.learners.base import Learner
from metadist.workers.numerics import Numerics
from metadist.workers.remote.executor import OutsideExecutor
from metadist.workers.remote.messages import Dismissal

if TYPE_CHECKING:
    from metadist.config.experiment import Experiment

log = logging.getLogger(__name__)

#: what a worker needs nothing of: it is the driver's own
DRIVERS_OWN = ("workers", "outside", "control", "checkpoint", "tracking", "init_from")
#: a worker's call lasts as long as the run: the most that gRPC can be told
LONGEST_SECONDS = 24 * 24 * 3600.0
#: calls beside those of workers: health, reflection, workers that are about to be refused
OTHER_CALLS = 16
#: for every worker to be told that it is over, on a busy machine; one that was not told waits for a driver in vain
GRACE_SECONDS = 10.0


def versions() -> dict[str, str]:
    return {"metadist": metadist.__version__, "torch": torch.__version__, "python": platform.python_version()}


@contextmanager
def desk(
    experiment: Experiment,
    run_id: str,
    numerics: Numerics,
    note: Callable[[str], None],
    farewell: Callable[[], Dismissal],
) -> Iterator[OutsideExecutor]:
    """An executor whose workers can connect; they are told ``farewell`` at the end."""
    try:
        from metadist.rpc.endpoint import Endpoint, serve
        from metadist.workers.remote.server import Leases, add_to_server
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"outside: {error.name} is not installed; pip install 'grpcio grpcio-health-checking grpcio-reflection'"
        ) from error
    if not experiment.document:
        raise ConfigError(
            "outside: workers from outside build their learner from a config; this experiment was made in Python and has none"
        )
    settings = experiment.outside
    groups = [g for g in experiment.workers if g.outside and g.max]
    endpoint = Endpoint(
        settings.host,
        settings.port,
        settings.tls_cert,
        settings.tls_key,
        settings.token_file,
        concurrent=sum(g.max for g in groups) + OTHER_CALLS,
        stream_seconds=LONGEST_SECONDS,
        connection_seconds=LONGEST_SECONDS,
    )
    document = {k: v for k, v in experiment.document.items() if k not in DRIVERS_OWN}
    executor = OutsideExecutor(
        experiment.learner,
        groups,
        run=run_id,
        config=yaml.safe_dump(document, sort_keys=False, allow_unicode=True),
        versions=versions(),
        numerics=numerics,
        device=experiment.engine.device,
        seed=experiment.seed,
        lease_seconds=settings.lease,
        note=note,
    )
    with serve(endpoint, {add_to_server: Leases(executor)}, grace=GRACE_SECONDS) as served:
        host = platform.node() if settings.host in ("0.0.0.0", "::") else settings.host
        executor.how = f"metadist worker --connect {host}:{served.port}"
        executor.how += " --token-file FILE" if settings.token_file else ""
        executor.how += " --tls-ca FILE" if settings.tls_cert else ""
        note(f"workers from outside may join: {executor.how}")
        try:
            yield executor
        finally:
            executor.close(farewell())


# The worker -----------------------------------------------------------------------------------------------------------


def build(config: str) -> Learner:
    """The learner of a run, from the document that its driver sent."""
    document = parse_yaml(config, "the run's config")
    if not isinstance(document, dict):
        raise ConfigError("the run's config: expected keys and values")
    return build_config(document).learner


def work(
    address: str,
    *,
    token_file: str | None,
    tls_ca: str | None,
    role: str,
    name: str | None,
    device: str | None,
    patience: float,
    stay: bool,
    say: Callable[[str], None],
    stopped: Callable[[], bool],
) -> str:
    """Work for the driver at ``address`` until its run is over (with ``stay``: for the runs that come after, too); returns why it ended.

    A driver that can't be reached, or that went away in the middle of a run, is waited for, ``patience`` seconds at a time.
    Raises MetadistError where waiting can't help.
    """
    from metadist.workers.remote.client import ServiceError, connect, converse, passing, wait_until_ready
    from metadist.workers.remote.runner import ActorBench

    if role not in ROLES:
        raise ConfigError(f"--role: '{role}' is not one of {', '.join(ROLES)}{nearest(role, ROLES)}")
    bench = ActorBench(build, device, gpus=1.0 if role == "learner" and torch.cuda.is_available() else 0.0)
    name = name or re.sub(r"[^A-Za-z0-9_.-]", "-", platform.node()).strip("-._")[:48] or "worker"
    waiting_for, pause, process = "", 1.0, secrets.token_hex(16)
    while not stopped():
        channel, began = connect(address, token_file, tls_ca), time.monotonic()
        try:
            if waiting_for:
                say(f"{waiting_for}; waiting up to {patience:g} s for a driver")
                if not wait_until_ready(channel, patience, stopped):
                    break
                waiting_for = ""
            began = time.monotonic()
            ended = converse(
                channel,
                address,
                name=name,
                role=role,
                process=process,
                versions=versions(),
                bench=bench,
                say=say,
                stopped=stopped,
            )
            if ended is None:
                break
            if ended.then == "refused":
                raise WorkerError(f"the driver at {address} refused this worker: {ended.reason}")
            if ended.then == "over" and not stay:
                return ended.reason
            waiting_for = ended.reason
            # A driver that is there, and has no place or no use for this worker: gRPC's own pauses are for one that is not.
            pause = 1.0 if time.monotonic() - began > 30 else min(2 * pause, 15.0)
            time.sleep(pause)
        except ServiceError as error:
            if not passing(error):
                raise
            waiting_for = str(error)
        finally:
            channel.close()
    if stopped():
        return "stopped by its user"
    raise WorkerError(f"{waiting_for}; gave up after {patience:g} s (--patience)")
