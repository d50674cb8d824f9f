"""The conditions of a check: one thread, as in a worker, and other states of the global random generators."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def other_generators(salt: int) -> Iterator[None]:
    """Seed the global generators of ``random``, NumPy and PyTorch with ``salt``; restore their states afterwards."""
    before = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(salt)
        np.random.seed(salt)
        torch.manual_seed(salt)
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])


@contextmanager
def one_thread() -> Iterator[None]:
    """Let PyTorch compute in one thread; restore the number afterwards. Small tensors are slower in several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
