"""Toy doubles: task families without data, a module with everything in it, and how a test makes a FewShotLearner of
them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from metadist.core.model import Model
from metadist.core.outer import OuterLoop
from metadist.core.parameters import Parameters
from metadist.core.random import TaskKey
from metadist.core.round import MetaStepKey, run_rounds
from metadist.core.state import State, TreeSum
from metadist.core.task import Examples, Task, TaskFamily
from metadist.learners.few_shot import FewShotLearner
from metadist.testing.toys import Blobs as Blobs
from metadist.testing.toys import Curves as Curves


@dataclass(frozen=True)
class Ragged(TaskFamily):
    """``family`` with task i cut to so many support and query rows that tasks differ: padded and masked by
    ``stack``.
    """

    family: TaskFamily = Curves()

    def __post_init__(self):
        for name in ("kind", "metric_name", "higher_is_better", "input_shape", "outputs", "loss", "metric"):
            object.__setattr__(self, name, getattr(self.family, name))

    def ways(self, split):
        return self.family.ways(split)

    def sample_task(self, key, split):
        task = self.family.sample_task(key, split)

        def cut(e, rows):
            return Examples(e.x[:rows], e.y[:rows])

        index, support, query = int(key.tasks), len(task.support.x), len(task.query.x)
        return Task(cut(task.support, support - index % 3), cut(task.query, query - (index + 1) % 2))


class Everything(nn.Module):
    """A user's module: batch norm, layer norm, weights tied across layers, buffers of two dtypes, a scalar
    parameter, dropout.
    """

    def __init__(self, channels=1, outputs=3, size=6):
        super().__init__()
        self.stem = nn.Conv2d(channels, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4, track_running_stats=False)
        self.drop_channels = nn.Dropout2d(0.25)
        self.first = nn.Conv2d(4, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.second.weight = self.first.weight
        self.layer_norm = nn.LayerNorm(4)
        self.drop = nn.Dropout(0.5)
        self.temperature = nn.Parameter(torch.tensor(1.5))
        self.head = nn.Linear(4, outputs)
        self.register_buffer("offset", torch.linspace(-1, 1, 4))
        self.register_buffer("order", torch.tensor([2, 0, 3, 1]))

    def forward(self, x):
        x = self.drop_channels(torch.tanh(self.norm(self.stem(x))))
        x = self.second(torch.tanh(self.first(x)))
        x = self.layer_norm(x.mean((2, 3)) + self.offset)[:, self.order]
        return self.head(self.drop(x)) * self.temperature


class WithoutDropout(Everything):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.drop_channels, self.drop = nn.Identity(), nn.Identity()


def learner(algorithm, factory, tasks, *, dtype=torch.float64, freeze=(), outer=None, **options) -> FewShotLearner:
    return FewShotLearner(algorithm, Model(factory, dtype=dtype, freeze=freeze), tasks, outer or OuterLoop(), **options)


def keys(*tasks, seed=7, split="train", meta_step=3):
    return TaskKey.of(seed, split, meta_step, list(tasks))


def somewhere(learner, seed=1) -> dict[str, Parameters]:
    """θ in general position: the initial one, with every learned value moved a little."""
    generator, theta = torch.Generator().manual_seed(seed), learner.initial(seed).theta(learner.slots)

    def moved(p):
        return p + 0.1 * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)

    return {n: p.map(moved) if learner.slots[n].rule == "gradient" else p for n, p in theta.items()}


def train(learner, meta_steps, *, seed=0, reports=None) -> State:
    """The outer loop without a runtime: every round's shards one after the other.

    ``reports`` receives each meta-step's.
    """
    state = learner.initial(seed)

    def run(round):
        total = TreeSum(len(round.shards))
        for shard in round.shards:
            total.add(shard.index, learner.compute(shard, round.parameters.slots))
        return total.result()

    for meta_step in range(meta_steps):
        state, report = run_rounds(learner.meta_step(MetaStepKey("run", meta_step, seed), state), run)
        if reports is not None:
            reports.append(report)
    return state


def relative_error(a, b):
    return float((a - b).norm() / b.norm())
