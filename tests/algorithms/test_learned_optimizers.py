"""Learned optimisers against plain PyTorch in float64: their steps, their gradients, and their torch.optim form."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from metadist.algorithms.lstm_optimizer import LSTMOptimizer
from metadist.algorithms.mlp_optimizer import DECAYS, TIMES, MLPOptimizer
from metadist.core.errors import ConfigError
from metadist.core.model import Model
from metadist.core.parameters import Layout, Parameters
from metadist.models import MLP
from metadist.testing.carried import Population
from metadist.testing.quadratics import Quadratics

DOUBLE = torch.float64
BOTH = [LSTMOptimizer(window=4, unroll=4, batch_size=3), MLPOptimizer(window=4, unroll=4, batch_size=3)]
IDS = ["lstm", "mlp"]


def population(algorithm):
    model = Model(lambda: MLP(hidden=(4,), activation="tanh").build((3,), 1), dtype=DOUBLE)
    return Population(algorithm, model, Quadratics(dimension=3, rows=6))


def theta_of(algorithm, model):
    """θ with biases and an output that are not zero."""
    generator = torch.Generator().manual_seed(1)
    found = {name: values for name, (_, values) in algorithm.slots(model, model.initial(0)[0]).items()}
    noise = found["optimizer"].map(lambda t: 0.3 * torch.randn(t.shape, generator=generator, dtype=DOUBLE))
    return {**found, "optimizer": found["optimizer"] + noise}


def vectors(n, seed):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


# The rules ------------------------------------------------------------------------------------------------------------


def test_the_lstm_rule_is_two_cells_of_torch():
    algorithm = LSTMOptimizer(output=0.1)
    weights = theta_of(algorithm, population(algorithm).model)["optimizer"]
    cells, sizes = [], (2, 20)
    for layer, inputs in enumerate(sizes):
        cell = nn.LSTMCell(inputs, 20, dtype=DOUBLE)
        with torch.no_grad():
            cell.weight_ih.copy_(weights[f"{layer}.weight"][:, :inputs])
            cell.weight_hh.copy_(weights[f"{layer}.weight"][:, inputs:])
            cell.bias_ih.copy_(weights[f"{layer}.bias"])
            cell.bias_hh.zero_()
        cells.append(cell)
    phi, n = vectors(7, 0), 7
    memory, expected, states = algorithm.memory(phi), phi.clone(), [None, None]
    for step in range(5):
        gradient = vectors(n, 10 + step) * 10.0 ** (-4 * step)
        phi, memory = algorithm.update(weights, phi, gradient, memory, (4, 3))
        rows = []
        for g in gradient.tolist():
            rows.append(
                [math.log(abs(g)) / 10, math.copysign(1, g)] if abs(g) >= math.exp(-10) else [-1, math.exp(10) * g]
            )
        x = torch.tensor(rows, dtype=DOUBLE)
        for layer, cell in enumerate(cells):
            states[layer] = cell(x, states[layer])
            x = states[layer][0]
        expected = expected + 0.1 * (x @ weights["output.weight"][0])
    assert (phi - expected).abs().max() < 1e-12


def test_the_mlp_rule_has_nineteen_features():
    algorithm = MLPOptimizer(step_size=0.1, magnitude=0.5)
    weights = theta_of(algorithm, population(algorithm).model)["optimizer"]
    phi = vectors(7, 0)
    memory, expected = algorithm.memory(phi), phi.clone()
    momenta = [torch.zeros(7, dtype=DOUBLE) for _ in DECAYS]
    for step in range(5):
        gradient = vectors(7, 10 + step)
        phi, memory = algorithm.update(weights, phi, gradient, memory, (4, 3))
        momenta = [b * m + (1 - b) * gradient for b, m in zip(DECAYS, momenta)]
        moved = []
        for start, stop in ((0, 4), (4, 7)):
            rows = [v[start:stop] for v in (gradient, expected, *momenta)]
            rows = [v / (v.square().mean() + 1e-5).sqrt() for v in rows]
            rows += [torch.full((stop - start,), math.tanh(step / t - 1), dtype=DOUBLE) for t in TIMES]
            x = torch.stack(rows, 1)
            assert x.shape[1] == 19
            for layer in range(3):
                x = F.linear(x if layer == 0 else torch.relu(x), weights[f"{layer}.weight"], weights[f"{layer}.bias"])
            moved.append(0.1 * x[:, 0] * torch.exp(0.5 * x[:, 1]))
        expected = expected - torch.cat(moved)
    assert (phi - expected).abs().max() < 1e-12


# The gradient of a window ---------------------------------------------------------------------------------------------


def plain(algorithm, population, theta, first_order):
    """The mean loss of the window by an ordinary autograd loop, and its gradient by the optimiser's weights."""
    context = population.context(theta, 0, 0, 0)
    weights = {n: t.clone().requires_grad_() for n, t in theta["optimizer"].items()}
    initial = context.fresh()
    layout = Layout.of(initial)
    phi, losses = layout.flatten(initial).requires_grad_(), []
    memory = algorithm.memory(phi.detach())
    x, y = context.task.support.x, context.task.support.y
    for index in range(algorithm.window):
        rows = (context.key.stream("minibatch", step=index).bits(algorithm.batch_size) * len(y)) >> 32
        w1, b1, w2, b2 = layout.unflatten(phi).values()
        prediction = torch.tanh(x[rows] @ w1.T + b1) @ w2.T + b2
        losses.append((prediction - y[rows]).square().mean())
        (gradient,) = torch.autograd.grad(losses[-1], phi, create_graph=True)
        gradient = gradient.detach() if first_order else gradient
        phi, memory = algorithm.update(Parameters(weights), phi, gradient, memory, layout.sizes)
    mean = torch.stack(losses).mean()
    return mean, dict(zip(weights, torch.autograd.grad(mean, list(weights.values()))))


