"""A meta-environment and a learner for workers in other processes, and how a test tells them what to do."""

from __future__ import annotations

import functools
import os
import signal
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from metadist.algorithms.rl2 import RL2
from metadist.core.computation import Computation
from metadist.core.model import Model
from metadist.core.outer import OuterLoop
from metadist.core.round import Round, WithOutput
from metadist.core.state import Contribution, Records
from metadist.learners.trials import TrialLearner
from metadist.models.recurrent import GRU
from metadist.rl.environment import Discrete, MetaEnvironment, Step

SEED = 11


@dataclass(frozen=True, kw_only=True)
class Pulls(MetaEnvironment):
    """Two arms that pay with probability p and 1 − p. A training shard with task ``task`` of the file ``folder``/deed
    ("deed task") does that deed at its second step."""

    episodes: int = 4
    horizon: int = 1
    step_noise: int = 1
    folder: str = ""

    observation_size = 1
    actions = Discrete(2)

    def sample(self, keys):
        p = keys.stream("p").uniform(1).squeeze(1)
        return {"p": p, "index": keys.tasks if keys.split == "train" else torch.full_like(keys.tasks, -1)}

    def reset(self, tasks, noise):
        seen = torch.zeros(len(tasks["p"]), 1)
        return seen, seen

    def step(self, tasks, state, action, noise):
        mean = torch.where(action == 0, tasks["p"], 1 - tasks["p"])
        reward = (noise.squeeze(1) < mean).float()
        return Step(state + 1, state, self.deed(tasks, state, reward), torch.ones(len(mean), dtype=torch.bool))

    def restart(self, tasks, state, observation, ended, noise):
        return state, observation

    def deed(self, tasks, state, reward):
        file = Path(self.folder) / "deed"
        if not self.folder or not file.exists() or not bool((state == 1).all()):
            return reward
        deed, index = file.read_text().split()
        mine = tasks["index"] == int(index)
        if not bool(mine.any()):
            return reward
        if deed == "raise":
            raise ValueError(f"the arm of task {index} is stuck")
        if deed == "once":
            file.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        if deed == "hang":
            file.unlink()
            time.sleep(3600)
        return torch.where(mine, float("nan"), reward) if deed == "nan" else reward


@dataclass(frozen=True)
class Clumsy(RL2):
    """Its gradient of task ``of`` raises."""

    of: int = -1

    def gradient(self, theta, trials, *arguments):
        if self.of in trials.columns["task"].tolist():
            raise ValueError("no way back")
        return super().gradient(theta, trials, *arguments)


@dataclass(frozen=True)
class Halve(Computation):
    """Halve the rewards of trials."""

    name = "halve"


class Relay(TrialLearner):
    """Between rollouts and gradients a round that needs outputs and keeps some: every reward is halved by it."""

    def meta_step(self, key, state):
        rounds = super().meta_step(key, state)
        rolled = next(rounds)
        total = yield rolled
        halved = [replace(s, round=99, computation=Halve(), needs=(s.key,)) for s in rolled.shards]
        yield Round(99, state, halved)
        try:
            while True:
                round = rounds.send(total)
                needing = [replace(s, needs=tuple((m, 99, i) for m, _, i in s.needs)) for s in round.shards]
                total = yield replace(round, shards=needing)
        except StopIteration as done:
            return done.value

    def compute(self, shard, theta, inputs=()):
        if not isinstance(shard.computation, Halve):
            return super().compute(shard, theta, inputs)
        columns = dict(inputs[0].columns)
        return WithOutput(
            Contribution({}, float(shard.count), shard.count, {}), Records({**columns, "reward": columns["reward"] / 2})
        )


def learner(folder="", role="learner", algorithm=None, kind=TrialLearner):
    """Twelve trials of four pulls in six shards; two epochs of two minibatches."""
    environment = Pulls(folder=str(folder))
    model = Model(functools.partial(GRU(hidden=8).build_policy, 1, 2, False))
    outer = OuterLoop(lr=0.01, meta_batch_size=12, shard_size=2, meta_steps=100)
    return kind(algorithm or RL2(epochs=2, minibatches=2), model, environment, outer, rollout_role=role)
