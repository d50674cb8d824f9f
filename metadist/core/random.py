"""Counter-based random numbers: every draw is a pure function of (seed, name, split, meta-step, task, position).

Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) on int64 tensors that hold
32-bit words. It runs on any device, under ``torch.func.vmap`` and while a graph is traced, and a task's numbers never
depend on which worker, shard or meta-batch it belongs to.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

SPLITS = ("train", "validation", "test")

_MASK = 0xFFFFFFFF
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85

Key = tuple[int, int]


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: Key) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox-4x32. Four words in, four words out; each word is an int64 tensor with values in [0, 2³²)."""
    c0, c1, c2, c3 = counter
    for k0, k1 in _round_keys(key):
        # A product wraps in int64, but its 64 bits are those of the unsigned one. Its low word is masked where it is used.
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = ((p1 >> 32) ^ c1 ^ k0) & _MASK, p1, ((p0 >> 32) ^ c3 ^ k1) & _MASK, p0
    return c0, c1 & _MASK, c2, c3 & _MASK


def _round_keys(key: Key) -> list[Key]:
    return [((key[0] + i * _W0) & _MASK, (key[1] + i * _W1) & _MASK) for i in range(10)]


Wanted = tuple[tuple[Key, int], ...]
"""(key, how many words) of each of several streams."""


def _words(wanted: Wanted, tasks: Tensor, meta_step: int | Tensor, high_word: int | Tensor) -> list[Tensor]:
    """The first words of each stream: int64, tasks.shape + [count]."""
    if _computed_at_once(meta_step, high_word):
        return _words_at_once(wanted, tasks, meta_step, high_word)
    found = []
    for key, count in wanted:
        block, task = torch.arange((count + 3) // 4, device=tasks.device), tasks.unsqueeze(-1)
        zero = torch.zeros_like(block + task)
        words = philox((zero + block, zero + task, zero + meta_step, zero + high_word), key)
        found.append(torch.stack(words, dim=-1).flatten(-2)[..., :count])
    return found


def _words_at_once(wanted: Wanted, tasks: Tensor, meta_step: Any, high_word: Any) -> list[Tensor]:
    """The same words, made for speed.

    A shard's tasks take a few hundred words, so that drawing them costs what launching the operations costs: here five a
    round, in place, for all streams together. The two words that a round multiplies are the rows of ``even`` (c0, c2);
    the rows of ``product`` are p0, p1, p0, p1, whose middle two are in the order in which c1 and c3 want them.
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
    """Block numbers [B] and each stream's first word among all; the ten rounds' keys [2, 1, B or 1], the multipliers
    [2, 1, 1], and two numbers that are quicker as tensors."""
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


def _computed_at_once(*values: Any) -> bool:
    """Whether operations on tensors take place as they are called: neither under ``vmap`` nor while a graph is traced."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._len_torch_dispatch_stack()
        or any(isinstance(value, Tensor) for value in values)
    )


