"""Trials: n episodes in one task, with the policy's memory kept from one to the next. The one place that knows about both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from metadist.core.errors import NonFiniteError
from metadist.core.random import TaskKey
from metadist.core.state import Records
from metadist.core.stopwatch import spent
from metadist.rl.environment import MetaEnvironment, Tasks
from metadist.rl.policy import Policy, Seen

#: bits of ``Trials.flags``
VALID, TERMINATED, EPISODE_END, TRIAL_END = 1, 2, 4, 8


@dataclass(frozen=True)
class Trials:
    """A batch of B trials, T steps each at most; steps after a trial's end are padding (their ``VALID`` bit is off).

    observation [B, T, O], action [B, T] int64 or [B, T, A], log_probability, value, reward [B, T], flags [B, T] uint8,
    task [B] int64. ``measured``: by name [B, T], what the environment gave to be seen; it isn't recorded.
    """

    observation: Tensor
    action: Tensor
    log_probability: Tensor
    value: Tensor
    reward: Tensor
    flags: Tensor
    task: Tensor
    measured: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, records: Records) -> Trials:
        columns: dict[str, Any] = {name: records.columns[name] for name in cls.columns()}
        return cls(**columns)

    @classmethod
    def columns(cls) -> list[str]:
        """The names of what is recorded."""
        return [f.name for f in fields(cls) if f.name != "measured"]

    def records(self) -> Records:
        return Records({name: getattr(self, name) for name in self.columns()})

    def to(self, device: torch.device) -> Trials:
        measured = {name: t.to(device) for name, t in self.measured.items()}
        return Trials(**{name: getattr(self, name).to(device) for name in self.columns()}, measured=measured)

    def flag(self, bit: int) -> Tensor:
        return (self.flags & bit) != 0

    def seen(self, policy: Policy) -> Seen:
        """What the policy had been shown at every step: [B, T, …], shifted by one, zeros at the trial's start."""

        def shift(t: Tensor) -> Tensor:
            return torch.cat([torch.zeros_like(t[:, :1]), t[:, :-1]], 1)

        action, ended = policy.distribution.features(self.action), self.flag(EPISODE_END).float()
        return Seen(shift(action), shift(self.reward.unsqueeze(-1)), shift(ended.unsqueeze(-1)))

    def episode(self) -> Tensor:
        """Which episode every step belongs to, from 0: int64 [B, T]."""
        return torch.cat([torch.zeros_like(self.task).unsqueeze(1), self.flag(EPISODE_END).cumsum(1)[:, :-1]], 1)

    def by_episode(self, episodes: int) -> Tensor:
        """The return of every episode: float64 [B, episodes]."""
        reward = torch.where(self.flag(VALID), self.reward, torch.zeros_like(self.reward)).double()
        returns = torch.zeros(len(reward), episodes, dtype=torch.float64, device=reward.device)
        return returns.scatter_add_(1, self.episode().clamp(max=episodes - 1), reward)

    def counted(self) -> Tensor:
        """Which trials weren't left out: bool [B]."""
        return self.flag(VALID).any(1)

    def highest(self, name: str, episodes: int) -> Tensor:
        """The highest value that was measured in every episode, NaN where there was none: float64 [B, episodes]."""
        seen = torch.where(self.flag(VALID), self.measured[name], torch.nan).double().nan_to_num(-torch.inf)
        found = seen.new_full((len(seen), episodes), -torch.inf)
        found.scatter_reduce_(1, self.episode().clamp(max=episodes - 1), seen, "amax")
        return torch.where(found.isneginf(), torch.nan, found)