@pytest.mark.parametrize("first_order", [True, False])
@pytest.mark.parametrize("algorithm", BOTH, ids=IDS)
def test_a_window_has_the_gradient_of_a_plain_loop(algorithm, first_order):
    algorithm = type(algorithm)(window=4, unroll=4, batch_size=3, first_order=first_order)
    particles = population(algorithm)
    theta = theta_of(algorithm, particles.model)
    loss, expected = plain(algorithm, particles, theta, first_order)
    context = particles.context(theta, 0, 0, 0)
    _, contribution = algorithm.advance(theta, algorithm.start(theta, context), context)
    assert abs(contribution.metrics["loss"] - loss) < 1e-12
    for name, gradient in expected.items():
        scale = gradient.abs().max()
        assert (contribution.slots["optimizer"][name] - gradient).abs().max() < 1e-10 * (1 + scale), name


@pytest.mark.parametrize("algorithm", BOTH, ids=IDS)
def test_steps_of_an_evaluation_are_those_of_a_window(algorithm):
    particles = population(algorithm)
    theta = theta_of(algorithm, particles.model)
    context = particles.context(theta, 0, 0, 0)
    start = algorithm.start(theta, context)
    state, _ = algorithm.advance(theta, start, context)
    for index in range(algorithm.window):
        start = algorithm.step(theta, start, context, index)
    for one, other in zip(*(torch.utils._pytree.tree_leaves(s) for s in (state, start))):
        assert (one - other).abs().max() < 1e-12


def test_scales_change_the_coordinates_and_not_the_network():
    x = vectors(6, 0).view(2, 3)
    plain, scaled = (MLPOptimizer(scales=scales) for scales in ((1.0, 1.0), (0.1, 10.0)))
    states = []
    for algorithm in (plain, scaled):
        particles = population(algorithm)
        theta = theta_of(algorithm, particles.model)
        context = particles.context(theta, 0, 0, 0)
        states.append((algorithm.start(theta, context), context, theta))
    predictions = [a.predict(theta, s, x, context) for a, (s, context, theta) in zip((plain, scaled), states)]
    assert (predictions[0] - predictions[1]).abs().max() < 1e-12
    ratios = [a / b for a, b in zip(*(s["parameters"].values() for s, _, _ in states))]
    assert all((r - r.flatten()[0]).abs().max() < 1e-9 for r in ratios)
    factors = [float(r.flatten()[0]) for r in ratios]
    assert len({round(f, 6) for f in factors}) == 4 and all(0.1 <= f <= 10 for f in factors)


@pytest.mark.parametrize("scales", [(0.0, 1.0), (2.0, 1.0)])
def test_scales_that_are_no_range_are_refused(scales):
    with pytest.raises(ConfigError, match="algorithm.scales"):
        MLPOptimizer(scales=scales)


# As torch.optim -------------------------------------------------------------------------------------------------------


def convolutional():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3, track_running_stats=False), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)
    ).to(DOUBLE)


