"""Compare gridworld and navigation with their rules, written out."""

import math

import pytest
import torch

from metadist.core.random import SPLITS, TaskKey
from metadist.environments import Gridworld, Navigation


def test_a_walk_by_the_rules():
    environment = Gridworld()
    keys = TaskKey.of(0, "train", 0, range(200))
    tasks = environment.sample(keys)
    moves = keys.stream("moves").integers(5, 30)
    cell, observation = environment.reset(tasks, torch.empty(200, 0))
    assert torch.equal(observation, torch.eye(25)[torch.zeros(200, dtype=torch.int64)])
    here = [(0, 0)] * 200
    for t in range(30):
        step = environment.step(tasks, cell, moves[:, t], torch.empty(200, 0))
        cell = step.state
        for i, (x, y) in enumerate(here):
            dx, dy = {0: (0, 0), 1: (0, 1), 2: (1, 0), 3: (0, -1), 4: (-1, 0)}[int(moves[i, t])]
            x, y = min(max(x + dx, 0), 4), min(max(y + dy, 0), 4)
            here[i] = (x, y)
            assert step.observation[i].nonzero().flatten().tolist() == [5 * y + x]
            assert step.reward[i] == torch.tensor(1.0 if 5 * y + x == int(tasks["goal"][i]) else -0.1)
        assert not step.terminated.any()


def test_goals_are_uniform_over_21_cells():
    goal = Gridworld().sample(TaskKey.of(0, "test", 0, range(21_000)))["goal"]
    counts = torch.bincount(goal, minlength=25).double()
    near_start = [0, 1, 5, 6]
    assert counts[near_start].sum() == 0 and (counts > 0).sum() == 21
    assert (counts[counts > 0] - 1000).square().sum() / 1000 < 45.3  # χ² with 20 degrees of freedom: 1 in 1,000


def test_held_out_goals_are_of_one_split_only():
    environment = Gridworld(held_out_goals=4)
    goals = {s: set(environment.sample(TaskKey.of(1, s, 0, range(2000)))["goal"].tolist()) for s in SPLITS}
    assert [len(goals[s]) for s in ("train", "validation", "test")] == [13, 4, 4]
    assert len(set.union(*goals.values())) == 21
    assert goals["test"] == set(
        environment.sample(TaskKey.of(2, "test", 9, range(2000)))["goal"].tolist()
    )  # in every run


@pytest.mark.parametrize("reward", ["distance", "squared"])
def test_a_point_moves_by_its_velocity(reward):
    environment = Navigation(reward=reward)
    tasks = {"goal": torch.tensor([[0.3, -0.2], [0.3, -0.2], [0.05, 0.1]])}
    position, _ = environment.reset(tasks, torch.empty(3, 0))
    assert torch.equal(position, torch.zeros(3, 2))
    step = environment.step(tasks, position, torch.tensor([[0.5, -9.0], [-1.0, 0.25], [0.55, 0.95]]), torch.empty(3, 0))
    expected = [(0.05, -0.1), (-0.1, 0.025), (0.055, 0.095)]  # an action is in units of .1, and clipped
    assert torch.allclose(step.observation, torch.tensor(expected))
    for i, at in enumerate(expected):
        distance = math.dist(at, tasks["goal"][i].tolist())
        assert float(step.reward[i]) == pytest.approx(-(distance**2) if reward == "squared" else -distance, abs=1e-6)
    assert step.terminated.tolist() == [False, False, True]


def test_navigation_goals_fill_the_square():
    goal = Navigation().sample(TaskKey.of(0, "train", 0, range(20_000)))["goal"].double()
    assert goal.min() >= -0.5 and goal.max() < 0.5 and goal.min() < -0.499 and goal.max() > 0.499
    assert goal.mean(0).abs().max() < 4 / math.sqrt(12 * 20_000)
    assert (goal.std(0) - 12**-0.5).abs().max() < 0.01
