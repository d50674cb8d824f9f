"""Algorithms and models that lack one property each are caught, by a message with the remedy."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import nn

from metadist import ANIL, CNP, GRU, MAML, MLP, RL2, Algorithm, Conv4, MetaSGD, ProtoNet, Reactive, Reptile
from metadist.algorithms import MAMLRL
from metadist.core.inner_loop import Descent, InnerLoop
from metadist.models.cnp import ConditionalNeuralProcess
from metadist.testing import (
    ImpureError,
    InexactError,
    PropertyError,
    RoundTripError,
    RowError,
    ShapeError,
    UnusableError,
    WrongGradientError,
    check_algorithm,
    check_model,
)
from metadist.testing.toys import Blobs, Curves


def caught(check, subject, error, *expected, **options):
    with pytest.raises(PropertyError) as found:
        check(subject, **options)
    assert type(found.value) is error, found.value
    message = str(found.value)
    assert "remedy: " in message
    for text in (type(subject).__name__, *expected):
        assert text in message, message


# Algorithms -----------------------------------------------------------------------------------------------------------


@pytest.mark.lane("numerics")
@pytest.mark.parametrize(
    "algorithm",
    [
        MAML(inner_steps=2),
        MAML(inner_steps=2, first_order=True),
        ANIL(),
        MetaSGD(),
        Reptile(inner_steps=3),
        Reptile(inner_lr=0.3, inner_steps=10),
        ProtoNet(),
        CNP(),
        RL2(epochs=1, minibatches=2),
        RL2(optimizer="trpo", epochs=1, minibatches=1, cg_steps=2, backtracks=2),
        MAMLRL(rollouts_per_task=3, epochs=1),
    ],
    ids=lambda a: type(a).__name__,
)
def test_sound_algorithms_pass(algorithm):
    check_algorithm(algorithm)


class Jittery(MAML):
    def objective(self, model, theta, trajectory, task, context):
        loss, prediction = super().objective(model, theta, trajectory, task, context)
        return loss * (1 + float(np.random.uniform())), prediction


class Restless(MAML):
    """Keeps state between calls."""

    calls = [0]

    def objective(self, model, theta, trajectory, task, context):
        self.calls[0] += 1
        loss, prediction = super().objective(model, theta, trajectory, task, context)
        return loss * self.calls[0], prediction


class Cut(MAML):
    """The last step is out of the graph."""

    def objective(self, model, theta, trajectory, task, context):
        return super().objective(model, theta, [trajectory[-1].detach()], task, context)


class Wrong(torch.autograd.Function):
    """Half of the gradient."""

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return grad * 0.5

    @staticmethod
    def vmap(info, in_dims, x):
        return Wrong.apply(x), in_dims[0]


class Halved(MAML):
    def objective(self, model, theta, trajectory, task, context):
        loss, prediction = super().objective(model, theta, trajectory, task, context)
        return Wrong.apply(loss), prediction


@dataclass(frozen=True)
class Forgetful(MAML):
    """First-order steps that ``descent`` does not state."""

    def step(self, descent, state, step):
        phi, moments = state
        gradient = torch.func.grad(descent.loss)(phi.detach(), step)
        return self.update(phi, gradient.detach(), descent.rate, moments)


@dataclass(frozen=True)
class Uphill(Reptile):
    def delta(self, theta, phi):
        return {name: -value for name, value in super().delta(theta, phi).items()}


@dataclass(frozen=True)
class Replacing(Reptile):
    """Contributes φ where the outer update subtracts a difference."""

    def delta(self, theta, phi):
        return {"model": phi[0]}


@dataclass(frozen=True)
class Partial(Reptile):
    """Leaves out the moments that it carries."""

    def delta(self, theta, phi):
        return {"model": theta["model"] - phi[0]}


@dataclass(frozen=True)
class Elsewhere(Reptile):
    def contribute(self, model, theta, trajectory, task, context):
        return {"modle": theta["model"] - trajectory[-1][0]}


@dataclass(frozen=True)
class Reshaped(Reptile):
    def delta(self, theta, phi):
        return {"model": (theta["model"] - phi[0]).map(lambda t: t.flatten()[:1])}


class Unlearned(MAML):
    def predict(self, model, phi, x):
        return super().predict(model, phi.detach(), x)


class Explosive(MAML):
    def objective(self, model, theta, trajectory, task, context):
        loss, prediction = super().objective(model, theta, trajectory, task, context)
        return loss / 0.0, prediction


class TooFew(InnerLoop):
    """Returns φ_k alone, where evaluation wants φ_0 … φ_k."""

    def descent(self, model, theta, support, context):
        phi = theta["model"]
        return Descent(self.support_loss(model, support, context), phi, self.inner_lr, self.fresh(phi))

    def adapt(self, model, theta, support, context):
        return super().adapt(model, theta, support, context)[-1:]

    def predict(self, model, phi, x):
        return model(phi, x)


class Nothing(Algorithm):
    pass


class Particular(MAML):
    def compatible(self, family, model):
        return "it learns from graphs alone"


@dataclass(frozen=True)
class Growing(MAML):
    extra: int = 1

    def __post_init__(self):
        object.__setattr__(self, "extra", self.extra + 1)


@pytest.mark.lane("numerics")
@pytest.mark.parametrize(
    ("algorithm", "error", "expected"),
    [
        (Jittery(), ImpureError, "from the global generator of numpy.random"),
        (Restless(), ImpureError, "keep nothing from one call to the next"),
        (Cut(), UnusableError, "the loss does not depend on"),
        (Halved(), WrongGradientError, "by finite differences (norm of the contribution"),
        (Forgetful(), WrongGradientError, "is the gradient of the loss that it reports"),
        (
            Uphill(),
            WrongGradientError,
            "minus its delta points downhill on quadratic tasks; found: at θ = 0.5 the cosine",
        ),
        (Replacing(), WrongGradientError, "return θ − φ_k (Reptile)"),
        (Partial(inner_momentum=0.9, moments="carried"), UnusableError, "leaves out slot 'inner_count'"),
        (Elsewhere(), UnusableError, "gives slot 'modle', which takes no contribution; expected some of model"),
        (Reshaped(), UnusableError, "contribute one tensor for each parameter of a slot"),
        (Unlearned(), UnusableError, "the loss does not depend on"),
        (Explosive(), UnusableError, "NaN or Inf"),
        (TooFew(inner_steps=2), ShapeError, "return φ_0 … φ_k from adapt(), one for each step of inner_steps"),
        (Nothing(), UnusableError, "fails on train tasks with inputs [6, 2] and targets [6, 2]: NotImplementedError"),
        (Particular(), UnusableError, "it learns from graphs alone"),
        (Growing(), RoundTripError, "extra is 2 and then 3"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_broken_algorithms_are_caught(algorithm, error, expected):
    caught(check_algorithm, algorithm, error, expected)


def test_an_approximation_on_purpose_passes_where_that_is_said():
    class Half(MAML):
        def objective(self, model, theta, trajectory, task, context):
            loss, prediction = super().objective(model, theta, trajectory, task, context)
            return loss.detach() + 0.5 * (loss - loss.detach()), prediction

    check_algorithm(Half(), exact_gradient=False)
    caught(check_algorithm, Half(), WrongGradientError, "pass exact_gradient=False")


def test_tasks_and_models_may_be_given():
    check_algorithm(MAML(), tasks=Blobs(outputs=2), model=nn.Linear(4, 2))
    check_algorithm(RL2(epochs=1, minibatches=1), model=Reactive((4,)))
    caught(check_algorithm, ProtoNet(), UnusableError, "these tasks have no classes", tasks=Curves())


class Noisy(RL2):
    def gradient(self, theta, trials, settings, context):
        slots, sums, weight = super().gradient(theta, trials, settings, context)
        return {n: p.map(lambda t: t + torch.randn_like(t)) for n, p in slots.items()}, sums, weight


class Averaging(RL2):
    """Divides by the number of its own shard's steps."""

    def gradient(self, theta, trials, settings, context):
        slots, sums, weight = super().gradient(theta, trials, settings, context)
        return {n: p / weight for n, p in slots.items()}, sums, weight


