"""States of particles in a folder: one hashed frame per shard, written and read by the process that holds them."""

from __future__ import annotations

import logging
import platform
from collections.abc import Iterable
from dataclasses import replace

import torch

from metadist.core.computation import LoadStates, SaveStates
from metadist.core.errors import MetadistError
from metadist.core.round import Shard, WithOutput
from metadist.core.state import Contribution, Records
from metadist.storage.store import Store, why

log = logging.getLogger(__name__)


def counted(shard: Shard, **metrics: float) -> Contribution:
    """Return the result of a shard that adds nothing to the outer update."""
    return Contribution({}, float(shard.count), shard.count, metrics)


def file_of(shard: Shard) -> str:
    """Return the name of the file that holds the states of ``shard``."""
    return f"shard-{shard.index:05d}.frame"


def stores(shard: Shard) -> bool:
    """Return whether the shard writes or reads states."""
    return isinstance(shard.computation, (SaveStates, LoadStates))


def has_url(shard: Shard) -> bool:
    """Return whether the shard's folder is in a store that other machines can reach."""
    asked = shard.computation
    assert isinstance(asked, (SaveStates, LoadStates))
    return not Store(asked.place).local


def reachable(shard: Shard, hosts: Iterable[str]) -> bool:
    """Return whether workers on ``hosts`` can reach the shard's folder: a URL, or a folder of this one machine."""
    return has_url(shard) or all(host == platform.node() for host in hosts)


def saved(shard: Shard, states: Records, worker: str) -> Contribution:
    """Write ``states`` as the ``SaveStates`` shard asks, and return the number of bytes as a metric.

    Where the store fails, log a warning and return the metric ``failed`` as 1: a full disk does not end a run.
    """
    from metadist.wire.codec import ResultHeader, output_parts

    asked = shard.computation
    assert isinstance(asked, SaveStates)
    parts = output_parts(states, ResultHeader(_loading(shard), 0, worker))
    size, failed = sum(p.size for p in parts), 0.0
    try:
        Store(asked.place).write(file_of(shard), b"".join(parts))
    except Exception as error:  # each file system raises its own errors
        log.warning("the states of %s can't be written to %s: %s", shard, asked.place, why(error))
        failed = 1.0
    return counted(shard, bytes=float(size), failed=failed)


def loaded(shard: Shard, device: torch.device) -> WithOutput:
    """Read what the ``SaveStates`` shard of the next meta-step wrote. Raises MetadistError for any other content."""
    from metadist.wire.codec import RejectedError, decode_output

    asked = shard.computation
    assert isinstance(asked, LoadStates)
    try:
        states = decode_output(content_of(shard), shard, device)
    except RejectedError as error:
        raise MetadistError(f"the states in {asked.place}/{file_of(shard)} are damaged ({error}); {_REMEDY}") from error
    return WithOutput(counted(shard), states)


def _loading(shard: Shard) -> Shard:
    """Return the shard that reads what the ``SaveStates`` shard ``shard`` writes: the frame bears its name."""
    asked, (meta_step, round, _) = shard.computation, shard.needs[0]
    assert isinstance(asked, SaveStates)
    load = LoadStates(asked.place)
    return replace(shard, computation=load, meta_step=meta_step, round=round, key_step=meta_step, needs=(), keeps=True)


def content_of(shard: Shard) -> bytes:
    """Return the bytes of the frame that the ``LoadStates`` shard names. Raises MetadistError where there is none."""
    asked = shard.computation
    assert isinstance(asked, LoadStates)
    try:
        data: bytes = Store(asked.place).read(file_of(shard))
        return data
    except Exception as error:
        raise MetadistError(
            f"the states in {asked.place}/{file_of(shard)} can't be read: {why(error)}; {_REMEDY}"
        ) from error


_REMEDY = "remove the checkpoint of that meta-step, and continue from an older one with --resume"
