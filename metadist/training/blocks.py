"""Join shards to blocks that one worker computes and sums.

A block is a node of the canonical tree, so the bits of the sum do not depend on the blocks; the number of messages
does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from metadist.core.round import Shard

#: workers whose times per shard differ by more than this factor get small blocks, so that fast workers take more of
#: them
EVEN = 1.25
#: … unless the difference is less than the cost of one call, in seconds
CALL_SECONDS = 1e-3
#: minimum number of small blocks per worker
UNEVEN_BLOCKS = 8
#: calls that a worker holds at a time; shards beyond those can go to faster workers
AT_ONCE = 2
#: work of one block at most, in seconds: a lost worker loses no more
BLOCK_SECONDS = 30.0


def in_blocks(shards: Sequence[Shard], paces: Sequence[float | None]) -> list[Shard]:
    """Join ``shards`` to blocks for workers of these ``paces`` (seconds per shard; None where nothing is measured).

    Returns the blocks in the order of submission; the shards themselves where they are not consecutive.
    """
    parts = [shards[r.start : r.stop] for r in cuts(len(shards), max(1, len(paces)), largest(len(shards), paces))]
    blocks = [
        part[0] if len(part) == 1 else replace(part[0], count=sum(s.count for s in part), leaf=part[0].count)
        for part in parts
    ]
    whole = [s for block in blocks for s in block.each()] == list(shards)
    return blocks if whole else list(shards)


def largest(count: int, paces: Sequence[float | None]) -> int:
    """Return the largest number of shards in a block, a power of two: an equal part of ``count`` for each worker.

    Where workers differ in speed, or may differ, it is a fraction of that part.
    """
    known, workers = [p for p in paces if p is not None], max(1, len(paces))
    size = 1 << (-(-count // workers) - 1).bit_length()
    uneven = len(known) < workers or max(known) > EVEN * min(known) + CALL_SECONDS
    if uneven and count > AT_ONCE * workers:
        while size > 1 and size * UNEVEN_BLOCKS * workers > count:
            size //= 2
    while known and size > 1 and size * max(known) > BLOCK_SECONDS:
        size //= 2
    return size


def cuts(count: int, workers: int, size: int) -> Iterator[range]:
    """Cut 0 … ``count`` − 1 into nodes of the canonical tree with at most ``size`` leaves, a power of two.

    Every worker gets equally many; the size of the rest is halved until it divides evenly. Large nodes come first:
    where a free worker takes the next node, none gets more than its part.
    """
    at = 0
    while at < count:
        left = count - at
        blocks = -(-left // size)
        divides = workers == 1 or (blocks >= workers and -(-blocks // workers) * size == -(-left // workers))
        if size > 1 and not divides:
            blocks = left // size // workers * workers
        for _ in range(blocks):
            yield range(at, min(at + size, count))
            at += size
        size = max(1, size // 2)