@torch.no_grad()
def rollout(
    environment: MetaEnvironment,
    policy: Policy,
    keys: TaskKey,
    *,
    greedy: bool = False,
    tasks: Tasks | None = None,
    episodes: int | None = None,
    stage: int = 0,
    serial: Tensor | int = 0,
) -> Trials:
    """Every task of ``keys`` for one trial. ``greedy``: the likeliest action in place of a drawn one.

    ``episodes``: as many in place of the environment's. Where a task is rolled out more than once, ``stage`` and ``serial``
    ([B, 1], below 2¹⁴) give each time noise of its own.
    """
    device, episodes, policy = keys.tasks.device, environment.episodes if episodes is None else episodes, policy.held()
    tasks = environment.sample(keys) if tasks is None else tasks
    batch, length, distribution = len(keys.tasks), episodes * environment.horizon, policy.distribution
    acting = keys.stream("action", stage, serial).uniform(length, distribution.words)
    none = acting[..., :0]
    stepping = (
        keys.stream("environment", stage, serial).uniform(length, environment.step_noise)
        if environment.step_noise
        else none
    )
    starting = (
        keys.stream("reset", stage, serial).uniform(episodes, environment.reset_noise)
        if environment.reset_noise
        else none
    )

    memory = policy.start(batch, device)
    episode = torch.zeros(batch, dtype=torch.int64, device=device)
    clock = torch.zeros(batch, dtype=torch.int64, device=device)
    live = torch.ones(batch, dtype=torch.bool, device=device)
    with spent("environment"):
        state, observation = environment.reset(tasks, _at(starting, episode))
    observation, _ = _finite(observation, observation[:, 0], live, keys)
    seen = Seen.nothing(batch, policy.actions.size, device)
    columns: dict[str, list[Tensor]] = {name: [] for name in Trials.columns() if name != "task"}
    measured: dict[str, list[Tensor]] = {}
    for t in range(length):
        with spent("inference"):
            head, value, memory = policy.step(observation, seen, memory)
            action = distribution.mode(head) if greedy else distribution.sample(head, acting[:, t])
        with spent("environment"):
            step = environment.step(tasks, state, action, stepping[:, t])
        observed, reward = _finite(step.observation, step.reward, live, keys)
        clock = clock + 1
        ended = (step.terminated | (clock >= environment.horizon)) & live
        episode = episode + ended
        over = episode >= episodes
        flags = live * VALID + (step.terminated & live) * TERMINATED + ended * EPISODE_END + (ended & over) * TRIAL_END
        for name, column in (
            ("observation", observation),
            ("action", action),
            ("log_probability", distribution.log_probability(head, action)),
            ("value", value),
            ("reward", reward),
            ("flags", flags.to(torch.uint8)),
        ):
            columns[name].append(column)
        for name, column in step.measured.items():
            measured.setdefault(name, []).append(column)
        seen = Seen(distribution.features(action), reward.unsqueeze(-1), ended.float().unsqueeze(-1))
        state, observation, live = step.state, observed, live & ~over
        if not bool(live.any()):
            break
        if bool(ended.any()):
            with spent("environment"):
                state, observation = environment.restart(
                    tasks, state, observation, ended & live, _at(starting, episode.clamp(max=episodes - 1))
                )
            observation, _ = _finite(observation, reward, live, keys)
            clock = torch.where(ended, 0, clock)
    found = {n: torch.stack(c, 1) for n, c in columns.items()}
    trials = Trials(**found, task=keys.tasks, measured={n: torch.stack(c, 1) for n, c in measured.items()})
    left_out = environment.left_out(state)
    return (
        trials
        if left_out is None
        else replace(trials, flags=trials.flags.masked_fill(left_out.to(device).unsqueeze(1), 0))
    )


def _at(noise: Tensor, episode: Tensor) -> Tensor:
    """[B, E, n] and [B] → [B, n]."""
    if not noise.shape[-1]:
        return noise[:, 0]
    return noise[torch.arange(len(episode), device=noise.device), episode]


def _finite(observation: Tensor, reward: Tensor, live: Tensor, keys: TaskKey) -> tuple[Tensor, Tensor]:
    """Both, without what trials that are over may still give: NaN there would spoil gradients, masked or not."""
    finite = torch.isfinite(reward) & torch.isfinite(observation).all(-1)
    if bool(finite.all()):
        return observation, reward
    bad = tuple(int(i) for i in keys.tasks[~finite & live].cpu())
    if bad:
        raise NonFiniteError(
            f"the environment gave a reward or observation of NaN or Inf in tasks {list(bad)} (seed {keys.seed})", bad
        )
    return torch.where(finite.unsqueeze(-1), observation, 0.0), torch.where(finite, reward, 0.0)


def advantages(trials: Trials, discount: float, gae_lambda: float, reward_scale: float) -> Tensor:
    """Generalised advantage estimates [B, T] (Schulman et al. 2016, eq. 16), across episode ends, cut at the trial's end.

    Values are those of scaled rewards; so are the advantages.
    """
    valid, last = trials.flag(VALID), trials.flag(TRIAL_END)
    going_on = (valid & ~last).to(trials.value.dtype)
    following = torch.cat([trials.value[:, 1:], torch.zeros_like(trials.value[:, :1])], 1)
    delta = trials.reward.to(trials.value.dtype) * reward_scale + discount * following * going_on - trials.value
    running, found = torch.zeros_like(delta[:, 0]), []
    for now, kept in zip(reversed(delta.unbind(1)), reversed((discount * gae_lambda * going_on).unbind(1))):
        running = now + kept * running
        found.append(running)
    estimate = torch.stack(found[::-1], 1)
    return torch.where(valid, estimate, torch.zeros_like(estimate))
