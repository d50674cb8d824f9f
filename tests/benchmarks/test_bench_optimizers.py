"""The benchmark of learned optimisers: its hand-made contestants are those of torch.optim."""

import pytest
import torch

from metadist.benchmarks.optimizers import HandMade
from metadist.core.parameters import Parameters


@pytest.mark.parametrize("adam", [True, False])
def test_the_hand_made_rules_are_those_of_torch(adam):
    value = torch.arange(5, dtype=torch.float64)
    parameter = torch.nn.Parameter(value.clone())
    kind = torch.optim.Adam if adam else torch.optim.SGD
    optimizer = kind([parameter], lr=0.1, **({} if adam else {"momentum": 0.9}))
    rule = HandMade(adam=adam)
    memory = {**rule.memory(value), "rate": torch.tensor(0.1, dtype=torch.float64)}
    for step in range(5):
        gradient = torch.randn(5, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        parameter.grad = gradient.clone()
        optimizer.step()
        value, memory = rule.update(Parameters({}), value, gradient, memory, (5,))
    assert (value - parameter.detach()).abs().max() < 1e-12
