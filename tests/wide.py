"""Families and modules of the wider contract: sequences, tokens, and every module of torch in the inner loop."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from metadist.core.task import Classification, Examples, Task, TaskFamily

LENGTH, WORDS = 3, 9


@dataclass(frozen=True)
class Sequences(TaskFamily):
    """x is float32 [N, 3, 2]; y [N, 1] is the sine of a weighted sum of x, with weights of the task's own."""

    input_shape: tuple[int, ...] = (LENGTH, 2)

    def sample(self, keys, split):
        weights = keys.stream("weights").normal(1, LENGTH, 2).double()

        def examples(name, rows):
            x = keys.stream(name).normal(rows, LENGTH, 2)
            return Examples(x, torch.sin((x.double() * weights).flatten(-2).sum(-1, keepdim=True)).float())

        return Task(examples("support", 6), examples("query", 4))

    def sample_task(self, key, split):
        return self.sample(key, split)


class Recurrent(nn.Module):
    """A recurrent layer, and a head on its last output."""

    def __init__(self, kind=nn.LSTM):
        super().__init__()
        self.body, self.head = kind(2, 3, batch_first=True), nn.Linear(3, 1)

    def forward(self, x):
        return self.head(self.body(x)[0][:, -1])


class Gated(Recurrent):
    def __init__(self):
        super().__init__(nn.GRU)


