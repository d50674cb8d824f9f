"""Observations and actions at the borders of their spaces: other types, rounding, several choices."""

import numpy as np
import pytest
import torch

pytest.importorskip("gymnasium", reason="needs gymnasium: pip install 'metadist[rl]'")

import gymnasium
import own_environments as own
from test_simulators import KEYS, environment, played, subject

from metadist.core.errors import ConfigError
from metadist.environments.simulated import EnvironmentFault
from metadist.environments.spaces import Spaces
from metadist.rl.environment import Discrete
from metadist.rl.trial import VALID


def test_parts_of_an_observation_may_have_other_types_and_exceed_bounds_by_rounding():
    """They are those of Gymnasium's flatten, but for the rounding; a Box that is the whole observation has no check."""
    found = environment("Parts", horizon=3)
    trials = played(found, KEYS)
    expected = [0, 1, 0, -1e-9, 1.0 + 1e-7, 0, 1, 0, 1, 0, 0, 1]
    assert found.observation_size == len(expected)
    torch.testing.assert_close(trials.observation, torch.tensor(expected).expand(12, 6, -1), rtol=0, atol=1e-9)
    space = own.Parts.observation_space
    valid = {"cell": 2, "level": np.array([0.25, 1], np.float32), "more": (np.array([0, 1]), np.array([1, 2]))}
    assert valid in space
    expected = gymnasium.spaces.utils.flatten(space, valid)
    assert np.array_equal(Spaces("own", space, own.Choices.action_space).observed(valid), expected)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"level": None}, "has the parts cell, more; expected cell, level, more"),
        ({"level": np.zeros(3)}, r"the observation's part 'level' has shape \[3\]; expected \[2\]"),
        ({"level": ["a", "b"]}, "part 'level' is of type <U1; expected numbers"),
        ({"cell": 0}, r"part 'cell' is 0; expected a value of Discrete\(3, start=1\)"),
        ({"cell": 1.5}, r"part 'cell' is 1.5; expected a value of Discrete"),
        ({"cell": np.nan}, r"part 'cell' is nan; expected a value of Discrete"),
        ({"more": ([0, 2], [1, 2])}, r"part 'more''s part 0 is \[0 2\]; expected a value of MultiBinary"),
        ({"more": ([0, 1],)}, r"part 'more' is \(\[0, 1\],\); expected a tuple of 2 parts"),
        ({"more": 3}, r"part 'more' is 3; expected a tuple of 2 parts"),
    ],
    ids=str,
)
def test_other_parts_of_an_observation_are_named(wrong, message):
    with pytest.raises(EnvironmentFault, match=message) as caught:
        played(environment("Parts", arguments=wrong), KEYS)
    assert "\n" not in str(caught.value)


BOXES = {
    "rounding": ([-1.4, -1.4], [0.8, 0.8], "float32"),  # low + (high − low) > high in float32
    "float64": ([-0.1, 0.1], [0.1, 0.7], "float64"),  # float32(0.1) > 0.1
    "float16": ([-0.1, 0.1], [0.1, 0.7], "float16"),
    "almost symmetric": ([-1 + 1e-12] * 2, [1 - 1e-12] * 2, "float64"),
    "symmetric": ([-1.0] * 2, [1.0] * 2, "float32"),
    "unbounded": ([-np.inf] * 2, [np.inf] * 2, "float64"),
    "float16 without bounds": ([-np.inf] * 2, [np.inf] * 2, "float16"),
    "a scalar": (-0.7, 0.3, "float32"),
}


@pytest.mark.parametrize("case", BOXES)
def test_actions_are_in_their_box(case):
    """Also where scaling or the conversion to float32 rounds beyond a bound."""
    low, high, dtype = BOXES[case]
    arguments = {"low": low, "high": high, "dtype": dtype}
    found = environment("Strict", arguments=arguments, horizon=40)
    made = subject(found)
    extreme = torch.tensor([-9.0, -1.0, -1.0 + 2**-24, 0.0, 0.3, 1.0 - 2**-24, 1.0, 9.0])
    actions = extreme.reshape(-1, 1).expand(-1, made.tasks.actions.size).numpy()
    space = own.Strict(**arguments).action_space
    assert all(np.asarray(a) in space for a in found.spaces.taken(actions))
    assert played(found, KEYS).flag(VALID).all()


def test_scaled_actions_keep_their_bits_within_the_bounds():
    spaces = Spaces("own", gymnasium.spaces.Box(0, 1, (1,)), gymnasium.spaces.Box(-2.0, 4.0, (1,), np.float32))
    actions = np.random.default_rng(0).uniform(-1.2, 1.2, (10_000, 1)).astype(np.float32)
    clipped = np.clip(actions, -1.0, 1.0)
    expected = np.float32(-2) + (clipped + np.float32(1)) * np.float32(0.5) * np.float32(6)
    assert np.array_equal(spaces.taken(actions), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"low": [-1.0, -np.inf], "high": [1.0, 1.0]}, "is bounded in part"),
        ({"low": [-1.0, -1.0], "high": [1.0, np.inf]}, "is bounded in part"),
        ({"low": [-1, -1], "high": [1, 1], "dtype": "int64"}, r"has dtype int64; expected floats \(for integers"),
        ({"low": [-3e38], "high": [3e38]}, "wider than float32 can express; use -inf and inf"),
    ],
    ids=str,
)
def test_boxes_that_no_policy_fills_are_refused_in_one_line(arguments, message):
    with pytest.raises(
        ConfigError, match=rf"environment own_environments:Strict: action space Box.*{message}"
    ) as caught:
        _ = environment("Strict", arguments=arguments).actions
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("space", "rewards"),
    [
        ("discrete", {4.0, 14.0, 24.0, 5.0, 15.0, 25.0}),
        ("binary", {float(a + 10 * b + 100 * c) for a in (0, 1) for b in (0, 1) for c in (0, 1)}),
    ],
)
def test_an_action_of_several_choices_is_one_of_their_combinations(space, rewards):
    found = environment("Several", arguments={"space": space}, horizon=40)
    assert found.actions == Discrete(len(rewards))
    trials = played(found, KEYS)
    assert set(trials.reward.unique().tolist()) == rewards
    pairs = torch.stack([trials.action.float(), trials.reward], -1).flatten(0, 1).unique(dim=0)
    assert len(pairs) == len(rewards)  # one reward for each action


def test_too_many_combinations_are_refused():
    with pytest.raises(ConfigError, match="has 1000000 combinations; expected 1024 or less"):
        _ = environment("Several", arguments={"space": "many"}).actions
