"""Recurrent layers, attention and embeddings against torch's own modules: values and derivatives in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils.rnn import pack_padded_sequence
from toys import keys

from metadist.core.errors import ConfigError
from metadist.core.model import Model

KEY = keys(4).each()[0]
RECURRENT = {
    "lstm": lambda: nn.LSTM(3, 4),
    "lstm, batch first": lambda: nn.LSTM(3, 4, batch_first=True),
    "lstm, layers, both directions": lambda: nn.LSTM(3, 4, num_layers=2, bidirectional=True),
    "lstm, projected": lambda: nn.LSTM(3, 4, num_layers=2, bidirectional=True, proj_size=2),
    "lstm, projected, no bias": lambda: nn.LSTM(3, 4, proj_size=2, bias=False),
    "gru": lambda: nn.GRU(3, 4, num_layers=2, bidirectional=True, batch_first=True),
    "gru, no bias": lambda: nn.GRU(3, 4, bias=False),
    "rnn": lambda: nn.RNN(3, 4, num_layers=2, bidirectional=True),
    "rnn, relu": lambda: nn.RNN(3, 4, nonlinearity="relu"),
    "lstm cell": lambda: nn.LSTMCell(3, 4),
    "gru cell": lambda: nn.GRUCell(3, 4),
    "rnn cell": lambda: nn.RNNCell(3, 4),
    "rnn cell, relu": lambda: nn.RNNCell(3, 4, nonlinearity="relu", bias=False),
}


class Attention(nn.Module):
    """All ways to attention."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)

    def forward(self, x):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        x = self.layer(x, src_mask=mask)
        x, _ = self.attention(x, x, x, need_weights=False)
        return F.scaled_dot_product_attention(x, x.tanh(), x, is_causal=True)


class Tokens(nn.Module):
    """Integer inputs: an embedding with a row for padding, and a bag of them."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 4, padding_idx=2), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.embedding(x).tanh().mean(1))


def inputs(module, tasks=()):
    generator = torch.Generator().manual_seed(0)
    if isinstance(module, Tokens):
        return torch.randint(0, 5, (*tasks, 2, 5), generator=generator)
    shape = (2, 5, 4) if isinstance(module, Attention) else (5, 2, 3)
    shape = shape[1:] if isinstance(module, nn.RNNCellBase) else shape
    return torch.randn(*tasks, *shape, generator=generator, dtype=torch.float64)


def value(found):
    """Return a scalar that depends on every output, in a nonlinear way."""
    leaves = torch.utils._pytree.tree_leaves(found)
    return sum((t.square() * torch.arange(1, t.numel() + 1).view_as(t) / 10).sum() for t in leaves)


def prepared(factory):
    model = Model(factory, dtype=torch.float64)
    bound = model.bind({}, KEY, True, replacements=model.differentiable(True, second_order=True))
    return model.module.train(), bound, model.initial(1)[0]


EVERY = {**RECURRENT, "attention": Attention, "embedding": Tokens}


@pytest.mark.parametrize("name", EVERY)
def test_values_and_gradients_are_torch_s(name):
    module, bound, parameters = prepared(EVERY[name])
    x = inputs(module)
    leaves = {n: t.clone().requires_grad_() for n, t in parameters.items()}
    expected = functional_call(module, leaves, (x,))
    found = bound(parameters, x)
    for one, other in zip(*map(torch.utils._pytree.tree_leaves, (found, expected))):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    first = dict(zip(leaves, torch.autograd.grad(value(expected), leaves.values())))
    ours = grad(lambda p: value(bound(p, x)))(dict(parameters))
    for n in first:
        torch.testing.assert_close(ours[n], first[n], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", EVERY)
def test_second_derivatives_are_differences_of_torch_s_first(name):
    """Along a direction v: d/dε ∇f(θ + ε v) by Richardson's extrapolation of torch's own gradients."""
    module, bound, parameters = prepared(EVERY[name])
    x, generator = inputs(module), torch.Generator().manual_seed(1)
    v = {n: torch.randn(t.shape, generator=generator, dtype=t.dtype) for n, t in parameters.items()}
    if isinstance(module, Tokens):  # the row of the padding counts as a constant
        v["embedding.weight"][2] = 0

    def torch_s(shift):
        leaves = {n: (t + shift * v[n]).requires_grad_() for n, t in parameters.items()}
        return torch.autograd.grad(value(functional_call(module, leaves, (x,))), leaves.values())

    def difference(step):
        return [(a - b) / (2 * step) for a, b in zip(torch_s(step), torch_s(-step))]

    wide, narrow = difference(2e-3), difference(1e-3)
    expected = [(4 * n - w) / 3 for w, n in zip(wide, narrow)]

    def along(p):
        gradient = grad(lambda p: value(bound(p, x)))(p)
        return sum((g * v[n]).sum() for n, g in gradient.items())

    found = grad(along)(dict(parameters))
    scale = max(float(t.abs().max()) for t in expected)
    for one, other in zip(found.values(), expected):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-7 * scale)


@pytest.mark.lane("numerics")
@pytest.mark.parametrize("name", ["lstm, projected", "gru", "rnn", "attention"])
def test_second_derivatives_pass_gradgradcheck(name):
    _, bound, parameters = prepared(EVERY[name])
    x = inputs(bound.model.module)

    def function(*values):
        return value(bound(dict(zip(parameters, values)), x))

    leaves = tuple(t.clone().requires_grad_() for t in parameters.values())
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("name", EVERY)
def test_tasks_are_computed_together(name):
    """Each task has parameters of its own: its second derivative is that of the task alone."""
    module, bound, parameters = prepared(EVERY[name])
    x = inputs(module, (3,))
    each = {n: torch.stack([t, t * 0.5, -t]) for n, t in parameters.items()}

    def second(p, x):
        def stepped(p):
            gradient = grad(lambda p: value(bound(p, x)))(p)
            return value(bound({n: t - 0.01 * gradient[n] for n, t in p.items()}, x))

        return grad(stepped)(p)

    together = vmap(second)(each, x)
    for i in range(3):
        alone = second({n: t[i] for n, t in each.items()}, x[i])
        for n in alone:
            torch.testing.assert_close(together[n][i], alone[n], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_dropout_between_layers_has_a_key(kind):
    """The outputs are those of two layers of torch with the key's mask between them; none in evaluation."""
    model = Model(lambda: kind(2, 3, num_layers=2, dropout=0.3), dtype=torch.float64)
    learned, x = model.initial(0)[0], torch.randn(4, 2, 2, dtype=torch.float64)
    layers = kind(2, 3).double(), kind(3, 3).double()
    for number, layer in enumerate(layers):
        layer.load_state_dict({f"{n[:-1]}0": t for n, t in learned.items() if n.endswith(f"l{number}")})
    for key, step in ((KEY, 0), (KEY, 1), (keys(5).each()[0], 0)):
        mask = (key.stream("dropout", step, 1).uniform(4, 2, 3) >= 0.3).double()
        expected = layers[1](layers[0](x)[0] * mask / 0.7)[0]
        bound = model.bind({}, key, True, replacements=model.differentiable(True, True))
        torch.testing.assert_close(bound(learned, x, step=step)[0], expected, rtol=0, atol=1e-12)
    judged = model.bind({}, KEY, False, replacements=model.differentiable(False, True))(learned, x)[0]
    torch.testing.assert_close(judged, layers[1](layers[0](x)[0])[0], rtol=0, atol=1e-12)


