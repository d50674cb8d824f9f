"""The dry run calls the user's module in every way of a run, and refuses in one line with the module and a remedy."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from toys import Blobs, Curves, learner

from metadist.algorithms import ANIL, MAML, ProtoNet, Reptile, Reweight
from metadist.core.algorithm import Algorithm
from metadist.core.errors import ConfigError
from metadist.core.outer import OuterLoop

SECOND = MAML(inner_lr=0.1, inner_steps=5)
FIRST = MAML(inner_lr=0.1, inner_steps=5, first_order=True)
REPTILE = Reptile(inner_lr=0.1, inner_steps=5)
PROTONET = ProtoNet()


class Recurrent(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        self.body = kind(1, 8, batch_first=True, **options)
        self.head = nn.Linear((self.body.proj_size or 8) * (1 + self.body.bidirectional), 2)

    def forward(self, x):
        return self.head(self.body(x.unsqueeze(-1))[0][:, -1])


class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.GRUCell(1, 8), nn.Linear(8, 2)

    def forward(self, x):
        h = None
        for t in range(x.shape[1]):
            h = self.cell(x[:, t : t + 1], h)
        return self.head(h)


class Packing(Recurrent):
    def __init__(self):
        super().__init__(nn.LSTM)

    def forward(self, x):
        packed = nn.utils.rnn.pack_padded_sequence(x.unsqueeze(-1), [1] * len(x), batch_first=True)
        return self.head(self.body(packed)[1][0][-1])


class ByHand(nn.Module):
    """A loop over time with linear layers."""

    def __init__(self):
        super().__init__()
        self.step, self.head = nn.Linear(9, 8), nn.Linear(8, 2)

    def forward(self, x):
        h = x.new_zeros(len(x), 8)
        for t in range(x.shape[1]):
            h = torch.tanh(self.step(torch.cat([x[:, t : t + 1], h], 1)))
        return self.head(h)


class Attention(nn.Module):
    def __init__(self, kind="function", math=False):
        super().__init__()
        self.kind, self.math = kind, math
        self.first, self.head = nn.Linear(1, 8), nn.Linear(8, 2)
        if kind == "module":
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        elif kind == "layer":
            self.attention = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)

    def forward(self, x):
        if self.math:
            with sdpa_kernel(SDPBackend.MATH):
                return self.attend(x)
        return self.attend(x)

    def attend(self, x):
        x = self.first(x.unsqueeze(-1))
        if self.kind == "function":
            x = nn.functional.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0]
        elif self.kind == "module":
            x = self.attention(x, x, x, need_weights=False)[0]
        else:
            x = self.attention(x)
        return self.head(x.mean(1))


class Twice(Algorithm):
    """An inner step that ``inner_steps`` does not state."""

    def adapt(self, model, theta, support, context):
        def loss(parameters):
            return context.loss(model(parameters, support.x), support)

        return [theta["model"] - torch.func.grad(loss)(theta["model"]) * 0.1]

    def predict(self, model, phi, x):
        return model(phi, x)


class Normed(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.body, self.head = norm(nn.Linear(2, 8)), nn.Linear(8, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)))


class Bag(nn.Module):
    def __init__(self):
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(4, 3), nn.Linear(5, 2)

    def forward(self, x):
        return self.head(torch.cat([x, self.bag((x > 0).long())], 1))


class Counting(nn.Module):
    """Counts its calls, or tracks a mean: in place, by assignment, in Python."""

    def __init__(self, how):
        super().__init__()
        self.how, self.linear, self.calls = how, nn.Linear(2, 2), 0
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        if self.how == "in place":
            self.seen += 1
        elif self.how == "assigned":
            self.seen = self.seen + 1
        elif self.how == "average":
            self.seen = 0.9 * self.seen + 0.1 * x.mean().detach()
        scale = 1.0 + self.calls if self.how == "used" else 1.0
        if self.how == "random":
            import random

            scale = random.random()
        if self.how == "branch" and x.mean() > 0:
            scale = 2.0
        return self.linear(x) * scale


def subject(factory, algorithm):
    tasks = Blobs(input_shape=(2,)) if algorithm is PROTONET else Curves()
    return learner(algorithm, factory, tasks, outer=OuterLoop(meta_batch_size=2), dtype=torch.float32)


SPECTRAL = r"spectral normalisation changes its own buffers .*; use torch.nn.utils.parametrizations.weight_norm"
REFUSED = [
    (Packing, SECOND, r"model: 'Packing' can't be trained: .* packs sequences, .*; pass them padded, and take"),
    (Attention, Twice(), r"'Attention' can't be trained: torch's fused attention has no second der.*state inner_steps"),
    (
        lambda: Normed(nn.utils.parametrizations.spectral_norm),
        SECOND,
        rf"\(_SpectralNorm\) can't be trained: {SPECTRAL}",
    ),
    (lambda: Normed(nn.utils.spectral_norm), REPTILE, rf"'body' \(Linear\) can't be trained: {SPECTRAL}"),
    (Bag, SECOND, r"model: 'Bag' can't be trained: EmbeddingBag has no second derivative; use torch.nn.Embedding"),
    (
        lambda: Normed(nn.utils.parametrizations.weight_norm),
        Reweight(),
        r"can't be trained: the algorithm takes a derivative in forward mode, .*weight_norm.*; compute it from other",
    ),
    (lambda: Counting("in place"), SECOND, r"'Counting' can't be trained: .* changes a buffer or parameter in place"),
    (lambda: Counting("in place"), REPTILE, r"'Counting' can't be trained: .* changes a buffer or parameter in place"),
    (lambda: Counting("assigned"), SECOND, r"forward pass of 'Counting' changes the buffer seen, .* would be lost"),
    (lambda: Counting("average"), REPTILE, r"forward pass of 'Counting' changes the buffer seen, .* would be lost"),
    (lambda: Counting("used"), FIRST, r"'Counting' gives two results .*; use torch.nn.Dropout .* keep counters out"),
    (lambda: Counting("random"), FIRST, r"'Counting' gives two results .*: it draws random numbers of its own"),
    (
        lambda: Counting("branch"),
        SECOND,
        r"'Counting' can't be trained: .* value of a tensor in Python.*torch.where",
    ),
]


@pytest.mark.parametrize(("factory", "algorithm", "message"), REFUSED)
def test_what_would_fail_later_is_refused_now(factory, algorithm, message):
    with pytest.raises(ConfigError, match=message) as refused:
        subject(factory, algorithm).dry_run(0)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("factory", "algorithm"),
    [
        (ByHand, SECOND),
        (ByHand, REPTILE),
        *((lambda kind=kind: Recurrent(kind), SECOND) for kind in (nn.LSTM, nn.GRU, nn.RNN)),
        (lambda: Recurrent(nn.LSTM, num_layers=2, bidirectional=True, dropout=0.1), FIRST),
        (lambda: Recurrent(nn.LSTM, proj_size=3), REPTILE),
        (lambda: Recurrent(nn.LSTM), PROTONET),
        (Cell, SECOND),
        *((lambda kind=kind: Attention(kind), SECOND) for kind in ("function", "module", "layer")),
        (lambda: Attention("layer"), ANIL(head="*")),
        (lambda: Attention(math=True), SECOND),
        (Attention, FIRST),
        (Attention, PROTONET),
        (lambda: Normed(nn.utils.parametrizations.weight_norm), SECOND),
        (lambda: Counting("in Python"), SECOND),
    ],
)
def test_the_remedies_and_harmless_modules_pass(factory, algorithm):
    one = subject(factory, algorithm)
    one.dry_run(0)
    assert one.algorithm is algorithm


def test_an_ordinary_mistake_keeps_its_message():
    with pytest.raises(ConfigError, match=r"model: 'Linear' fails on train tasks with inputs \[6, 2\] .*mat1 and mat2"):
        subject(lambda: nn.Linear(3, 2), SECOND).dry_run(0)
