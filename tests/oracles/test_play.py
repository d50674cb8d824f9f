"""Test the rules that all methods share, and the methods with a known goal."""

import math

import pytest
import torch

from metadist.core.errors import ConfigError
from metadist.core.model import Model
from metadist.core.random import TaskKey
from metadist.environments import ENVIRONMENTS, Bandit, CorrelatedBandit, Gridworld, Navigation, TabularMDP
from metadist.environments.simulated import SimulatedEnvironment
from metadist.models.recurrent import GRU
from metadist.oracles import ORACLES, compare, methods, play, possible, row, score
from metadist.oracles.play import Agent, play_with
from metadist.oracles.posterior import beta, dirichlet, standard_gamma
from metadist.rl.environment import Discrete, MetaEnvironment
from metadist.rl.policy import Policy
from metadist.rl.trial import rollout

SMALL = {
    "bandit": Bandit(arms=3, episodes=6),
    "correlated_bandit": CorrelatedBandit(episodes=8),
    "tabular_mdp": TabularMDP(states=4, actions_each=2, horizon=3, episodes=3),
    "gridworld": Gridworld(),
    "navigation": Navigation(horizon=20),
}


@pytest.mark.parametrize("name", SMALL)
def test_a_policy_and_a_method_meet_the_same_luck(name):
    """A method that replays the actions of a policy has the same returns."""
    environment, keys = SMALL[name], TaskKey.of(4, "test", 0, range(40))
    model = Model(
        lambda: GRU(hidden=8).build_policy(
            environment.observation_size, environment.actions.size, not isinstance(environment.actions, Discrete)
        )
    )
    learned, _, _ = model.initial(0)
    trials = rollout(environment, Policy(model.bind({}, None, False), learned, environment.actions), keys)

    class Replay(Agent):
        def act(self, t, state):
            return trials.action[:, t]

    replayed = play_with(environment, Replay, keys)
    assert torch.equal(replayed, trials.by_episode(environment.episodes))
    assert replayed.shape == (40, environment.episodes) and replayed.std() > 0


@pytest.mark.lane("numerics")
@pytest.mark.parametrize(
    ("name", "method"), [(n, m) for n, environment in SMALL.items() for m in possible(environment)]
)
def test_a_method_does_the_same_in_any_batch(name, method):
    whole = play(SMALL[name], method, TaskKey.of(1, "test", 0, range(30)))
    for part in (range(7, 12), [29], [20, 3]):
        assert torch.equal(play(SMALL[name], method, TaskKey.of(1, "test", 0, list(part))), whole[list(part)])
    assert not torch.equal(play(SMALL[name], method, TaskKey.of(1, "validation", 0, range(30))), whole)


def test_every_native_environment_has_an_oracle_and_random():
    for cls in [c for c in ENVIRONMENTS.values() if not issubclass(c, SimulatedEnvironment)]:
        assert "random" in ORACLES[cls] and next(iter(ORACLES[cls])) != "random"


def test_gamma_draws_are_gamma():
    """Draws pass Kolmogorov–Smirnov against the incomplete gamma function, for shapes of both sampling methods."""
    count = 20_000
    for shape in (1.0, 2.0, 3.5, 40.0):
        stream = TaskKey.of(0, "test", 0, range(count)).stream(f"gamma {shape}")
        drawn = standard_gamma(stream, torch.full((count, 2), shape)).double()
        for column in drawn.T:
            reached = torch.special.gammainc(torch.tensor(shape, dtype=torch.float64), column.sort().values)
            assert (reached - (torch.arange(count) + 0.5) / count).abs().max() < 1.95 / math.sqrt(count)
        assert abs(torch.corrcoef(drawn.T)[0, 1]) < 4 / math.sqrt(count)


