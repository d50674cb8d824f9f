"""Counter-based random numbers: every draw is a pure function of (seed, name, split, meta-step, task, position).

Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) on int64 tensors that hold
32-bit words. It runs on any device and under ``torch.func.vmap``, and a task's numbers never depend on which worker,
shard or meta-batch it belongs to.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

SPLITS = ("train", "validation", "test")

_MASK = 0xFFFFFFFF
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox-4x32. Four words in, four words out; each word is an int64 tensor with values in [0, 2³²)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The product wraps in int64, but its 64 bits are those of the unsigned product; the mask undoes the sign of >>.
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK, ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


@lru_cache(maxsize=4096)
def _philox_key(seed: int, name: str) -> tuple[int, int]:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


@dataclass(frozen=True)
class Stream:
    """One named sequence of random words per task. Use a stream once: every method reads it from its beginning.

    ``tasks`` has shape [T] (or is a scalar under ``vmap``); results have the shape ``tasks.shape + shape``.
    """

    key: tuple[int, int]
    tasks: Tensor
    meta_step: int
    high_word: int

    def bits(self, *shape: int) -> Tensor:
        """32-bit words as int64."""
        count = math.prod(shape)
        blocks = torch.arange((count + 3) // 4, device=self.tasks.device)
        task = self.tasks.unsqueeze(-1)
        zero = torch.zeros_like(blocks + task)
        words = philox((zero + blocks, zero + task, zero + self.meta_step, zero + self.high_word), self.key)
        return torch.stack(words, dim=-1).flatten(-2)[..., :count].reshape((*self.tasks.shape, *shape))

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """float32, 24 random bits each, in [low, high); where the range is narrow beside ``low``, rounding may reach ``high``."""
        return (self.bits(*shape) >> 8).to(torch.float32) * ((high - low) * 2.0**-24) + low

    def normal(self, *shape: int) -> Tensor:
        """Standard normal float32 by the Box–Muller transform."""
        u1, u2 = ((self.bits(2, *shape) >> 8).double() * 2.0**-24).unbind(self.tasks.dim())
        # Rounded from float64: a float32 logarithm's last bit depends on where in the vector (so in which shard) it stands.
        return ((-2.0 * torch.log1p(-u1)).sqrt() * torch.cos(2.0 * math.pi * u2)).to(torch.float32)

    def integers(self, high: int, *shape: int) -> Tensor:
        """int64 in [0, high), high ≤ 2³²; the bias of the multiply-shift is below high / 2³²."""
        if not 0 < high <= 1 << 32:
            raise ValueError(f"high is {high}; expected 1 to 2**32")
        return ((self.bits(*shape) * high) >> 32) & _MASK

    def choose(self, population: int, k: int, rows: int = 1) -> Tensor:
        """``rows`` independent ordered draws of ``k`` out of ``population`` without replacement: tasks.shape + [rows, k].

        A partial Fisher–Yates shuffle, vectorised over tasks and rows. Not for use under ``vmap``.
        """
        if k > population:
            raise ValueError(f"cannot choose {k} of {population} without replacement")
        words = self.bits(rows, k)
        deck = torch.arange(population, device=self.tasks.device).expand(*self.tasks.shape, rows, population).contiguous()
        for j in range(k):
            pick = (((words[..., j] * (population - j)) >> 32) + j).unsqueeze(-1)
            drawn = deck.gather(-1, pick)
            deck.scatter_(-1, pick, deck[..., j : j + 1].clone())
            deck[..., j : j + 1] = drawn
        return deck[..., :k]


@dataclass(frozen=True)
class TaskKey:
    """What a task is a function of: (run seed, split, meta-step, task index), for one task or a whole shard at once."""

    seed: int
    split: str
    meta_step: int
    tasks: Tensor

    @classmethod
    def of(cls, seed: int, split: str, meta_step: int, tasks: range | list[int]) -> TaskKey:
        return cls(seed, split, meta_step, torch.tensor(list(tasks), dtype=torch.int64))

    def stream(self, name: str, step: int = 0, call: int = 0) -> Stream:
        """The stream called ``name``; ``step`` is the inner step and ``call`` a serial number within it."""
        if not (0 <= step < 1 << 14 and 0 <= call < 1 << 14):
            raise ValueError(f"step {step} and call {call} must each be below {1 << 14}")
        high_word = SPLITS.index(self.split) << 28 | step << 14 | call
        return Stream(_philox_key(self.seed, name), self.tasks, self.meta_step, high_word)

    def each(self) -> list[TaskKey]:
        """The keys of the single tasks of a shard."""
        return [replace(self, tasks=self.tasks[i]) for i in range(len(self.tasks))]

    def to(self, device: torch.device) -> TaskKey:
        return replace(self, tasks=self.tasks.to(device))

    def generator(self, name: str = "task") -> torch.Generator:
        """A CPU ``torch.Generator`` seeded by this (single) task's key, for task code that samples sequentially.

        It takes 32 bits of a seed, so one in 2³² pairs of tasks shares its numbers; streams have no such limit.
        """
        return torch.Generator().manual_seed(int(self.stream(name).bits()))


def seeded(seed: int, name: str) -> torch.Generator:
    """A CPU generator for what is drawn once a run (initial parameters), keyed by (seed, name)."""
    low, high = _philox_key(seed, name)
    return torch.Generator().manual_seed(low | (high & 0x7FFFFFFF) << 32)
