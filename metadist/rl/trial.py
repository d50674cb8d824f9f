"""Roll out trials: n episodes in one task, with the policy's memory kept between episodes.

No other module uses both environments and policies.
"""

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
class Border:
    """The borders of windows of trials: ``memory`` [B, M], ``seen`` and ``episode`` [B] before the first step of a
    window, and ``following``, the value [B] of the observation after its last step.
    """

    memory: Tensor
    seen: Seen
    episode: Tensor
    following: Tensor

    def columns(self) -> dict[str, Tensor]:
        """Return the tensors by name."""
        seen = {f"border/{f.name}": getattr(self.seen, f.name) for f in fields(Seen)}
        own = {f"border/{n}": getattr(self, n) for n in ("memory", "episode", "following")}
        return {**own, **seen}

    @classmethod
    def of(cls, columns: Mapping[str, Tensor]) -> Border | None:
        """Return what ``columns()`` made; None where there is none: whole trials have no borders."""
        if "border/memory" not in columns:
            return None
        own = {n: columns[f"border/{n}"] for n in ("memory", "episode", "following")}
        return cls(seen=Seen(*(columns[f"border/{f.name}"] for f in fields(Seen))), **own)


@dataclass(frozen=True)
class Trials:
    """A batch of B trials of at most T steps; steps after a trial's end are padding (their ``VALID`` bit is off).

    observation [B, T, O], action [B, T] int64 or [B, T, A], log_probability, value, reward [B, T], flags [B, T] uint8,
    task [B] int64. ``measured`` [B, T] by name holds the environment's values for reports; ``records`` omits them.
    Where the T steps are a window of longer trials, ``border`` says how they fit to the steps around them.
    """

    observation: Tensor
    action: Tensor
    log_probability: Tensor
    value: Tensor
    reward: Tensor
    flags: Tensor
    task: Tensor
    measured: Mapping[str, Tensor] = field(default_factory=dict)
    border: Border | None = None

    @classmethod
    def of(cls, records: Records) -> Trials:
        """Return the trials of ``records``."""
        columns: dict[str, Any] = {name: records.columns[name] for name in cls.columns()}
        return cls(**columns, border=Border.of(records.columns))

    @classmethod
    def columns(cls) -> list[str]:
        """Return the names of the recorded tensors, in the order of the fields."""
        return [f.name for f in fields(cls) if f.name not in ("measured", "border")]

    def records(self) -> Records:
        """Return the trials as columns, without ``measured``."""
        border = {} if self.border is None else self.border.columns()
        return Records({**{name: getattr(self, name) for name in self.columns()}, **border})

    def to(self, device: torch.device) -> Trials:
        """Return the trials on ``device``."""
        columns = {n: t.to(device) for n, t in self.records().columns.items()}
        return replace(Trials.of(Records(columns)), measured={n: t.to(device) for n, t in self.measured.items()})

    def flag(self, bit: int) -> Tensor:
        """Return whether ``bit`` is set: bool [B, T]."""
        return (self.flags & bit) != 0

    def seen(self, policy: Policy) -> Seen:
        """Return the policy's inputs besides the observation [B, T, …], which are zero at the trial's first step."""
        action, ended = policy.distribution.features(self.action), self.flag(EPISODE_END).float()
        nothing = Seen.nothing(len(self.task), policy.actions.size, self.task.device)
        first = nothing if self.border is None else self.border.seen

        def after(first: Tensor, t: Tensor) -> Tensor:
            return torch.cat([first.unsqueeze(1), t[:, :-1]], 1)

        return Seen(
            after(first.action, action),
            after(first.reward, self.reward.unsqueeze(-1)),
            after(first.begun, ended.unsqueeze(-1)),
        )

    def memory(self, policy: Policy) -> Tensor:
        """Return the policy's memory [B, M] before the first step."""
        start = policy.start(len(self.task), self.task.device)
        return start if self.border is None else self.border.memory.to(start)

    def episode(self) -> Tensor:
        """Return the episode of every step, from 0: int64 [B, T]."""
        passed = torch.cat([torch.zeros_like(self.task).unsqueeze(1), self.flag(EPISODE_END).cumsum(1)[:, :-1]], 1)
        return passed if self.border is None else passed + self.border.episode.unsqueeze(1)

    def by_episode(self, episodes: int) -> Tensor:
        """Return the return of every episode: float64 [B, episodes]."""
        reward = torch.where(self.flag(VALID), self.reward, torch.zeros_like(self.reward)).double()
        returns = torch.zeros(len(reward), episodes, dtype=torch.float64, device=reward.device)
        return returns.scatter_add_(1, self.episode().clamp(max=episodes - 1), reward)

    def counted(self) -> Tensor:
        """Return which trials count (their environment did not fail): bool [B]."""
        return self.flag(VALID).any(1)

    def highest(self, name: str, episodes: int) -> Tensor:
        """Return the highest measured value of every episode, NaN where there is none: float64 [B, episodes]."""
        seen = torch.where(self.flag(VALID), self.measured[name], torch.nan).double().nan_to_num(-torch.inf)
        found = seen.new_full((len(seen), episodes), -torch.inf)
        found.scatter_reduce_(1, self.episode().clamp(max=episodes - 1), seen, "amax")
        return torch.where(found.isneginf(), torch.nan, found)


