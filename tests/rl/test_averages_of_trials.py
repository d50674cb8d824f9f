"""Averages and optimisers of the outer loop in meta-reinforcement learning, whose meta-steps make several updates."""

import pytest
import torch
import trials

from metadist.algorithms import RL2
from metadist.core.errors import ConfigError
from metadist.models import GRU


def learner(method="ppo", **outer):
    algorithm = RL2(epochs=2, minibatches=2) if method == "ppo" else RL2(optimizer="trpo")
    return trials.learner(algorithm, GRU(hidden=4), trials.Chance(), **outer)


@pytest.mark.parametrize("options", [{"ema": 0.5}, {"tail": 0.5, "meta_steps": 2}, {"optimizer": "schedule_free"}])
def test_every_update_of_a_meta_step_counts_in_the_average(options):
    subject, seen = learner(**options), []
    state, report = trials.train(subject, 2, watch=lambda round, *_: seen.append(round.parameters.slots["model"]))
    assert report["updates"] == 4.0 and state.weights == "averaged"
    values = [*seen[2:6], *seen[7:], state.slots["model"]]  # θ after each of the 8 updates
    expected = {"ema": values[0], "tail": torch.stack(values[-4:]).mean(0)}
    for value in values[1:]:
        expected["ema"] = 0.5 * expected["ema"] + 0.5 * value
    for name in options.keys() & expected.keys():
        torch.testing.assert_close(state.judged().slots["model"], expected[name])
    assert not state.judged().slots["model"].equal(state.slots["model"])


def test_averages_that_would_miss_the_policy_are_refused():
    for options in ({"ema": 0.5}, {"tail": 0.5}, {"optimizer": "schedule_free"}):
        with pytest.raises(ConfigError, match="does not average the policy, which optimizer: trpo moves itself"):
            learner("trpo", **options)