def test_beta_and_dirichlet_have_their_means_and_variances():
    count = 20_000
    stream = TaskKey.of(0, "test", 0, range(count)).stream("draws")
    a, b = torch.tensor([1.0, 3.0, 8.0]).expand(count, 3), torch.tensor([1.0, 2.0, 1.0]).expand(count, 3)
    p = beta(stream, a, b)
    mean = (a / (a + b))[0].double()
    variance = mean * (1 - mean) / (a + b + 1)[0]
    assert ((p.mean(0) - mean).abs() < 4 * (variance / count).sqrt()).all()
    assert (p.var(0) / variance - 1).abs().max() < 0.06
    concentration = torch.tensor([[1.0, 4.0, 2.0], [1.0, 1.0, 1.0]]).expand(count, 2, 3)
    rows = dirichlet(stream, concentration)
    assert (rows.sum(-1) - 1).abs().max() < 1e-12
    mean = (concentration / concentration.sum(-1, keepdim=True))[0].double()
    assert (rows.mean(0) - mean).abs().max() < 4 * 0.5 / math.sqrt(count)


def test_the_known_goal_s_return_follows_from_its_distance():
    environment, keys = Gridworld(), TaskKey.of(0, "test", 0, range(5000))
    goal = environment.sample(keys)["goal"]
    steps = (goal % 5 + goal // 5).double()
    returns = play(environment, "known_goal", keys)
    assert torch.allclose(returns, (16 - steps - 0.1 * (steps - 1)).unsqueeze(1).expand(-1, 4), atol=1e-5)
    cells = [x + y for x in range(5) for y in range(5) if max(x, y) > 1]
    assert sum(16 - d - 0.1 * (d - 1) for d in cells) / 21 == pytest.approx(11.07, abs=0.005)
    totals = returns.sum(1)
    assert abs(totals.mean() - 4 * 11.0714) < 3 * totals.std() / math.sqrt(5000)


def test_the_known_point_is_reached_as_fast_as_can_be():
    environment, keys = Navigation(), TaskKey.of(0, "test", 0, range(300))
    expected = []
    for goal in environment.sample(keys)["goal"].tolist():
        x, y, total = 0.0, 0.0, 0.0
        while max(abs(goal[0] - x), abs(goal[1] - y)) >= 0.01:
            x += min(max(goal[0] - x, -0.1), 0.1)
            y += min(max(goal[1] - y, -0.1), 0.1)
            total -= math.dist((x, y), goal)
        expected.append(total)
    returns = play(environment, "known_goal", keys)
    assert torch.allclose(returns[:, 0], torch.tensor(expected, dtype=torch.float64), atol=1e-4) and torch.equal(
        returns[:, 0], returns[:, 1]
    )
    assert play(environment, "random", keys).mean() < -30


def test_the_table():
    environment = Gridworld()
    keys = TaskKey.of(5, "validation", 0, range(100))
    known, random = (play(environment, name, keys) for name in ("known_goal", "random"))
    rows = compare(environment, ["random", "known_goal"], trials=100, seed=5, split="validation", batch=33)
    assert rows == [row("random", random, known, random), row("known_goal", known, known, random)]
    first, second = rows
    assert (first.percent, second.percent, second.difference, second.difference_error) == (0, 100, 0, 0)
    difference = random.sum(1) - known.sum(1)
    assert first.difference == pytest.approx(float(difference.mean())) and first.difference_error == pytest.approx(
        float(difference.std()) / 10
    )
    assert first.error == pytest.approx(float(random.sum(1).std()) / 10) and sum(first.by_episode) == pytest.approx(
        first.mean
    )
    assert score(3.0, 5.0, 1.0) == 50


def test_wrong_arguments_are_named():
    with pytest.raises(ConfigError, match="oracle: 'gitins' is not one of optimal.*did you mean 'gittins'"):
        compare(Bandit(), ["gitins"], trials=10)
    with pytest.raises(ConfigError, match="trials: 1 is below 2"):
        compare(Bandit(), trials=1)
    with pytest.raises(ConfigError, match="split: 'tests' is not one of train"):
        compare(Bandit(), trials=2, split="tests")
    with pytest.raises(ConfigError, match=r"no oracles for 'MetaEnvironment'; expected one of Bandit"):
        methods(MetaEnvironment())