@dataclass(frozen=True)
class Repetition:
    """One of several rollouts of the same task, each with its own noise.

    It has ``episodes`` episodes in place of the environment's number. ``stage`` and ``serial`` ([B, 1] or a number,
    below 2¹⁴) key the noise.
    """

    episodes: int
    stage: int = 0
    serial: Tensor | int = 0


@torch.no_grad()
def rollout(
    environment: MetaEnvironment,
    policy: Policy,
    keys: TaskKey,
    *,
    greedy: bool = False,
    tasks: Tasks | None = None,
    repetition: Repetition | None = None,
) -> Trials:
    """Roll out one trial of every task of ``keys``.

    ``greedy`` takes the likeliest action in place of a sampled one. ``tasks`` are the sampled tasks of ``keys``.
    Raises NonFiniteError where the environment returns a reward or observation of NaN or Inf.
    """
    part = Repetition(environment.episodes) if repetition is None else repetition
    sampled = environment.sample(keys) if tasks is None else tasks
    noise = Noise.of(environment, policy, keys, part)
    moment = Moment.first(environment, policy, keys, sampled, noise)
    batch = Batch(environment, policy.held(), keys, sampled, noise, moment)
    batch.play(greedy)
    return batch.trials()


@dataclass(frozen=True)
class Noise:
    """The noise of trials of ``episodes``: ``acting`` and ``stepping`` [B, T, …] by step, ``starting`` [B, E, …]."""

    episodes: int
    acting: Tensor
    stepping: Tensor
    starting: Tensor

    @classmethod
    def of(cls, environment: MetaEnvironment, policy: Policy, keys: TaskKey, part: Repetition) -> Noise:
        """Draw the noise of all steps."""
        key, length = (part.stage, part.serial), part.episodes * environment.horizon
        acting = keys.stream("action", *key).uniform(length, policy.distribution.words)
        stepping = starting = acting[..., :0]
        if environment.step_noise:
            stepping = keys.stream("environment", *key).uniform(length, environment.step_noise)
        if environment.reset_noise:
            starting = keys.stream("reset", *key).uniform(part.episodes, environment.reset_noise)
        return cls(part.episodes, acting, stepping, starting)


@dataclass(frozen=True)
class Moment:
    """A batch of trials between two steps: all that the next step needs besides the tasks and the noise.

    ``episode`` and ``clock``, the steps of the episode so far, are int64 [B].
    """

    state: Any
    observation: Tensor
    memory: Tensor
    seen: Seen
    episode: Tensor
    clock: Tensor

    @classmethod
    def first(cls, environment: MetaEnvironment, policy: Policy, keys: TaskKey, tasks: Tasks, noise: Noise) -> Moment:
        """Begin the trials of ``keys``."""
        batch, device = len(keys.tasks), keys.tasks.device
        zero = torch.zeros(batch, dtype=torch.int64, device=device)
        with spent("environment"):
            state, observation = environment.reset(tasks, _at(noise.starting, zero))
        observation, _ = _finite(observation, observation[:, 0], torch.ones_like(zero, dtype=torch.bool), keys)
        nothing = Seen.nothing(batch, policy.actions.size, device)
        return cls(state, observation, policy.start(batch, device), nothing, zero, zero)