class Idle(RL2):
    def gradient(self, theta, trials, settings, context):
        slots, sums, weight = super().gradient(theta, trials, settings, context)
        return {n: p.zeros() for n, p in slots.items()}, sums, weight


class Silent(RL2):
    def evaluate(self, theta, context, inner_steps):
        return {n: v for n, v in super().evaluate(theta, context, inner_steps).items() if n != "greedy"}


@pytest.mark.parametrize(
    ("algorithm", "error", "expected"),
    [
        (Noisy(epochs=1, minibatches=1), ImpureError, "from the global generator of torch"),
        (Averaging(epochs=1, minibatches=1), InexactError, "the gradient over 6 trials is the same for any cutting"),
        (Idle(epochs=1, minibatches=1), ShapeError, "a meta-step changes the parameters"),
        (Silent(epochs=1, minibatches=1), ShapeError, "'greedy' is missing"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_broken_trial_algorithms_are_caught(algorithm, error, expected):
    caught(check_algorithm, algorithm, error, expected)


# Models ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model",
    [
        MLP(hidden=(4,), dropout=0.3),
        nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3)),
        lambda: nn.Linear(4, 3),
        GRU(hidden=4),
        Reactive((4,)),
    ],
    ids=lambda model: type(model).__name__,
)
def test_sound_models_pass(model):
    check_model(model)


def test_models_with_tasks_and_an_algorithm():
    check_model(Conv4(filters=2, blocks=2), tasks=Blobs(input_shape=(1, 6, 6)))
    check_model(ConditionalNeuralProcess(4, 4), tasks=Curves())
    caught(check_model, Conv4(), UnusableError, "pass tasks=… with inputs that the model takes")


@dataclass(frozen=True)
class Config:
    kind: str
    width: int = 5

    def build(self, input_shape, outputs):
        if self.kind == "no embedding" and outputs is None:
            return nn.Flatten(0)
        return Net(self.kind, input_shape[0], self.width, outputs or 2)


