"""CounterWord-based random numbers: every draw is a pure function of (seed, name, split, meta-step, task, position).

Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) on int64 tensors that hold
32-bit words. It runs on any device, under ``torch.func.vmap`` and during the tracing of a graph. The numbers of a task
do not depend on the worker, shard or meta-batch that it belongs to.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate
from operator import index
from typing import SupportsIndex, Union

import torch
from torch import Tensor

SPLITS = ("train", "validation", "test")

_MASK = 0xFFFFFFFF
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85

Key = tuple[int, int]


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: Key) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Apply ten rounds of Philox-4x32 to four words; each word is an int64 tensor with values in [0, 2³²)."""
    c0, c1, c2, c3 = counter
    for k0, k1 in _round_keys(key):
        # A product wraps in int64, but has the 64 bits of the unsigned product. Its low word is masked at its use.
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = ((p1 >> 32) ^ c1 ^ k0) & _MASK, p1, ((p0 >> 32) ^ c3 ^ k1) & _MASK, p0
    return c0, c1 & _MASK, c2, c3 & _MASK


def _round_keys(key: Key) -> list[Key]:
    return [((key[0] + i * _W0) & _MASK, (key[1] + i * _W1) & _MASK) for i in range(10)]


Wanted = tuple[tuple[Key, int], ...]
"""(key, number of words) of each of several streams."""
CounterWord = Union[int, Tensor]
"""A word of the counter: a number, or a 0-d int64 tensor in a traced graph."""