class Batch:
    """A batch of trials in progress, from ``moment`` on. ``live`` marks the trials that have not ended, [B] bool."""

    def __init__(
        self, environment: MetaEnvironment, policy: Policy, keys: TaskKey, tasks: Tasks, noise: Noise, moment: Moment
    ) -> None:
        self.environment, self.policy, self.keys, self.tasks, self.noise = environment, policy, keys, tasks, noise
        self.distribution, self.episodes = policy.distribution, noise.episodes
        self.state, self.observation, self.seen = moment.state, moment.observation, moment.seen
        # A copy: without gradients, a policy may write into the memory that it receives.
        self.memory, self.episode, self.clock = moment.memory.clone(), moment.episode, moment.clock
        self.live = torch.ones(len(keys.tasks), dtype=torch.bool, device=keys.tasks.device)
        self.ended = torch.zeros_like(self.live)
        self.columns: dict[str, list[Tensor]] = {name: [] for name in Trials.columns() if name != "task"}
        self.measured: dict[str, list[Tensor]] = {}

    def play(self, greedy: bool = False) -> None:
        """Take as many steps as there is noise for, or until every trial has ended."""
        for t in range(self.noise.acting.shape[1]):
            self.step(t, greedy)
            if not bool(self.live.any()):
                break
            self.restart()

    def moment(self) -> Moment:
        """Return the batch as it is now."""
        return Moment(self.state, self.observation, self.memory, self.seen, self.episode, self.clock)

    def step(self, t: int, greedy: bool) -> None:
        """Choose an action at step ``t``, step the environment and record both."""
        with spent("inference"):
            head, value, self.memory = self.policy.step(self.observation, self.seen, self.memory)
            if greedy:
                action = self.distribution.mode(head)
            else:
                action = self.distribution.sample(head, self.noise.acting[:, t])
        with spent("environment"):
            step = self.environment.step(self.tasks, self.state, action, self.noise.stepping[:, t])
        observed, self.reward = _finite(step.observation, step.reward, self.live, self.keys)
        flags = self._flags(step.terminated)
        self._record("observation", self.observation)
        self._record("action", action)
        self._record("log_probability", self.distribution.log_probability(head, action))
        self._record("value", value)
        self._record("reward", self.reward)
        self._record("flags", flags)
        for name, column in step.measured.items():
            self.measured.setdefault(name, []).append(column)
        features = self.distribution.features(action)
        self.seen = Seen(features, self.reward.unsqueeze(-1), self.ended.float().unsqueeze(-1))
        self.state, self.observation = step.state, observed
        self.live = self.live & (self.episode < self.episodes)

    def _flags(self, terminated: Tensor) -> Tensor:
        """Advance clocks and episodes; return the step's flags [B] uint8."""
        live = self.live
        self.clock = self.clock + 1
        self.ended = (terminated | (self.clock >= self.environment.horizon)) & live
        self.episode = self.episode + self.ended
        over = self.ended & (self.episode >= self.episodes)
        flags = live * VALID + (terminated & live) * TERMINATED + self.ended * EPISODE_END + over * TRIAL_END
        return flags.to(torch.uint8)

    def _record(self, name: str, column: Tensor) -> None:
        self.columns[name].append(column)

    def restart(self) -> None:
        """Begin the next episode in the trials whose episode has ended."""
        if not bool(self.ended.any()):
            return
        noise = _at(self.noise.starting, self.episode.clamp(max=self.episodes - 1))
        with spent("environment"):
            self.state, observation = self.environment.restart(
                self.tasks, self.state, self.observation, self.ended & self.live, noise
            )
        self.observation, _ = _finite(observation, self.reward, self.live, self.keys)
        self.clock = torch.where(self.ended, 0, self.clock)

    def trials(self) -> Trials:
        """Return the recorded trials, without the valid flags of trials whose environment failed."""
        measured = {n: torch.stack(c, 1) for n, c in self.measured.items()}
        columns: dict[str, Any] = {n: torch.stack(c, 1) for n, c in self.columns.items()}
        trials = Trials(**columns, task=self.keys.tasks, measured=measured)
        left_out = self.environment.left_out(self.state)
        if left_out is None:
            return trials
        return replace(trials, flags=trials.flags.masked_fill(left_out.to(trials.flags.device).unsqueeze(1), 0))


def _at(noise: Tensor, episode: Tensor) -> Tensor:
    """Select each trial's noise of its own episode: [B, E, n] and [B] → [B, n]."""
    if not noise.shape[-1]:
        return noise[:, 0]
    return noise[torch.arange(len(episode), device=noise.device), episode]


def _finite(observation: Tensor, reward: Tensor, live: Tensor, keys: TaskKey) -> tuple[Tensor, Tensor]:
    """Return observation and reward with zeros in the rows of ended trials that are not finite.

    A NaN there would make gradients NaN, even where a mask excludes the row. Raises NonFiniteError for live trials.
    """
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
    """Compute generalised advantage estimates [B, T] (Schulman et al. 2016, eq. 16).

    They continue across the ends of episodes and stop at the trial's end; at the end of a window the value of the
    next observation stands for the steps to come. Values and advantages are in units of the scaled reward.
    """
    valid, last = trials.flag(VALID), trials.flag(TRIAL_END)
    going_on = (valid & ~last).to(trials.value.dtype)
    border = trials.border
    beyond = torch.zeros_like(trials.value[:, :1]) if border is None else border.following.unsqueeze(1)
    following = torch.cat([trials.value[:, 1:], beyond], 1)
    delta = trials.reward.to(trials.value.dtype) * reward_scale + discount * following * going_on - trials.value
    running, found = torch.zeros_like(delta[:, 0]), []
    for now, kept in zip(reversed(delta.unbind(1)), reversed((discount * gae_lambda * going_on).unbind(1))):
        running = now + kept * running
        found.append(running)
    estimate = torch.stack(found[::-1], 1)
    return torch.where(valid, estimate, torch.zeros_like(estimate))
