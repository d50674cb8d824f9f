"""Toy doubles of meta-reinforcement learning: an environment whose episodes end by chance, and a meta-step without a
runtime.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from metadist.core.model import Model
from metadist.core.outer import OuterLoop
from metadist.core.parameters import Parameters
from metadist.core.random import TaskKey
from metadist.core.round import EvaluationRequest, MetaStepKey, WithOutput, run_rounds
from metadist.core.state import Records, TreeSum
from metadist.learners.trials import TrialLearner
from metadist.rl.algorithm import TrialContext
from metadist.rl.environment import Continuous, Discrete, MetaEnvironment, Step


@dataclass(frozen=True)
class Chance(MetaEnvironment):
    """Observations are noise, an action pays its product with the task's number, and an episode ends with
    probability ``end``.
    """

    episodes: int = 3
    horizon: int = 4
    end: float = 0.3
    count: int = 3
    continuous: bool = False

    reset_noise = 2
    step_noise = 4
    observation_size = 2

    @property
    def actions(self):
        return Continuous(2) if self.continuous else Discrete(self.count)

    def sample(self, keys):
        return {"number": keys.stream("number").uniform(1, low=-1.0, high=1.0).squeeze(-1)}

    def reset(self, tasks, noise):
        return noise, noise

    def step(self, tasks, state, action, noise):
        action = action.sum(-1) if self.continuous else action
        observation = noise[:, 2:] - 0.5
        return Step(observation, observation, tasks["number"] * action + noise[:, 1], noise[:, 0] < self.end)


def learner(algorithm, model, environment, *, dtype=torch.float32, batch=16, shard=4, lr=1e-2, **outer) -> TrialLearner:
    def build():
        return model.build_policy(
            environment.observation_size, environment.actions.size, isinstance(environment.actions, Continuous)
        )

    loop = OuterLoop(meta_batch_size=batch, shard_size=shard, lr=lr, **outer)
    found = TrialLearner(algorithm, Model(build, dtype=dtype), environment, loop)
    found.prepare(torch.device("cpu"))
    return found


def context(learner, tasks=4, *, seed=0, split="train", meta_step=0) -> TrialContext:
    return TrialContext(learner.tasks, learner.model, TaskKey.of(seed, split, meta_step, range(tasks)), meta_step)


def somewhere(learner, scale=0.3, seed=1) -> dict[str, Parameters]:
    """θ in general position: the initial one, with every learned value moved."""
    generator, theta = torch.Generator().manual_seed(seed), learner.initial(seed).theta(learner.slots)
    moved = theta["model"].map(
        lambda p: p + scale * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
    )
    return {**theta, "model": moved}


def run(learner, round, kept):
    """A round's shards one after the other; what they keep goes to ``kept``."""
    total, records = TreeSum(len(round.shards)), []
    for shard in round.shards:
        result = learner.compute(shard, round.parameters.slots, [kept[key] for key in shard.needs])
        if isinstance(result, WithOutput):
            kept[shard.key] = result.output
            result = result.result
        if round.reduce:
            total.add(shard.index, result)
        else:
            records.append(result)
    return total.result() if round.reduce else Records.concatenate(records)


def train(learner, meta_steps, *, seed=0, state=None, watch=lambda *_: None):
    """(state, report of the last meta-step); ``watch(round, total)`` sees every round."""
    state, report = learner.initial(seed) if state is None else state, {}
    for meta_step in range(meta_steps):
        kept = {}

        def each(round, kept=kept):
            total = run(learner, round, kept)
            watch(round, total)
            return total

        state, report = run_rounds(learner.meta_step(MetaStepKey("run", meta_step, seed), state), each)
    return state, report


def evaluate(learner, state, tasks, *, inner_steps=None, split="test"):
    request = EvaluationRequest(MetaStepKey("run", 0, 0), split, tasks, inner_steps)
    round = learner.evaluation(request, state)
    return run(learner, round, {}).columns
