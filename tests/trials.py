"""Toy doubles of meta-reinforcement learning: an environment whose episodes end by chance, and a meta-step without a
runtime.
"""

from __future__ import annotations

import torch

from metadist.core.model import Model
from metadist.core.outer import OuterLoop
from metadist.core.parameters import Parameters
from metadist.core.random import TaskKey
from metadist.core.round import EvaluationRequest, MetaStepKey
from metadist.learners.trials import TrialLearner
from metadist.rl.algorithm import TrialContext
from metadist.rl.environment import Continuous
from metadist.testing.running import Done, compute_round, meta_step
from metadist.testing.toys import Chance as Chance


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
    return compute_round(learner, round, kept, {})


def train(learner, meta_steps, *, seed=0, state=None, watch=lambda *_: None):
    """(state, report of the last meta-step); ``watch(round, state, total)`` sees every round."""
    done = Done(learner.initial(seed) if state is None else state)
    for number in range(meta_steps):
        done = meta_step(learner, done.state, number, seed, watch)
    return done.state, done.report


def evaluate(learner, state, tasks, *, inner_steps=None, split="test"):
    request = EvaluationRequest(MetaStepKey("run", 0, 0), split, tasks, inner_steps)
    round = learner.evaluation(request, state)
    return run(learner, round, {}).columns
