"""Join or start a Ray cluster, share out its GPUs, and shorten its errors."""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Sequence
from typing import Any

# Ray reads its environment when it is imported, so this import comes first.
from metadist.workers.ray import environment as ray_environment  # isort: skip

import ray

from metadist.config.groups import WorkerGroup
from metadist.core.errors import MetadistError, WorkerError

log = logging.getLogger(__name__)


def connect(groups: Sequence[WorkerGroup]) -> bool:
    """Join the cluster at RAY_ADDRESS, or start one on this machine with enough logical CPUs for ``groups``.

    Return False where Ray runs in this process already.
    """
    if ray.is_initialized():
        return False
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
    address = ray_environment.ADDRESS
    try:
        with ray_environment.own_signals():
            if address:
                ray_environment.reach(address)
                ray.init(address=address, **quiet)
            else:
                cpus = max(os.cpu_count() or 1, sum(int(g.cpus * g.max + 0.999) for g in groups))
                start_here(cpus, **quiet)
        return True
    except MetadistError:
        raise
    except Exception as error:  # Ray raises many types, a bare Exception among them
        where = f"join the Ray cluster at RAY_ADDRESS={address}" if address else "start Ray on this machine"
        raise WorkerError(f"can't {where}: {short(error)}; use --workers 0 to train in this process") from error


def start_here(cpus: int, **options: Any) -> None:
    """Start a cluster of this machine alone.

    Ray gives a node 30 seconds to start, which a busy machine may exceed, so there is a second try.
    """
    for last in (False, True):
        try:
            ray.init(address="local", num_cpus=cpus, include_dashboard=False, **options)
            return
        except Exception as error:
            ray.shutdown()
            if last or "timed out during startup" not in str(error):
                raise
            log.warning("Ray did not start within its time; trying once more")


def shared_gpus(groups: Sequence[WorkerGroup]) -> dict[WorkerGroup, float]:
    """Return the GPUs of each worker by group.

    Learners with ``auto`` share evenly the GPUs that other groups leave; environments with ``auto`` get none.
    """
    left = ray.cluster_resources().get("GPU", 0.0) - sum(g.max * g.gpus for g in groups if g.gpus != "auto")
    share = max(0.0, left) / max(1, sum(g.max for g in groups if g.gpus == "auto" and g.role == "learner"))
    share = float(int(share)) if share >= 1 else math.floor(share * 1e4) / 1e4
    return {g: float(g.gpus) if g.gpus != "auto" else share if g.role == "learner" else 0.0 for g in groups}


def short(error: BaseException) -> str:
    """Return one line: Ray's message, or the last line of the remote traceback that the message quotes."""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().splitlines() or [type(error).__name__]
    return " ".join(
        (lines[-1] if any("Traceback (most recent call last)" in line for line in lines) else " ".join(lines)).split()
    )[:300]