class Net(nn.Module):
    def __init__(self, kind, inputs, width, outputs):
        super().__init__()
        self.kind = kind
        self.first, self.last = nn.Linear(inputs, width), nn.Linear(width, outputs)
        if kind == "unseeded":
            nn.init.constant_(self.last.bias, random.random())
        if kind == "unused":
            self.other = nn.Linear(2, 2)
        if kind == "running":
            self.norm = nn.BatchNorm1d(width)
        if kind == "buffer":
            self.register_buffer("calls", torch.zeros(()))
        self.calls_seen = 0

    def forward(self, x):
        h = torch.tanh(self.first(x))
        if self.kind == "noise":
            h = h + 0.1 * np.random.normal()
        if self.kind == "memory":
            self.calls_seen += 1
            h = h + self.calls_seen
        if self.kind == "buffer":
            self.calls += 1
        if self.kind == "detached":
            h = h.detach()
        if self.kind == "wrong":
            h = Wrong.apply(h)
        if self.kind == "nan":
            h = h / 0.0
        if self.kind == "dropped":
            h = h * (torch.rand_like(h) > 0.5)
        if self.kind == "narrow":
            return self.last(h)[:, :-1]
        return self.last(h)


@pytest.mark.parametrize(
    ("kind", "error", "expected"),
    [
        ("unseeded", ImpureError, "the same seed gives the same parameters and buffers; found: last.bias[0] is"),
        ("unused", UnusableError, "the loss does not depend on other.weight, other.bias"),
        ("running", UnusableError, "running statistics"),
        ("noise", ImpureError, "the same input gives the same output"),
        ("memory", ImpureError, "keep no state between calls"),
        ("detached", UnusableError, "the loss does not depend on first.weight"),
        ("wrong", WrongGradientError, "by finite differences"),
        ("nan", ShapeError, "outputs are finite"),
        ("dropped", ImpureError, "use torch.nn.Dropout, which metadist keys by the task"),
        ("narrow", UnusableError, "puts out shape [6, 2]"),
        ("no embedding", ShapeError, "build(input_shape, None) builds an embedding [N, …]"),
    ],
)
def test_broken_models_are_caught(kind, error, expected):
    with pytest.raises(error) as found:
        check_model(Config(kind))
    assert expected in str(found.value)
    assert "remedy: " in str(found.value)


def test_a_buffer_that_counts_calls_is_caught():
    with pytest.raises(UnusableError, match="in-place operation|in place"):
        check_model(Config("buffer"))


def test_a_sound_model_of_the_same_make_passes():
    check_model(Config("sound"))


@dataclass(frozen=True)
class Policy:
    kind: str = "sound"

    def build_policy(self, observation, action, continuous):
        return PolicyNet(self.kind, observation + action + 2, 2 * action if continuous else action)


class PolicyNet(nn.Module):
    sees_history = True

    def __init__(self, kind, features, head):
        super().__init__()
        self.kind, self.memory_size = kind, 4
        self.memory, self.head, self.value = nn.Linear(features + 4, 4), nn.Linear(4, head), nn.Linear(4, 1)
        if kind == "bare":
            del self.memory_size

    def forward(self, features, memory):
        found: list[torch.Tensor] = []
        steps: Sequence[torch.Tensor] = features.unbind(1)
        for t, x in enumerate(steps):
            if self.kind == "batch":
                x = x - x.mean(0)
            if self.kind == "future":
                x = x + steps[-1]
            memory = torch.tanh(self.memory(torch.cat([x, memory if self.kind != "amnesia" or t else 0 * memory], -1)))
            found.append(memory)
        h = torch.stack(found, 1)
        value = self.value(h)
        return self.head(h), value if self.kind == "column" else value.squeeze(-1), memory


@pytest.mark.parametrize(
    ("kind", "error", "expected"),
    [
        ("batch", RowError, "a policy treats the trials of a batch apart; found: head of a trial differs by"),
        ("future", InexactError, "let no step see later ones"),
        ("amnesia", InexactError, "let the memory hold all that later steps need"),
        ("column", ShapeError, "value is a finite tensor [3, 5]; found: it is [3, 5, 1]"),
        ("bare", UnusableError, "memory_size"),
    ],
)
def test_broken_policies_are_caught(kind, error, expected):
    with pytest.raises(error) as found:
        check_model(Policy(kind))
    assert expected in str(found.value)


def test_a_sound_policy_passes():
    check_model(Policy())


def test_the_checks_leave_the_process_as_it_was():
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    expected = torch.rand(3), np.random.rand(3), random.random()
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        check_algorithm(replace(MAML(), inner_steps=1))
        check_model(MLP(hidden=(3,)))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert torch.rand(3).equal(expected[0])
    assert (np.random.rand(3) == expected[1]).all()
    assert random.random() == expected[2]


@pytest.mark.lane("services")
def test_importing_it_imports_neither_pytest_nor_ray():
    import subprocess
    import sys

    code = "import sys, metadist.testing; print(sorted({'pytest', 'ray', 'mlflow', 'grpc'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