def trained(network, optimizer, steps, first=0):
    for step in range(first, first + steps):
        x = vectors(5 * 16, step).view(5, 1, 4, 4)
        optimizer.zero_grad()
        F.cross_entropy(network(x), torch.arange(5) % 2).backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in network.parameters()])


@pytest.mark.parametrize("algorithm", BOTH, ids=IDS)
def test_the_torch_optimizer_takes_the_steps_of_the_functional_form(algorithm):
    theta = theta_of(algorithm, population(algorithm).model)
    network = convolutional()
    found = trained(network, algorithm.optimizer(theta, network.parameters()), 6)
    network = convolutional()
    parameters = dict(network.named_parameters())
    layout = Layout.of(parameters)
    vector = layout.flatten(parameters).detach()
    memory = algorithm.memory(vector)
    for step in range(6):
        x = vectors(5 * 16, step).view(5, 1, 4, 4)

        def loss(vector, x=x):
            prediction = torch.func.functional_call(network, dict(layout.unflatten(vector)), (x,))
            return F.cross_entropy(prediction, torch.arange(5) % 2)

        gradient = torch.func.grad(loss)(vector)
        vector, memory = algorithm.update(theta["optimizer"], vector, gradient, memory, layout.sizes)
    assert (found - vector).abs().max() < 1e-12


@pytest.mark.parametrize("algorithm", BOTH, ids=IDS)
def test_the_state_dict_of_the_torch_optimizer_continues_exactly(algorithm, tmp_path):
    theta = theta_of(algorithm, population(algorithm).model)
    whole = convolutional()
    expected = trained(whole, algorithm.optimizer(theta, whole.parameters()), 6)
    network = convolutional()
    optimizer = algorithm.optimizer(theta, network.parameters())
    trained(network, optimizer, 3)
    torch.save({"network": network.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "saved.pt")
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    again = convolutional()
    again.load_state_dict(saved["network"])
    optimizer = algorithm.optimizer(theta, again.parameters())
    optimizer.load_state_dict(saved["optimizer"])
    assert torch.equal(trained(again, optimizer, 3, first=3), expected)


def test_the_torch_optimizer_skips_parameters_without_gradient_and_keeps_half_precision():
    algorithm = BOTH[1]
    theta = theta_of(algorithm, population(algorithm).model)
    half, still = nn.Parameter(torch.ones(3, dtype=torch.bfloat16)), nn.Parameter(torch.ones(2))
    optimizer = algorithm.optimizer(theta, [half, still])
    half.grad = torch.tensor([1.0, -1.0, 2.0], dtype=torch.bfloat16)
    assert optimizer.step(lambda: 5.0) == 5.0
    assert half.dtype == torch.bfloat16 and torch.equal(still, torch.ones(2))
    assert optimizer.state[half]["momenta"].dtype == torch.float32


def test_the_torch_optimizer_of_half_precision_continues_exactly_from_its_state_dict():
    """In bfloat16, which torch would load the memory as, the count of 301 steps is 302."""
    algorithm = BOTH[1]
    weights = theta_of(algorithm, population(algorithm).model)["optimizer"].map(lambda t: t.float())
    parameter = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = algorithm.optimizer({"optimizer": weights}, [parameter])
    for step in range(301):
        parameter.grad = vectors(3, step).to(torch.bfloat16)
        optimizer.step()
    again = algorithm.optimizer({"optimizer": weights}, [parameter])
    again.load_state_dict(optimizer.state_dict())
    assert float(again.state[parameter]["count"]) == 301
    assert torch.equal(again.state[parameter]["momenta"], optimizer.state[parameter]["momenta"])
    assert again.state[parameter]["momenta"] is not optimizer.state[parameter]["momenta"]


def test_a_copy_of_the_torch_optimizer_takes_the_same_steps():
    algorithm = BOTH[1]
    network = convolutional()
    optimizer = algorithm.optimizer(theta_of(algorithm, population(algorithm).model), network.parameters())
    trained(network, optimizer, 2)
    other, copied = copy.deepcopy((network, optimizer))
    assert torch.equal(trained(other, copied, 2, first=2), trained(network, optimizer, 2, first=2))


def test_the_torch_optimizer_refuses_options_of_a_parameter_group():
    algorithm = BOTH[1]
    theta = theta_of(algorithm, population(algorithm).model)
    with pytest.raises(ValueError, match="no option 'lr'"):
        algorithm.optimizer(theta, [{"params": [nn.Parameter(torch.ones(2))], "lr": 1e-3}])