class Packing(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.GRU(3, 4)

    def forward(self, x):
        return self.body(pack_padded_sequence(x, [5, 3]))[1]


def test_packed_sequences_are_refused():
    model = Model(Packing)
    bound = model.bind({}, KEY, True, replacements=model.differentiable(True, True))
    with pytest.raises(NotImplementedError, match="packed sequence"):
        bound(model.initial(0)[0], torch.randn(5, 2, 3))
    layer = Model(lambda: nn.LSTM(3, 4))
    bound = layer.bind({}, KEY, True, replacements=layer.differentiable(True, True))
    with pytest.raises(NotImplementedError, match="packed sequence"):
        bound(layer.initial(0)[0], pack_padded_sequence(torch.randn(5, 2, 3), [5, 3]))


class Complex(nn.Module):
    def __init__(self, buffer):
        super().__init__()
        self.real, turn = nn.Linear(2, 2), torch.ones(2, dtype=torch.complex64)
        if buffer:
            self.register_buffer("turn", turn)
        else:
            self.turn = nn.Parameter(turn)


REFUSED = {
    "'1' is an Embedding with max_norm = 1.0, which changes its weight": lambda: nn.Sequential(
        nn.Identity(), nn.Embedding(3, 2, max_norm=1.0)
    ),
    "'Embedding' is an Embedding with sparse = True.*; use sparse=False": lambda: nn.Embedding(3, 2, sparse=True),
    "'EmbeddingBag' is an EmbeddingBag with sparse": lambda: nn.EmbeddingBag(3, 2, sparse=True),
    "with scale_grad_by_freq = True": lambda: nn.Embedding(3, 2, scale_grad_by_freq=True),
    "parameter 'turn' is complex.*torch.view_as_real": lambda: Complex(buffer=False),
    "buffer 'turn' is complex": lambda: Complex(buffer=True),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_has_no_derivative_or_dtype_is_refused(message):
    with pytest.raises(ConfigError, match=message) as refused:
        Model(REFUSED[message])
    assert "\n" not in str(refused.value)
