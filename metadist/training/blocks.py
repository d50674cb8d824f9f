"""Which shards are summed where they are computed. The sum's bits can't depend on it; what travels does.

A block is a node of the canonical tree, so the driver's sum over blocks is the rest of the same tree.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from metadist.core.round import Shard

#: workers that disagree by more than this about the time that a shard takes get blocks of which the faster ones can take more
EVEN = 1.25
#: … unless it is about less than a call of its own costs, in seconds
CALL_SECONDS = 1e-3
#: so many blocks per worker then, at least
UNEVEN_BLOCKS = 8
#: so many calls are with a worker at once: where there are no more shards, nobody can take any from a slower one
AT_ONCE = 2
#: a worker that is lost takes no more than so many seconds of work with it
BLOCK_SECONDS = 30.0


def in_blocks(shards: Sequence[Shard], paces: Sequence[float | None]) -> list[Shard]:
    """``shards`` in the order in which they are to be given out, joined for workers of these ``paces``: seconds per shard, None where
    nothing is measured. As they are where they don't follow on each other."""
    parts = [shards[r.start : r.stop] for r in cuts(len(shards), max(1, len(paces)), largest(len(shards), paces))]
    blocks = [
        part[0] if len(part) == 1 else replace(part[0], count=sum(s.count for s in part), leaf=part[0].count)
        for part in parts
    ]
    whole = [s for block in blocks for s in block.each()] == list(shards)
    return blocks if whole else list(shards)


def largest(count: int, paces: Sequence[float | None]) -> int:
    """How many of ``count`` shards a block may have, a power of two: as many as each worker's part, or a fraction of them where
    workers differ in speed, or may."""
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
    """0 … ``count`` − 1 as nodes of the tree of at most ``size`` leaves, a power of two: as many for every worker, and what is
    left is halved until it goes round. Large ones come first: where whoever is free takes the next, none has more than its part."""
    at = 0
    while at < count:
        left = count - at
        blocks = -(-left // size)
        goes_round = workers == 1 or (blocks >= workers and -(-blocks // workers) * size == -(-left // workers))
        if size > 1 and not goes_round:
            blocks = left // size // workers * workers
        for _ in range(blocks):
            yield range(at, min(at + size, count))
            at += size
        size = max(1, size // 2)
