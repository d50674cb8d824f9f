"""The causal transformer: single steps equal the whole sequence, and no step attends beyond the window."""

from __future__ import annotations

import pytest
import torch

from metadist.core.errors import ConfigError
from metadist.models.causal_transformer import CausalTransformer


def policy(window, continuous=False, seed=0):
    torch.manual_seed(seed)
    module = CausalTransformer(width=16, depth=2, heads=4, window=window).build_policy(3, 2, continuous)
    for parameter in module.parameters():  # biases and distances in general position, too
        torch.nn.init.normal_(parameter, std=0.3)
    return module


def features(length, batch=5):
    return torch.randn(batch, length, 3 + 2 + 2, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("continuous", [False, True])
@pytest.mark.parametrize(("window", "length"), [(1, 6), (4, 3), (4, 4), (4, 25), (30, 25)])
def test_steps_one_by_one_are_the_whole_sequence(window, length, continuous):
    module, x = policy(window, continuous), features(length)
    with torch.no_grad():
        head, value, last = module(x, torch.zeros(5, module.memory_size))
        memory, heads, values = torch.zeros(5, module.memory_size), [], []
        for t in range(length):
            h, v, memory = module(x[:, t : t + 1], memory)
            heads.append(h), values.append(v)
    assert head.shape == (5, length, 4 if continuous else 2)
    torch.testing.assert_close(torch.cat(heads, 1), head, rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.cat(values, 1), value, rtol=0, atol=1e-5)
    torch.testing.assert_close(memory, last, rtol=0, atol=1e-5)


def test_windows_with_the_memory_carried_on_are_the_whole_sequence():
    module, x = policy(6), features(20)
    memory, heads = torch.zeros(5, module.memory_size), []
    for start in range(0, 20, 7):
        head, _, memory = module(x[:, start : start + 7], memory)
        heads.append(head)
    torch.testing.assert_close(torch.cat(heads, 1), module(x, torch.zeros(5, module.memory_size))[0], rtol=0, atol=1e-5)


def test_a_step_depends_on_nothing_later_and_on_what_its_blocks_can_see():
    module, x = policy(4), features(20)
    start = torch.zeros(5, module.memory_size)
    head = module(x, start)[0]
    for t in (0, 5, 12):
        changed = x.clone()
        changed[:, t] += 1.0
        moved = (module(changed, start)[0] - head).abs().amax((0, 2))
        reach = 2 * (4 - 1) + 1  # depth · (window − 1) steps on, and one that embeds it with its own
        assert not moved[:t].any() and (moved[t : t + reach + 1] > 1e-6).all() and not moved[t + reach + 1 :].any()


def test_an_empty_memory_is_no_history_at_all():
    """At the first step, every block attends only to this step, for every window."""
    torch.manual_seed(0)
    x = features(1)
    heads = []
    for window in (1, 9):
        module = CausalTransformer(width=16, depth=2, heads=4, window=window).build_policy(3, 2, False)
        generator = torch.Generator().manual_seed(3)
        for name, parameter in module.named_parameters():
            if not name.endswith("distance"):
                torch.nn.init.normal_(parameter, std=0.3, generator=generator)
        heads.append(module(x, torch.zeros(5, module.memory_size))[0])
    torch.testing.assert_close(heads[0], heads[1], rtol=0, atol=1e-6)


def test_gradients_reach_back_through_memory_within_a_sequence():
    module, x = policy(3), features(8).requires_grad_()
    head, _, _ = module(x, torch.zeros(5, module.memory_size))
    (slope,) = torch.autograd.grad(head[:, -1].sum(), x)
    assert (slope[:, -6:].abs().amax((0, 2)) > 0).all() and not slope[:, :-6].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 6, "heads": 4}, "model.width: 6 is not a multiple of model.heads = 4"),
        ({"window": 0}, "model.window: 0"),
    ],
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        CausalTransformer(**options)
