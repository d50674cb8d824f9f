"""Memory for arriving tensors: aligned to 64 bytes, and cheap where it is large.

The kernel clears fresh memory page by page, which costs more than the copy into it. Large blocks therefore are huge
pages, and a block that nothing refers to any more is reused.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import sys
import weakref

import torch
from torch import Tensor

#: smaller blocks come from PyTorch's own allocator, which keeps freed memory
LARGE = 1 << 20
#: bytes of blocks that this process keeps for reuse
SPARE = 1 << 30
_HUGE_PAGE = 2 << 20

_spare: list[tuple[int, mmap.mmap]] = []


def fresh(size: int) -> Tensor:
    """Return ``size`` writable bytes, aligned to 64, that nothing else refers to. Their content is undefined."""
    if size < LARGE or sys.platform != "linux":
        return torch.empty(size, dtype=torch.uint8)
    rounded = -(-size // _HUGE_PAGE) * _HUGE_PAGE
    block = _reused(rounded) or _mapped(rounded)
    lease = (ctypes.c_ubyte * size).from_buffer(block)  # lives as long as any tensor or buffer over these bytes
    weakref.finalize(lease, _return, rounded, block).atexit = False
    return torch.frombuffer(lease, dtype=torch.uint8)


def _mapped(size: int) -> mmap.mmap:
    block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(AttributeError, OSError):  # a kernel without huge pages
        block.madvise(mmap.MADV_HUGEPAGE)
    return block


def _reused(size: int) -> mmap.mmap | None:
    for item in _spare[::-1]:
        if item[0] == size:
            with contextlib.suppress(ValueError):  # another thread took it
                _spare.remove(item)
                return item[1]
    return None


def _return(size: int, block: mmap.mmap) -> None:
    """Keep a block for reuse. A finalizer may run in any thread, at any allocation: list operations only, no locks."""
    _spare.append((size, block))
    while sum(s for s, _ in _spare) > SPARE:
        with contextlib.suppress(IndexError):
            del _spare[0]