def _words(wanted: Wanted, tasks: Tensor, meta_step: CounterWord, high_word: CounterWord) -> list[Tensor]:
    """Return the first words of each stream: int64, tasks.shape + [count]."""
    if not isinstance(meta_step, Tensor) and not isinstance(high_word, Tensor) and _runs_eagerly():
        return _words_fast(wanted, tasks, meta_step, high_word)
    found = []
    for key, count in wanted:
        block, task = torch.arange((count + 3) // 4, device=tasks.device), tasks.unsqueeze(-1)
        zero = torch.zeros_like(block + task)
        words = philox((zero + block, zero + task, zero + meta_step, zero + high_word), key)
        found.append(torch.stack(words, dim=-1).flatten(-2)[..., :count])
    return found


def _words_fast(wanted: Wanted, tasks: Tensor, meta_step: int, high_word: int) -> list[Tensor]:
    """Return the same words as ``_words``, in less time.

    The tasks of a shard need a few hundred words, so that launching the operations takes most of the time: this
    function launches five operations for each round, in place, for all streams together. The rows of ``even`` are the
    two words that a round multiplies (c0, c2). The rows of ``product`` are p0, p1, p0, p1: its middle two rows have
    the order that c1 and c3 need.
    """
    blocks, starts, keys, multipliers, shift, mask = _constants(wanted, tasks.device)
    shape = (tasks.numel(), len(blocks))
    even, product, last = (tasks.new_empty(rows, *shape) for rows in (2, 4, 4))
    c0, c2 = even.unbind()
    c0.copy_(blocks), c2.fill_(meta_step)
    crossed, odd = product[1:3], last[1:3]
    c1, c3 = odd.unbind()
    c1.copy_(tasks.reshape(-1, 1)), c3.fill_(high_word)
    twice, product, last = even.expand(2, 2, *shape), product.view(2, 2, *shape), last.view(2, 2, *shape)
    for key in keys:
        torch.mul(twice, multipliers, out=product)
        torch.bitwise_right_shift(crossed, shift, out=even)
        even.bitwise_xor_(odd).bitwise_xor_(key).bitwise_and_(mask)
        product, crossed, last, odd = last, odd, product, crossed
    c1, c3 = odd.bitwise_and_(mask).unbind()
    words = torch.stack((c0, c1, c2, c3), dim=-1).view(*tasks.shape, 4 * shape[1])
    return [words.narrow(-1, start, count) for start, (_, count) in zip(starts, wanted)]


@lru_cache(maxsize=64)
def _constants(
    wanted: Wanted, device: torch.device
) -> tuple[Tensor, list[int], tuple[Tensor, ...], Tensor, Tensor, Tensor]:
    """Return the block numbers [B], the position of each stream's first word, the keys of the ten rounds [2, 1, B or
    1], the multipliers [2, 1, 1], and two constants that are faster as tensors."""
    counts = [(count + 3) // 4 for _, count in wanted]
    keys = torch.tensor([list(zip(*(_round_keys(key)[i] for key, _ in wanted))) for i in range(10)])
    if len(wanted) > 1:
        keys = keys.repeat_interleave(torch.tensor(counts), dim=-1)
    return (
        torch.cat([torch.arange(count) for count in counts]).to(device),
        [4 * first for first in accumulate(counts[:-1], initial=0)],
        keys.unsqueeze(2).to(device).unbind(),
        torch.tensor([_M0, _M1], device=device).view(2, 1, 1),
        torch.tensor(32, device=device),
        torch.tensor(_MASK, device=device),
    )


def _runs_eagerly() -> bool:
    """Return whether operations on tensors run at their call: not under ``vmap``, and not in a traced graph."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._len_torch_dispatch_stack()
    )


@lru_cache(maxsize=4096)
def _philox_key(seed: int, name: str) -> Key:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def uniform(words: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Convert words to float32 in [low, high), with 24 random bits each.

    Rounding can give ``high`` itself where the range is small compared with ``low``.
    """
    return (words >> 8).to(torch.float32) * ((high - low) * 2.0**-24) + low


def integers(words: Tensor, high: int) -> Tensor:
    """Convert words to int64 in [0, high), high ≤ 2³²; the bias of the multiply-shift is below high / 2³²."""
    if not 0 < high <= 1 << 32:
        raise ValueError(f"high is {high}; expected 1 to 2**32")
    return ((words * high) >> 32) & _MASK


def choose(words: Tensor, population: Tensor | int) -> Tensor:
    """Convert words […, k] to k ordered draws without replacement from range(``population``): int64 […, k].

    ``population`` is an int up to 2³² or a tensor […] with values up to 2³¹. A partial Fisher–Yates shuffle without
    the array that is shuffled. Draw j takes the item at place pick_j ≥ j, and moves the item at place j to pick_j. The
    item at a place before draw j was moved there by the last earlier draw that picked this place; following these
    draws back ends at a place that no draw has changed. O(k²) for every size of population.
    """
    k = words.shape[-1]
    large = not isinstance(population, Tensor) and population > 1 << 31
    if large and population > 1 << 32:
        raise ValueError(f"population is {population}; expected 2**32 or less")
    turn = torch.arange(k, device=words.device)
    left = (population.unsqueeze(-1) if isinstance(population, Tensor) else population) - turn
    high = (words * left) >> 32
    picks = (high & _MASK if large else high) + turn  # products above 2⁶³ wrap
    if k < 2:
        return picks
    # For each turn j: the last draw i < j that picked place j, and the last draw that picked place pick_j; -1 for none.
    places = torch.stack((turn.expand_as(picks), picks), dim=-2).unsqueeze(-1)
    numbered = (turn + 1) * (turn < turn.unsqueeze(1))
    own, picked = (((places == picks[..., None, None, :]) * numbered).amax(-1) - 1).unbind(-2)
    item = torch.where(own < 0, turn, own)
    for _ in range((k - 2).bit_length()):  # each pass follows twice as many draws back
        item = item.gather(-1, item)
    return torch.where(picked < 0, picks, item.gather(-1, picked.clamp(min=0)))


@dataclass(frozen=True)
class Stream:
    """One named sequence of random words per task. Use a stream only once: every method reads it from its start.

    ``tasks`` has shape [T] (or is a scalar under ``vmap``); results have the shape ``tasks.shape + shape``.
    """

    key: Key
    tasks: Tensor
    meta_step: CounterWord
    high_word: CounterWord

    def bits(self, *shape: int) -> Tensor:
        """Return 32-bit words as int64."""
        (words,) = _words(((self.key, math.prod(shape)),), self.tasks, self.meta_step, self.high_word)
        return words.reshape((*self.tasks.shape, *shape))

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Return float32 in [low, high), as the function ``uniform``."""
        return uniform(self.bits(*shape), low, high)

    def normal(self, *shape: int) -> Tensor:
        """Return standard normal float32 by the Box–Muller transform."""
        u1, u2 = ((self.bits(2, *shape) >> 8).double() * 2.0**-24).unbind(self.tasks.dim())
        # Rounded from float64: the last bit of a float32 logarithm depends on its position in the vector, and so on
        # the shard.
        return ((-2.0 * torch.log1p(-u1)).sqrt() * torch.cos(2.0 * math.pi * u2)).to(torch.float32)

    def integers(self, high: int, *shape: int) -> Tensor:
        """Return int64 in [0, high), as the function ``integers``."""
        return integers(self.bits(*shape), high)

    def choose(self, population: int, k: int, rows: int = 1) -> Tensor:
        """Return ``rows`` independent ordered draws of ``k`` out of ``population`` without replacement.

        The shape is tasks.shape + [rows, k]. Raises ValueError where ``k`` is above ``population``.
        """
        if k > population:
            raise ValueError(f"cannot choose {k} of {population} without replacement")
        return choose(self.bits(rows, k), population)


@dataclass(frozen=True)
class TaskKey:
    """(run seed, split, meta-step, task index), which determine a task; for one task, or for all tasks of a shard.

    In a traced graph, the meta-step (and a stream's ``step`` and ``call``) can be int64 scalars. Indices and meta-step
    are words of 32 bits: others would share the numbers of other tasks. Raises ValueError for such a meta-step and for
    an unknown split; ``of`` also does for such an index.
    """

    seed: int
    split: str
    meta_step: CounterWord
    tasks: Tensor

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ValueError(f"split '{self.split}' is unknown; expected one of {', '.join(SPLITS)}")
        if not isinstance(self.meta_step, Tensor):
            _refuse_other_words("meta_step", (self.meta_step,))

    @classmethod
    def of(cls, seed: int, split: str, meta_step: int, tasks: range | list[int]) -> TaskKey:
        """Return the key of ``tasks``, a range or list of task indices."""
        if isinstance(tasks, range):
            _refuse_other_words("task index", (tasks[0], tasks[-1]) if tasks else ())
            found = torch.arange(tasks.start, tasks.stop, tasks.step) if tasks else torch.empty(0, dtype=torch.int64)
            return cls(seed, split, meta_step, found)
        _refuse_other_words("task index", tasks)
        return cls(seed, split, meta_step, torch.tensor(tasks, dtype=torch.int64))

    def stream(self, name: str, step: CounterWord = 0, call: CounterWord = 0) -> Stream:
        """Return the stream called ``name``; ``step`` is the inner step and ``call`` a serial number within it."""
        for number in (step, call):
            if not isinstance(number, Tensor) and not 0 <= number < 1 << 14:
                raise ValueError(f"step {step} and call {call} must each be 0 or more and below {1 << 14}")
        high_word = SPLITS.index(self.split) << 28 | step << 14 | call
        return Stream(_philox_key(self.seed, name), self.tasks, self.meta_step, high_word)

    def words(self, **counts: int) -> list[Tensor]:
        """Return the first ``count`` words of several streams by name: each int64, tasks.shape + [count].

        ``uniform``, ``integers`` and ``choose`` convert words to numbers. One call takes less time than one call for
        each stream, and gives the same bits.
        """
        wanted = tuple((_philox_key(self.seed, name), count) for name, count in counts.items())
        return _words(wanted, self.tasks, self.meta_step, SPLITS.index(self.split) << 28)

    def each(self) -> list[TaskKey]:
        """Return the keys of the single tasks of a shard."""
        return [replace(self, tasks=self.tasks[i]) for i in range(len(self.tasks))]

    def group(self, size: int) -> TaskKey:
        """Return the key of the groups of ``size`` consecutive tasks, for draws that the tasks of a group share.

        Such a draw is a function of (seed, split, meta-step, index div ``size``), and never of the shard.
        """
        return replace(self, tasks=self.tasks // size)

    def runs(self, size: int | None) -> list[TaskKey]:
        """Cut the tasks [T], which stay in order, at the boundaries of groups of ``size``; None cuts nowhere."""
        if size is None or not len(self.tasks):
            return [self]
        _, counts = (self.tasks // size).unique_consecutive(return_counts=True)
        return [replace(self, tasks=some) for some in self.tasks.split(counts.tolist())]

    def to(self, device: torch.device) -> TaskKey:
        """Return the key with its tasks on ``device``."""
        return self if self.tasks.device == device else replace(self, tasks=self.tasks.to(device))

    def generator(self, name: str = "task") -> torch.Generator:
        """Return a CPU generator that this (single) task's key seeds, for code that samples sequentially.

        The seed has 32 bits: one in 2³² pairs of tasks shares its numbers. Streams have no such limit.
        """
        return torch.Generator().manual_seed(int(self.stream(name).bits()))


def _refuse_other_words(name: str, values: Iterable[SupportsIndex]) -> None:
    """Raise ValueError where a value is not a 32-bit word: it would share the random numbers of the word mod 2³²."""
    for value in values:
        try:
            valid = 0 <= index(value) <= _MASK
        except TypeError:
            valid = False
        if not valid:
            raise ValueError(f"{name} {value}; expected an integer of 0 or more and below 2**32")


def seeded(seed: int, name: str) -> torch.Generator:
    """Return a CPU generator keyed by (seed, name), for numbers that a run draws once, such as initial parameters."""
    low, high = _philox_key(seed, name)
    return torch.Generator().manual_seed(low | (high & 0x7FFFFFFF) << 32)