class Encoder(nn.Module):
    """A transformer encoder layer of torch."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(2, 4), nn.Linear(4, 1)
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)

    def forward(self, x):
        return self.head(self.layer(self.first(x)).mean(1))


# Inputs and outputs ---------------------------------------------------------------------------------------------------


def _tokens(keys, name, rows):
    return (keys.stream(name).uniform(rows, LENGTH) * WORDS).long()


def _word_values(keys):
    return keys.stream("words").normal(1, WORDS).double()


@dataclass(frozen=True)
class Words(TaskFamily):
    """x is int64 [N, 3], token ids below 9; y [N, 1] is the mean of the values that the task gives to the tokens."""

    def example(self, keys, name, rows):
        tokens = _tokens(keys, name, rows)
        values = _word_values(keys).expand(*tokens.shape[:-1], WORDS).gather(-1, tokens)
        return Examples(tokens, values.mean(-1, keepdim=True).float())

    def sample(self, keys, split):
        return Task(self.example(keys, "support", 6), self.example(keys, "query", 4))

    def sample_task(self, key, split):
        return self.sample(key, split)


@dataclass(frozen=True)
class Described(Words):
    """x is a dict: token ids [N, 3], which of them count, bool [N, 3], and a number [N] that multiplies the target."""

    def example(self, keys, name, rows):
        plain = super().example(keys, name, rows)
        mask, scale = keys.stream(f"{name} mask").uniform(rows, LENGTH) < 0.8, keys.stream(f"{name} scale").normal(rows)
        return Examples({"tokens": plain.x, "mask": mask, "scale": scale}, plain.y * scale.unsqueeze(-1))


@dataclass(frozen=True)
class Pairs(Words):
    """x is a tuple of two sequences of token ids; y is a dict of the sum and the difference of their values, [N]."""

    metric_name: str = "error"

    def example(self, keys, name, rows):
        first, second = (super(Pairs, self).example(keys, f"{name} {i}", rows) for i in range(2))
        total, less = (first.y + second.y).squeeze(-1), (first.y - second.y).squeeze(-1)
        return Examples((first.x, second.x), {"sum": total, "less": less})

    def loss(self, prediction, target):
        return sum((prediction[n] - target[n]).square() for n in target)

    metric = loss


@dataclass(frozen=True)
class Labelled(Classification):
    """Inputs of a language model: {"input_ids", "attention_mask"}, int64 [N, 3]; the class says which half is large."""

    outputs: int = 2

    def sample(self, keys, split):
        def examples(name, rows):
            tokens = _tokens(keys, name, rows)
            values = _word_values(keys).expand(*tokens.shape[:-1], WORDS).gather(-1, tokens)
            inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
            return Examples(inputs, (values.sum(-1) > 0).long())

        return Task(examples("support", 6), examples("query", 4))

    def sample_task(self, key, split):
        return self.sample(key, split)


@dataclass(frozen=True)
class Uncertain(Sequences):
    """Gaussian regression: the model predicts (mean, logarithm of the variance), each [N, 1]."""

    def loss(self, prediction, target):
        mean, log_variance = prediction
        return ((target - mean).square() / log_variance.exp() + log_variance).flatten(1).sum(1) / 2

    def metric(self, prediction, target):
        return (prediction[0] - target).square().flatten(1).mean(1)


@dataclass(frozen=True)
class Quantiles(Sequences):
    """Targets [N], without a dimension of their own, and predictions [N, 3]: three quantiles."""

    def sample(self, keys, split):
        task = super().sample(keys, split)
        return Task(*(Examples(e.x, e.y.squeeze(-1)) for e in (task.support, task.query)))

    def loss(self, prediction, target):
        off = target.unsqueeze(-1) - prediction
        levels = torch.tensor([0.1, 0.5, 0.9], dtype=off.dtype, device=off.device)
        return torch.maximum(levels * off, (levels - 1) * off).sum(-1)

    def metric(self, prediction, target):
        return (prediction[..., 1] - target).abs()


@dataclass(frozen=True)
class Flat(Sequences):
    """Targets [N], and the squared error."""

    def sample(self, keys, split):
        task = super().sample(keys, split)
        return Task(*(Examples(e.x, e.y.squeeze(-1)) for e in (task.support, task.query)))


class Reader(nn.Module):
    """An embedding of the tokens, their mean, a head."""

    def __init__(self, outputs=1):
        super().__init__()
        self.embedding, self.head = nn.Embedding(WORDS, 4), nn.Linear(4, outputs)

    def forward(self, tokens):
        return self.head(torch.tanh(self.embedding(tokens)).mean(-2))


class DictReader(Reader):
    def forward(self, tokens, mask, scale):
        read = torch.tanh(self.embedding(tokens)) * mask.unsqueeze(-1)
        return self.head(read.sum(-2)) * scale.unsqueeze(-1)


class PairReader(Reader):
    def __init__(self):
        super().__init__(2)

    def forward(self, one, other):
        both = self.head(torch.tanh(self.embedding(one) - 2 * self.embedding(other)).mean(-2))
        return {"less": both[:, 0], "sum": both[:, 1]}


class ModelOutput:
    """A result as language models give it."""

    def __init__(self, logits, hidden):
        self.logits, self.hidden = logits, hidden


class Labeller(Reader):
    def __init__(self):
        super().__init__(2)

    def forward(self, input_ids, attention_mask):
        hidden = torch.tanh(self.embedding(input_ids)) * attention_mask.unsqueeze(-1)
        return ModelOutput(self.head(hidden.mean(-2)), hidden)


class Plain(nn.Module):
    """Two layers over the flat sequence."""

    def __init__(self, outputs=1):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(2 * LENGTH, 6), nn.Tanh(), nn.Linear(6, outputs))

    def forward(self, x):
        return self.body(x)


class Gaussian(Plain):
    def __init__(self):
        super().__init__(2)

    def forward(self, x):
        return self.body(x).split(1, -1)


class ThreeQuantiles(Plain):
    def __init__(self):
        super().__init__(3)


class Squeezed(Plain):
    def forward(self, x):
        return self.body(x).squeeze(-1), x  # model.output: 0


#: name → (family, module, options of the model): what issue 14 must show, each by its import path
CASES = {
    "dict": (Described, DictReader, {}),
    "tuple": (Pairs, PairReader, {}),
    "output": (Labelled, Labeller, {}),
    "lstm": (Sequences, Recurrent, {}),
    "gru": (Sequences, Gated, {}),
    "encoder": (Sequences, Encoder, {}),
    "embedding": (Words, Reader, {}),
    "gaussian": (Uncertain, Gaussian, {}),
    "quantiles": (Quantiles, ThreeQuantiles, {}),
    "flat": (Flat, Squeezed, {"output": 0}),
}


def document(name):
    """Return the config of a case: a run of seconds."""
    family, module, options = CASES[name]
    return {
        "name": name,
        "seed": 3,
        "tasks": {"name": f"wide:{family.__name__}"},
        "model": {"name": f"wide:{module.__name__}", **options},
        "algorithm": {"name": "maml", "inner_lr": 0.1, "inner_steps": 2},
        "outer": {"lr": 0.01, "meta_batch_size": 4, "shard_size": 2, "meta_steps": 3},
        "evaluate": {"every": 3, "tasks": 4, "test_tasks": 4},
        "engine": {"compile": "never"},
        "workers": [{"min": 0, "max": 0}],
        "tracking": {"uri": "none"},
    }
