"""The Meta-LSTM against a plain loop with PyTorch's own LSTM cell in float64."""

import plain
import pytest
import torch
from gradient_cases import make, plain_contribution
from torch.func import functional_call
from toys import keys, relative_error, somewhere

from metadist.algorithms.meta_lstm import MetaLSTM
from metadist.core.coordinates import log_and_sign
from metadist.core.parameters import Layout


def descend(subject, theta, task):
    """c_k [n], by ordinary autograd; the gates of the first LSTM are torch's ``lstm_cell``."""
    algorithm, weights = subject.algorithm, theta["meta_lstm"]
    layout = Layout.of(theta["model"])
    c = layout.flatten(dict(theta["model"]))
    i, f = torch.zeros_like(c), torch.ones_like(c)
    state = (c.new_zeros(len(c), algorithm.units), c.new_zeros(len(c), algorithm.units))
    w_x, w_h = weights["lstm.weight"].split((4, algorithm.units), 1)
    bias = weights["lstm.bias"]
    for _ in range(algorithm.inner_steps):
        leaf = c.detach().requires_grad_() if algorithm.first_order or not c.requires_grad else c
        prediction = functional_call(subject.model.module, dict(layout.unflatten(leaf)), (task.support.x,))
        loss = subject.tasks.loss(prediction, task.support.y).mean()
        (gradient,) = torch.autograd.grad(loss, leaf, create_graph=not algorithm.first_order)
        loss = loss.detach() if algorithm.first_order else loss
        seen = torch.cat((log_and_sign(gradient), log_and_sign(loss).expand(len(c), 2)), 1)
        state = torch.lstm_cell(seen, state, w_x, w_h, bias, torch.zeros_like(bias))
        rows = [torch.cat((state[0], c[:, None], gate[:, None]), 1) for gate in (i, f)]
        i, f = (
            torch.sigmoid(row @ weights["gates.weight"][number] + weights[name])
            for number, (row, name) in enumerate(zip(rows, ("input", "forget")))
        )
        c = f * c - i * gradient
    return c


def objective(subject, theta, key, task):
    adapted = Layout.of(theta["model"]).unflatten(descend(subject, theta, task))
    return plain.loss(subject.tasks, functional_call(subject.model.module, dict(adapted), (task.query.x,)), task.query)


@pytest.mark.parametrize("first_order", [True, False])
def test_the_meta_gradient_is_that_of_a_plain_loop(first_order):
    subject = make(MetaLSTM(inner_steps=3, units=5, first_order=first_order), "mlp")
    theta, shard = somewhere(subject), keys(0, 2)
    got, (expected, loss) = subject.contribute(theta, shard, 0), plain_contribution(subject, theta, shard, objective)
    assert got.metrics["loss"] == pytest.approx(loss, rel=1e-12)
    assert expected.keys() == got.slots.keys() == {"model", "meta_lstm"}
    for slot, vector in expected.items():
        assert relative_error(got.slots[slot], vector) <= 1e-10, slot


def test_it_begins_as_gradient_descent_at_a_small_rate():
    """σ(−4.5) = 0.011, and σ(5) = 0.993 keeps the parameters."""
    subject = make(MetaLSTM(inner_steps=1), "mlp")
    weights = subject.initial(0).theta(subject.slots)["meta_lstm"]
    assert all(t.abs().max() <= 0.01 for n, t in weights.items() if n.endswith("weight"))
    assert -5 <= float(weights["input"]) <= -4 and 4 <= float(weights["forget"]) <= 6


def test_log_and_sign():
    """By hand: log|v| / 10 and the sign above e^−10, and −1 and e^10 v below it."""
    found = log_and_sign(torch.tensor([1.0, -100.0, 1e-6, 0.0], dtype=torch.float64))
    expected = [[0.0, 1.0], [0.4605170185988091, -1.0], [-1.0, 0.022026465794806718], [-1.0, 0.0]]
    assert (found - torch.tensor(expected, dtype=torch.float64)).abs().max() < 1e-12
