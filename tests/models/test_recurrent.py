"""Recurrent policies: single steps equal the whole sequence, and the inputs of the heads."""

import pytest
import torch

from metadist.core.errors import ConfigError
from metadist.models.recurrent import GRU, LSTM


def built(config, continuous=True):
    torch.manual_seed(0)
    return config.build_policy(3, 2, continuous)


@pytest.mark.parametrize("kind", [GRU, LSTM])
@pytest.mark.parametrize("heads", [(), (6, 5)])
def test_steps_one_by_one_are_the_whole_sequence(kind, heads):
    module, x = built(kind(hidden=4, heads=heads)), torch.randn(5, 7, 3 + 2 + 2)
    head, value, last = module(x, torch.zeros(5, module.memory_size))
    assert head.shape == (5, 7, 4) and value.shape == (5, 7) and last.shape == (5, module.memory_size)
    memory = torch.zeros(5, module.memory_size)
    for t in range(7):
        now, worth, memory = module(x[:, t : t + 1], memory)
        torch.testing.assert_close(now[:, 0], head[:, t])
        torch.testing.assert_close(worth[:, 0], value[:, t])
    torch.testing.assert_close(memory, last)


def test_networks_as_heads_see_the_features_and_the_memory():
    for heads, seen in (((), False), ((6,), True)):
        module, x = built(GRU(hidden=4, heads=heads)), torch.randn(5, 1, 3 + 2 + 2)
        with torch.no_grad():  # the memory stays 0 for every input
            for parameter in module.core.parameters():
                parameter.zero_()
        head, value, memory = module(x, torch.zeros(5, 4))
        assert not memory.any()
        assert (value.std() > 0, head[..., :2].std() > 0) == (seen, seen)


@pytest.mark.parametrize("heads", [(), (6,)])
def test_a_policy_begins_near_zero_with_the_deviation_asked_for(heads):
    module = built(GRU(hidden=4, heads=heads, log_std=-0.5))
    head, _, _ = module(torch.randn(5, 7, 3 + 2 + 2), torch.zeros(5, 4))
    assert head[..., :2].abs().max() < 0.05 and head[..., 2:].eq(-0.5).all()
    assert built(GRU(hidden=4, heads=heads), continuous=False).log_std is None


def test_bad_settings():
    with pytest.raises(ConfigError, match=r"model\.heads: \[4, 0\]: every width must be at least 1"):
        GRU(heads=(4, 0))
    with pytest.raises(ConfigError, match=r"model\.hidden: 0 is below 1"):
        LSTM(hidden=0)
