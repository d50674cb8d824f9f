"""A causal transformer as a policy; its memory is the keys and values of a fixed window of steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from metadist.core.errors import ConfigError, at_least


@dataclass(frozen=True)
class CausalTransformer:
    """A pre-norm transformer over the steps of a trial. Every block attends to the last ``window`` steps with this
    one.

    Two layers embed a step together with the previous step: an embedding then holds an observation, the action there
    and its result, and a single block can find earlier actions at the same observation. Positions enter as a learned
    bias for each head and distance (Shaw et al. 2018). The memory is a ring buffer of each block's keys and values
    (Dai et al. 2019, "Transformer-XL"): the cost of a step does not depend on the length of the trial.
    """

    width: int = 64
    depth: int = 2
    heads: int = 4
    mlp_ratio: float = 2.0
    window: int = 64

    def __post_init__(self) -> None:
        at_least(1, **{f"model.{n}": getattr(self, n) for n in ("width", "depth", "heads", "window")})
        if self.width % self.heads:
            raise ConfigError(f"model.width: {self.width} is not a multiple of model.heads = {self.heads}")
        if self.hidden < 1:
            raise ConfigError(
                f"model.mlp_ratio: {self.mlp_ratio} times model.width = {self.width} is below 1; use a larger ratio"
            )

    @property
    def hidden(self) -> int:
        """The width of the hidden layers."""
        return int(self.width * self.mlp_ratio)

    def build_policy(self, observation: int, action: int, continuous: bool) -> nn.Module:
        return TransformerPolicy(observation + action + 2, 2 * action if continuous else action, continuous, self)


class TransformerPolicy(nn.Module):
    """features [B, T, F], memory [B, M] → head [B, T, A], value [B, T], memory [B, M]; separate linear heads.

    The memory holds the last step's features [F], the number of steps so far [1], the number of the step in each
    place of the ring [window] (from 1; 0 for an empty place), and the places [depth, window, 2 · width]: keys, then
    values. Without gradients, a single step writes into its argument ``memory``; a copy would take most of the step's
    time.
    """

    sees_history = True

    def __init__(self, features: int, head: int, log_std: bool, config: CausalTransformer) -> None:
        super().__init__()
        self.features, self.window = features, config.window
        self.shape = (config.depth, config.window, 2 * config.width)
        self.embedding = nn.Sequential(
            nn.Linear(2 * features, config.hidden), nn.GELU(), nn.Linear(config.hidden, config.width)
        )
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)
        self.head, self.value = nn.Linear(config.width, head // 2 if log_std else head), nn.Linear(config.width, 1)
        self.log_std = nn.Parameter(torch.zeros(head // 2)) if log_std else None
        nn.init.orthogonal_(self.head.weight, 0.01)
        nn.init.zeros_(self.head.bias)
        nn.init.orthogonal_(self.value.weight, 1.0)
        nn.init.zeros_(self.value.bias)

    @property
    def memory_size(self) -> int:
        """The number of elements of a trial's memory."""
        return self.features + 1 + self.window + self.shape[0] * self.shape[1] * self.shape[2]

    def forward(self, features: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        length, single = features.shape[1], features.shape[1] == 1 and not torch.is_grad_enabled()
        last, count, numbers, ring = memory.split(
            [self.features, 1, self.window, memory.shape[1] - self.features - 1 - self.window], 1
        )
        x = self.embedding(torch.cat([features, torch.cat([last.unsqueeze(1), features[:, :-1]], 1)], -1))
        new = count + torch.arange(1, length + 1, device=memory.device)  # the numbers of these steps [B, T]
        if single:
            x = self._one_step(x, new, numbers, ring.unflatten(1, self.shape))
            last.copy_(features[:, -1])
            count.copy_(new)
        else:
            x, numbers, ring = self._many_steps(x, new, numbers, ring)
            memory = torch.cat([features[:, -1], new[:, -1:], numbers, ring], 1)
        x = self.norm(x)
        head = self.head(x)
        if self.log_std is not None:
            head = torch.cat([head, self.log_std.expand_as(head)], -1)
        return head, self.value(x).squeeze(-1), memory

    def _one_step(self, x: Tensor, new: Tensor, numbers: Tensor, ring: Tensor) -> Tensor:
        """Return the output for one step [B, 1, D]; write the step into ``numbers`` and ``ring``."""
        place = (new - 1).long() % self.window
        numbers.scatter_(1, place, new)
        ago = (new - numbers).long().clamp(0, self.window - 1)
        for block, keys_values in zip(self.blocks, ring.unbind(1)):
            x = cast(_Block, block).step(x, keys_values, place, ago, numbers > 0)
        return x

    def _many_steps(self, x: Tensor, new: Tensor, numbers: Tensor, ring: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the output for steps [B, T, D] that follow those in the ring, and the new ``numbers`` and ``ring``."""
        caches: tuple[Tensor | None, ...] = (None,) * len(self.blocks)
        there = new
        if bool(numbers.any()):  # the ring is empty at the start of a trial
            caches, there = ring.unflatten(1, self.shape).unbind(1), torch.cat([numbers, new], 1)
        ago = (new.unsqueeze(2) - there.unsqueeze(1)).long()
        seen = (ago >= 0) & (ago < self.window) & (there > 0).unsqueeze(1)
        ago = ago.clamp(0, self.window - 1)
        same = ago[0] if bool((new == new[0]).all() & (there == there[0]).all()) else ago
        newest = slice(-self.window, None)
        place, kept = (new[:, newest] - 1).long() % self.window, []
        for block, cache in zip(self.blocks, caches):
            x, made = block(x, cache, same, seen)
            kept.append(made[:, newest])
        places = place[:, None, :, None].expand(-1, len(kept), -1, self.shape[2])
        ring = ring.unflatten(1, self.shape).scatter(2, places, torch.stack(kept, 1))
        return x, numbers.scatter(1, place, new[:, newest]), ring.flatten(1)


class _Block(nn.Module):
    def __init__(self, config: CausalTransformer) -> None:
        super().__init__()
        width = config.width
        self.heads, self.attention_norm = config.heads, nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.distance = nn.Parameter(torch.zeros(config.heads, config.window))
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, config.hidden), nn.GELU(), nn.Linear(config.hidden, width))

    def forward(self, x: Tensor, cache: Tensor | None, ago: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, T, D], cache [B, window, 2 D] → x, keys and values of these steps [B, T, 2 D].

        ``ago`` [T, steps] or [B, T, steps] is the age of each step, and ``seen`` [B, T, steps] says whether it counts.
        """
        query, new = self._project(x)
        cache = new if cache is None else torch.cat([cache, new], 1)
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (query, *cache.chunk(2, -1))
        )  # [B, heads, steps, D / heads]
        # Only products and a softmax: torch's fused kernels have no second derivative, which TRPO needs.
        logits = q @ k.mT * q.shape[-1] ** -0.5 + self._bias(ago)
        weights = logits.masked_fill(~seen.unsqueeze(1), float("-inf")).softmax(-1)
        x = x + self.out((weights @ v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.mlp_norm(x)), new

    def step(self, x: Tensor, cache: Tensor, place: Tensor, ago: Tensor, seen: Tensor) -> Tensor:
        """Return x for one step [B, 1, D], as ``forward``; write the step's keys and values to ``place`` [B, 1] of
        ``cache``.

        The query of each head is zero outside of the head's part of the width, so that all heads use the keys without
        a copy of each head's keys.
        """
        query, new = self._project(x)
        cache.scatter_(1, place.unsqueeze(-1).expand_as(new), new)
        keys, values = cache.chunk(2, -1)
        part = torch.eye(self.heads, device=x.device, dtype=x.dtype).repeat_interleave(query.shape[-1] // self.heads, 1)
        logits = (query * part) @ keys.mT * (query.shape[-1] // self.heads) ** -0.5
        logits = logits + self._bias(ago.unsqueeze(1)).squeeze(2)
        weights = logits.masked_fill(~seen.unsqueeze(1), float("-inf")).softmax(-1)
        attended: Tensor = self.out(((weights @ values) * part).sum(1, keepdim=True))
        x = x + attended
        branch: Tensor = self.mlp(self.mlp_norm(x))
        return x + branch

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        query, new = self.qkv(self.attention_norm(x)).split([x.shape[-1], 2 * x.shape[-1]], -1)
        return query, new

    def _bias(self, ago: Tensor) -> Tensor:
        """Return the bias of each head: [T, steps] → [heads, T, steps], or [B, T, steps] → [B, heads, T, steps]."""
        found = self.distance[:, ago]
        return found if ago.dim() == 2 else found.transpose(0, 1)