@lru_cache(maxsize=4096)
def _philox_key(seed: int, name: str) -> Key:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def uniform(words: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Words → float32, 24 random bits each, in [low, high); where the range is narrow beside ``low``, rounding may reach ``high``."""
    return (words >> 8).to(torch.float32) * ((high - low) * 2.0**-24) + low


def integers(words: Tensor, high: int) -> Tensor:
    """Words → int64 in [0, high), high ≤ 2³²; the bias of the multiply-shift is below high / 2³²."""
    if not 0 < high <= 1 << 32:
        raise ValueError(f"high is {high}; expected 1 to 2**32")
    return ((words * high) >> 32) & _MASK


def choose(words: Tensor, population: Tensor | int) -> Tensor:
    """Words […, k] → ordered draws of k out of ``population`` (an int, or […]) without replacement: int64 […, k].

    A partial Fisher–Yates shuffle without the decks: draw j takes the card in place pick_j ≥ j, and the card in place j
    is put there. What lay in a place before draw j was put there by the last earlier draw that picked it, so that whoever
    follows those draws back comes to a place that none had disturbed. O(k²), however large the population.
    """
    k = words.shape[-1]
    turn = torch.arange(k, device=words.device)
    left = (population.unsqueeze(-1) if isinstance(population, Tensor) else population) - turn
    picks = ((words * left) >> 32) + turn
    if k < 2:
        return picks
    # For each turn j, the last draw i < j that picked place j, and the last one that picked place pick_j; or -1.
    places = torch.stack((turn.expand_as(picks), picks), dim=-2).unsqueeze(-1)
    numbered = (turn + 1) * (turn < turn.unsqueeze(1))
    own, picked = (((places == picks[..., None, None, :]) * numbered).amax(-1) - 1).unbind(-2)
    card = torch.where(own < 0, turn, own)
    for _ in range((k - 2).bit_length()):  # follows twice as many draws back each time
        card = card.gather(-1, card)
    return torch.where(picked < 0, picks, card.gather(-1, picked.clamp(min=0)))


@dataclass(frozen=True)
class Stream:
    """One named sequence of random words per task. Use a stream once: every method reads it from its beginning.

    ``tasks`` has shape [T] (or is a scalar under ``vmap``); results have the shape ``tasks.shape + shape``.
    """

    key: Key
    tasks: Tensor
    meta_step: int | Tensor
    high_word: int | Tensor

    def bits(self, *shape: int) -> Tensor:
        """32-bit words as int64."""
        (words,) = _words(((self.key, math.prod(shape)),), self.tasks, self.meta_step, self.high_word)
        return words.reshape((*self.tasks.shape, *shape))

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """float32 in [low, high): ``uniform``."""
        return uniform(self.bits(*shape), low, high)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal float32 by the Box–Muller transform."""
        u1, u2 = ((self.bits(2, *shape) >> 8).double() * 2.0**-24).unbind(self.tasks.dim())
        # Rounded from float64: a float32 logarithm's last bit depends on where in the vector (so in which shard) it stands.
        return ((-2.0 * torch.log1p(-u1)).sqrt() * torch.cos(2.0 * math.pi * u2)).to(torch.float32)

    def integers(self, high: int, *shape: int) -> Tensor:
        """int64 in [0, high): ``integers``."""
        return integers(self.bits(*shape), high)

    def choose(self, population: int, k: int, rows: int = 1) -> Tensor:
        """``rows`` independent ordered draws of ``k`` out of ``population`` without replacement: tasks.shape + [rows, k]."""
        if k > population:
            raise ValueError(f"cannot choose {k} of {population} without replacement")
        return choose(self.bits(rows, k), population)


@dataclass(frozen=True)
class TaskKey:
    """What a task is a function of: (run seed, split, meta-step, task index), for one task or a whole shard at once.

    A traced graph may take the meta-step (and a stream's ``step`` and ``call``) as int64 scalars.
    """

    seed: int
    split: str
    meta_step: int | Tensor
    tasks: Tensor

    @classmethod
    def of(cls, seed: int, split: str, meta_step: int, tasks: range | list[int]) -> TaskKey:
        if isinstance(tasks, range):
            return cls(seed, split, meta_step, torch.arange(tasks.start, max(tasks.start, tasks.stop), tasks.step))
        return cls(seed, split, meta_step, torch.tensor(tasks, dtype=torch.int64))

    def stream(self, name: str, step: int | Tensor = 0, call: int | Tensor = 0) -> Stream:
        """The stream called ``name``; ``step`` is the inner step and ``call`` a serial number within it."""
        for number in (step, call):
            if not isinstance(number, Tensor) and not 0 <= number < 1 << 14:
                raise ValueError(f"step {step} and call {call} must each be below {1 << 14}")
        high_word = SPLITS.index(self.split) << 28 | step << 14 | call
        return Stream(_philox_key(self.seed, name), self.tasks, self.meta_step, high_word)

    def words(self, **counts: int) -> list[Tensor]:
        """The first words of several streams, name → how many, drawn at once: each int64, tasks.shape + [count].

        ``uniform``, ``integers`` and ``choose`` make numbers of them. The bits are those of stream after stream.
        """
        wanted = tuple((_philox_key(self.seed, name), count) for name, count in counts.items())
        return _words(wanted, self.tasks, self.meta_step, SPLITS.index(self.split) << 28)

    def each(self) -> list[TaskKey]:
        """The keys of the single tasks of a shard."""
        return [replace(self, tasks=self.tasks[i]) for i in range(len(self.tasks))]

    def to(self, device: torch.device) -> TaskKey:
        return self if self.tasks.device == device else replace(self, tasks=self.tasks.to(device))

    def generator(self, name: str = "task") -> torch.Generator:
        """A CPU ``torch.Generator`` seeded by this (single) task's key, for task code that samples sequentially.

        It takes 32 bits of a seed, so one in 2³² pairs of tasks shares its numbers; streams have no such limit.
        """
        return torch.Generator().manual_seed(int(self.stream(name).bits()))


def seeded(seed: int, name: str) -> torch.Generator:
    """A CPU generator for what is drawn once a run (initial parameters), keyed by (seed, name)."""
    low, high = _philox_key(seed, name)
    return torch.Generator().manual_seed(low | (high & 0x7FFFFFFF) << 32)
