"""Define policies: modules that map features and memory to a distribution over actions, a value and the next memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol, cast, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from metadist.core.model import BoundModel
from metadist.rl.environment import Actions, Discrete


@runtime_checkable
class PolicyModule(Protocol):
    """An ``nn.Module``: ``forward(features [B, T, F], memory [B, M])`` → (head [B, T, A], value [B, T], memory [B, M]).

    The memory is one tensor of ``memory_size`` M, zeros at the start of a trial. Where ``sees_history`` is false, the
    features are the observation alone (a reactive policy, for MAML-RL and for the memoryless baseline).
    """

    sees_history: bool
    memory_size: int

    def forward(self, features: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]: ...


@dataclass(frozen=True)
class Categorical:
    """The head holds logits."""

    count: int
    words = 1

    @property
    def head_size(self) -> int:
        return self.count

    def sample(self, head: Tensor, noise: Tensor) -> Tensor:
        # By the inverse distribution function: the last class takes the probability that rounding leaves over.
        below = head.softmax(-1).cumsum(-1)[..., :-1]
        return (noise > below).sum(-1)

    def mode(self, head: Tensor) -> Tensor:
        return head.argmax(-1)

    def log_probability(self, head: Tensor, action: Tensor) -> Tensor:
        return head.log_softmax(-1).gather(-1, action.unsqueeze(-1)).squeeze(-1)

    def entropy(self, head: Tensor) -> Tensor:
        logs = head.log_softmax(-1)
        return -(logs.exp() * logs).sum(-1)

    def divergence(self, before: Tensor, head: Tensor) -> Tensor:
        logs = before.log_softmax(-1)
        return (logs.exp() * (logs - head.log_softmax(-1))).sum(-1)

    def features(self, action: Tensor) -> Tensor:
        return F.one_hot(action, self.count).float()


@dataclass(frozen=True)
class Gaussian:
    """The head holds means [size] and logarithms of standard deviations [size]."""

    size: int

    @property
    def words(self) -> int:
        return 2 * self.size

    @property
    def head_size(self) -> int:
        return 2 * self.size

    def sample(self, head: Tensor, noise: Tensor) -> Tensor:
        mean, log_std = head.chunk(2, -1)
        return mean + log_std.exp() * standard_normal(noise)

    def mode(self, head: Tensor) -> Tensor:
        return head.chunk(2, -1)[0]

    def log_probability(self, head: Tensor, action: Tensor) -> Tensor:
        mean, log_std = head.chunk(2, -1)
        return (-0.5 * ((action - mean) / log_std.exp()).square() - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)

    def entropy(self, head: Tensor) -> Tensor:
        return (head.chunk(2, -1)[1] + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)

    def divergence(self, before: Tensor, head: Tensor) -> Tensor:
        (mean0, log0), (mean1, log1) = before.chunk(2, -1), head.chunk(2, -1)
        return (log1 - log0 + 0.5 * (((2 * log0).exp() + (mean0 - mean1).square()) * (-2 * log1).exp() - 1)).sum(-1)

    def features(self, action: Tensor) -> Tensor:
        return action


def distribution(actions: Actions) -> Categorical | Gaussian:
    """Return the distribution of a policy with these actions."""
    return Categorical(actions.count) if isinstance(actions, Discrete) else Gaussian(actions.size)


def standard_normal(noise: Tensor) -> Tensor:
    """Transform uniform [..., 2 n] to standard normal float32 [..., n] (Box–Muller), rounded from float64."""
    u1, u2 = noise.double().chunk(2, -1)
    return ((-2.0 * torch.log1p(-u1)).sqrt() * torch.cos(2.0 * math.pi * u2)).to(torch.float32)


@dataclass(frozen=True)
class Seen:
    """The inputs of a policy besides the observation: its last action and reward, and whether an episode has begun.

    All are zero at the first step of a trial (Duan et al. 2016, section 2.2).
    """

    action: Tensor
    reward: Tensor
    begun: Tensor

    @classmethod
    def nothing(cls, batch: int, size: int, device: torch.device) -> Seen:
        """Return the inputs at the first step of a trial; an action has ``size`` features."""
        return cls(*(torch.zeros(batch, n, device=device) for n in (size, 1, 1)))


@dataclass(frozen=True)
class Policy:
    """A bound module under one set of parameters, with its action distribution."""

    model: BoundModel
    parameters: Mapping[str, Tensor]
    actions: Actions

    @property
    def module(self) -> PolicyModule:
        """Return the policy's module; ``TrialAlgorithm.compatible`` has checked it."""
        return cast(PolicyModule, self.model.model.module)

    @property
    def distribution(self) -> Categorical | Gaussian:
        return distribution(self.actions)

    @property
    def memory_size(self) -> int:
        return self.module.memory_size

    def start(self, batch: int, device: torch.device) -> Tensor:
        """Return the memory [B, M] at the start of a trial."""
        return torch.zeros(batch, self.memory_size, dtype=self.model.model.dtype, device=device)

    def features(self, observation: Tensor, seen: Seen) -> Tensor:
        """Return the module's input [..., F] in its dtype."""
        parts = [observation, seen.action, seen.reward, seen.begun] if self.module.sees_history else [observation]
        return torch.cat(parts, -1).to(self.model.model.dtype)

    def step(self, observation: Tensor, seen: Seen, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute one step of a batch: head [B, A], value [B], memory [B, M]."""
        head, value, memory = self(self.features(observation, seen).unsqueeze(1), memory)
        return head.squeeze(1), value.squeeze(1), memory

    def held(self) -> Policy:
        """Return the same policy for many steps without gradients: its module holds the parameters, which is faster.

        The results have the same bits where the parameters are aligned in memory; a module's own always are.
        """
        return replace(self, model=self.model.holding(self.parameters))

    def __call__(self, features: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        head, value, memory = self.model(self.parameters, features, memory)
        return head, value, memory


@dataclass(frozen=True)
class PolicyPerTask(Policy):
    """A policy with separate parameters [tasks, …] for each task; a batch [tasks · n, …] has n rows for each task."""

    def held(self) -> Policy:
        return self

    def __call__(self, features: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        tasks = len(next(iter(self.parameters.values())))

        def apart(t: Tensor) -> Tensor:
            return torch.unflatten(t, 0, (tasks, -1))

        results: tuple[Tensor, ...] = torch.func.vmap(self.model)(self.parameters, apart(features), apart(memory))
        head, value, memory = (t.flatten(0, 1) for t in results)
        return head, value, memory
