"""Compare RL² in batched tensor environments with the same policy and learner on a plain Gymnasium vector environment.

The plain environments are written in the usual way: one object per environment, NumPy scalars, and a trial as one
Gymnasium episode (so that no environment resets during a trial). They get the same tasks and the same random numbers,
and must give the same rewards for the same actions before anything is timed. End to end means: roll out, then compute
``EPOCHS`` gradients of PPO on these trials, ``shard_size`` trials at a time (16,384 trials together exceed every cache
and take gigabytes).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metadist.algorithms.rl2 import RL2
from metadist.benchmarks.timing import compare, interleaved
from metadist.config.build import build
from metadist.core.errors import ConfigError, MetadistError
from metadist.core.random import TaskKey
from metadist.core.state import Records
from metadist.learners import TrialLearner, of_trials
from metadist.rl.algorithm import TrialContext
from metadist.rl.environment import Discrete
from metadist.rl.policy import Policy, Seen
from metadist.rl.trial import EPISODE_END, TERMINATED, TRIAL_END, VALID, Trials, rollout

OURS, PLAIN = "metadist", "gymnasium vector"
EPOCHS, BLOCK = 4, 1
#: The number of environments of the plain contestant; its rate does not depend on the number.
PLAIN_COUNT = 256
CASES = {"bandit": {"name": "bandit"}, "MDP": {"name": "tabular_mdp"}, "gridworld": {"name": "gridworld"}}


class OtherRewardsError(MetadistError):
    """The contestants' environments give different rewards, so their times can't be compared."""


def run(
    *,
    environments: list[int],
    hidden: int = 64,
    shard_size: int = 1024,
    rounds: int = 3,
    threads: int = 1,
    device: str = "cpu",
) -> dict[str, Any]:
    """Measure a case per number of simultaneous ``environments``, with ``rounds`` turns per contestant."""
    try:
        import gymnasium
    except ModuleNotFoundError as error:
        raise ConfigError("bench rl2: gymnasium is not installed; pip install 'metadist[rl]'") from error
    torch.set_num_threads(threads)
    cases = {}
    for title, environment in CASES.items():
        learner = _learner(environment, hidden, device)
        _prove_same(learner)
        for count in environments:
            cases[f"{title}, {count} environments: stepping alone"] = _stepping(learner, count, rounds)
            cases[f"{title}, {count} environments: end to end"] = _end_to_end(learner, count, shard_size, rounds)
    settings = {
        "hidden": hidden,
        "epochs": EPOCHS,
        "shard_size": shard_size,
        "threads": threads,
        "device": device,
        "plain_environments": PLAIN_COUNT,
    }
    return {
        "settings": settings,
        "cases": cases,
        "versions": {"gymnasium": gymnasium.__version__, "torch": torch.__version__},
    }


def _learner(environment: dict[str, Any], hidden: int, device: str) -> TrialLearner:
    document = {
        "environment": environment,
        "model": {"name": "gru", "hidden": hidden},
        "algorithm": {"name": "rl2", "minibatches": 1},
    }
    learner = of_trials(build(document).learner)
    learner.prepare(torch.device(device))
    return learner


def _context(learner: TrialLearner, count: int) -> TrialContext:
    return TrialContext(learner.tasks, learner.model, TaskKey.of(0, "train", 0, range(count)).to(learner.device), 0)


def _theta(learner: TrialLearner) -> Any:
    return {n: p.map(lambda t: t.to(learner.device)) for n, p in learner.initial(0).theta(learner.slots).items()}


# Contestants ----------------------------------------------------------------------------------------------------------


def _stepping(learner: TrialLearner, count: int, rounds: int) -> dict[str, Any]:
    """Time the environments without a policy, with actions that were drawn before, in steps/s."""
    environment, keys = learner.tasks, _context(learner, count).keys
    assert isinstance(environment.actions, Discrete)
    tasks, steps = environment.sample(keys), environment.steps
    actions = keys.stream("bench").integers(environment.actions.count, steps)
    noise = keys.stream("environment").uniform(steps, max(1, environment.step_noise))
    starting = noise[:, 0, :0]

    def ours() -> None:
        state, observation = environment.reset(tasks, starting)
        for t in range(steps):
            step = environment.step(tasks, state, actions[:, t], noise[:, t])
            state, observation = step.state, step.observation
            if (t + 1) % environment.horizon == 0:
                state, observation = environment.reset(tasks, starting)
        _wait(learner.device)

    vector = _vector(learner, PLAIN_COUNT)
    given = actions[:, :].cpu().numpy()[:PLAIN_COUNT]
    given = np.concatenate([given] * -(-PLAIN_COUNT // len(given)))[:PLAIN_COUNT]

    def plain() -> None:
        vector.reset()
        for t in range(steps):
            vector.step(given[:, t])

    return _measured({OURS: (ours, count * steps), PLAIN: (plain, PLAIN_COUNT * steps)}, rounds)


def _end_to_end(learner: TrialLearner, count: int, shard_size: int, rounds: int) -> dict[str, Any]:
    """Time rollout and learning together, each environment step counted once, in steps/s."""
    algorithm, theta = learner.algorithm, _theta(learner)
    assert isinstance(algorithm, RL2)
    settings = {"mean": 0.0, "deviation": 1.0}

    def learn(trials: Records, context: TrialContext) -> None:
        for _ in range(EPOCHS):
            for start in range(0, trials.rows, shard_size):
                algorithm.gradient(theta, trials.part(slice(start, start + shard_size)), settings, context)
        _wait(learner.device)

    context, fewer = _context(learner, count), _context(learner, PLAIN_COUNT)
    vector = _vector(learner, PLAIN_COUNT)

    def ours() -> None:
        learn(algorithm.rollout(theta, context)[0], context)

    def plain() -> None:
        learn(plain_rollout(vector, learner, fewer.policy(theta), fewer.keys).records(), fewer)

    steps = learner.tasks.steps
    return _measured({OURS: (ours, count * steps), PLAIN: (plain, PLAIN_COUNT * steps)}, rounds)


def _measured(contestants: dict[str, tuple[Callable[[], None], int]], rounds: int) -> dict[str, Any]:
    seconds = interleaved({name: call for name, (call, _) in contestants.items()}, rounds=rounds, block=BLOCK)
    rates = {name: [contestants[name][1] / s for s in values] for name, values in seconds.items()}
    return {"unit": "steps/s", "contestants": compare(rates, PLAIN, block=BLOCK)}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


# The plain environments ---------------------------------------------------------------------------------------------


def _vector(learner: TrialLearner, count: int) -> Any:
    """Return a Gymnasium vector environment with the ``count`` trials that a batched rollout has."""
    import gymnasium

    from metadist.benchmarks.plain_environments import TWINS

    environment, keys = learner.tasks, TaskKey.of(0, "train", 0, range(count))
    tasks = {name: value.numpy() for name, value in environment.sample(keys).items()}
    noise = keys.stream("environment").uniform(environment.steps, max(1, environment.step_noise)).numpy()
    plain = TWINS[type(environment).__name__]

    def maker(i: int) -> Callable[[], Any]:
        return lambda: plain(environment, {name: value[i] for name, value in tasks.items()}, noise[i])

    mode = gymnasium.vector.AutoresetMode.DISABLED
    return gymnasium.vector.SyncVectorEnv([maker(i) for i in range(count)], autoreset_mode=mode)


@torch.no_grad()
def plain_rollout(vector: Any, learner: TrialLearner, policy: Policy, keys: TaskKey) -> Trials:
    """Do the same as ``rl.trial.rollout`` in a Gymnasium vector environment whose trials have a fixed length."""
    environment, device, distribution = learner.tasks, learner.device, policy.distribution
    steps, batch = environment.steps, len(keys.tasks)
    noise = keys.stream("action").uniform(steps, distribution.words)
    memory, seen = (
        torch.zeros(batch, policy.memory_size, device=device),
        Seen.nothing(batch, policy.actions.size, device),
    )
    observation = torch.from_numpy(vector.reset()[0]).to(device)
    columns: dict[str, list[Tensor]] = {
        n: [] for n in ("observation", "action", "log_probability", "value", "reward", "flags")
    }
    for t in range(steps):
        head, value, memory = policy.step(observation, seen, memory)
        action = distribution.sample(head, noise[:, t])
        following, paid, _, _, _ = vector.step(action.cpu().numpy())
        reward = torch.from_numpy(paid).float().to(device)
        ended = (t + 1) % environment.horizon == 0
        flags = VALID + EPISODE_END * ended + TRIAL_END * (t + 1 == steps)
        row = (
            observation,
            action,
            distribution.log_probability(head, action),
            value,
            reward,
            torch.full((batch,), flags, dtype=torch.uint8),
        )
        for name, column in zip(columns, row):
            columns[name].append(column)
        seen = Seen(
            distribution.features(action), reward.unsqueeze(-1), torch.full((batch, 1), float(ended), device=device)
        )
        observation = torch.from_numpy(following).to(device)
    stacked: dict[str, Any] = {n: torch.stack([c.to(device) for c in column], 1) for n, column in columns.items()}
    return Trials(**stacked, task=keys.tasks)


def _prove_same(learner: TrialLearner) -> None:
    """Raise OtherRewardsError unless both rollouts give the same trials under the same policy."""
    context = _context(learner, 32)
    keys, policy = context.keys, context.policy(_theta(learner))
    ours, plain = rollout(learner.tasks, policy, keys), plain_rollout(_vector(learner, 32), learner, policy, keys)
    ours = replace(ours, flags=ours.flags & ~TERMINATED)  # plain episodes end only by their length
    for name in ("action", "flags", "observation"):
        if not bool((getattr(ours, name) == getattr(plain, name)).all()):
            raise OtherRewardsError(f"bench rl2: {type(learner.tasks).__name__} and its plain twin differ in {name}")
    if not torch.allclose(ours.reward, plain.reward, atol=1e-5):
        raise OtherRewardsError(f"bench rl2: {type(learner.tasks).__name__} and its plain twin give different rewards")
