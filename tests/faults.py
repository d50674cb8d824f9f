"""Executors that fail on purpose, for tests that start theirs by ``train`` or ``start_workers``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from metadist.core.round import Executor, Shard
from metadist.workers.faulty import Act, FaultyExecutor


def everywhere(action: Callable[[Any, Shard], object]) -> Callable[[Executor], Executor]:
    """A ``wrap``: ``action(executor, shard)`` runs after every submission."""
    return lambda executor: FaultyExecutor(executor).fail_at(lambda shard: True, Act(action), times=None)
