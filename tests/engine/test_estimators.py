"""The estimators of gradients over windows, against plain autograd over the whole unroll in float64."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch.func import vmap

from metadist.core.carried import CarriedContext
from metadist.core.engine import Engine
from metadist.core.errors import ConfigError
from metadist.core.model import Model
from metadist.core.parameters import Parameters
from metadist.core.random import TaskKey
from metadist.engine.estimators import Unrolled, perturbation
from metadist.testing.quadratics import Linear, Quadratics

SIZE = 3


@dataclass(frozen=True, kw_only=True)
class Recurrent(Unrolled):
    """x ← tanh(W x + u) with keyed inputs u, from a learned x_0; the loss of a step is ½ ‖x − 1‖²."""

    def begin(self, theta, context):
        return torch.zeros(SIZE, dtype=torch.float64)

    def enter(self, theta, inner, context):
        return theta["model"]["x0"] * 1.0

    def inner_step(self, theta, inner, context, index):
        u = context.key.stream("u", step=index).normal(SIZE).double()
        x = torch.tanh(theta["model"]["w"] @ inner + u)
        return x, (x - 1).square().sum() / 2


@dataclass(frozen=True, kw_only=True)
class Delayed(Unrolled):
    """y ← y + θ, and the loss ½ ‖y_before − 3 θ + 20‖²: θ lowers z at once, and raises it in every later step."""

    def begin(self, theta, context):
        return torch.zeros(2, dtype=torch.float64)

    def inner_step(self, theta, inner, context, index):
        t = theta["model"]["t"]
        return inner + t, (inner - 3 * t + 20).square().sum() / 2


MODEL = Model(lambda: Linear().build((3,), 1), dtype=torch.float64)


def context_of(key, life, age, differentiation):
    engine = Engine(differentiation=differentiation)
    task = Quadratics().sample(TaskKey.of(0, "train", 0, [0]), "train")
    model = MODEL.bind({}, key, True, engine)
    return CarriedContext(key, key.meta_step, True, Quadratics(), life=life, age=age, task=task, model=model)


def advanced(algorithm, theta, differentiation, windows, particles=1):
    """The contributions of ``windows`` windows from a start on, [windows, particles, …] by name."""
    tasks = torch.arange(particles)

    def life(index):
        first = TaskKey(0, "train", 0, index)
        state, found = algorithm.start(theta, context_of(first, first, 0, differentiation)), []
        for window in range(windows):
            context = context_of(replace(first, meta_step=window), first, window == 0, differentiation)
            context = replace(context, age=torch.tensor(window))
            state, contribution = algorithm.advance(theta, state, context)
            found.append((contribution.slots["model"], contribution.metrics["loss"]))
        return found

    return vmap(life)(tasks)


def plain(algorithm, theta, windows):
    """The gradient of the mean over all windows' losses, by autograd through the whole unroll of particle 0."""
    leaves = {n: t.clone().requires_grad_() for n, t in theta["model"].items()}
    given = {"model": Parameters(leaves)}
    key = TaskKey(0, "train", 0, torch.tensor(0))
    x = algorithm.enter(given, algorithm.begin(given, None), None)
    losses = []
    for window in range(windows):
        context = context_of(replace(key, meta_step=window), key, window, "truncated")
        for index in range(algorithm.window):
            x, loss = algorithm.inner_step(given, x, context, index)
            losses.append(loss)
    torch.stack(losses).mean().backward()
    return {n: t.grad for n, t in leaves.items()}


def recurrent():
    generator = torch.Generator().manual_seed(0)
    w, x0 = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((SIZE, SIZE), (SIZE,)))
    return {"model": Parameters({"w": w, "x0": x0})}


DELAYED = {"model": Parameters({"t": torch.tensor([0.3, -0.2], dtype=torch.float64)})}


def test_truncated_with_the_window_as_long_as_the_unroll_is_the_full_gradient():
    theta, algorithm = recurrent(), Recurrent(window=12, unroll=12)
    ((gradient, _),) = advanced(algorithm, theta, "truncated", 1)
    for name, expected in plain(algorithm, theta, 1).items():
        assert (gradient[name][0] - expected).abs().max() < 1e-10, name


def test_truncated_with_a_shorter_window_differentiates_each_window_alone():
    theta, algorithm = recurrent(), Recurrent(window=4, unroll=12)
    found = advanced(algorithm, theta, "truncated", 3)
    full = plain(algorithm, theta, 3)
    assert (found[1][0]["x0"] == 0).all() and (found[0][0]["x0"] != 0).all()
    mean = sum(gradient["w"][0] for gradient, _ in found) / 3
    assert (mean - full["w"]).norm() > 0.02 * full["w"].norm()


def test_the_truncated_gradient_of_a_delayed_effect_is_wrong():
    algorithm = Delayed(window=2, unroll=16)
    found = advanced(algorithm, DELAYED, "truncated", 8)
    mean, full = sum(g["t"][0] for g, _ in found) / 8, plain(algorithm, DELAYED, 8)["t"]
    assert (mean * full < 0).all(), (mean, full)


def off(samples, expected):
    """The largest distance between the mean of ``samples`` and ``expected``, in standard errors."""
    error = samples.std(0) / len(samples) ** 0.5
    return ((samples.mean(0) - expected).abs() / error).max()


@pytest.mark.lane("numerics")
def test_the_mean_of_pes_is_the_full_gradient():
    """The loss is quadratic in θ, so that smoothing changes no gradient. 1e5 keys."""
    algorithm = Delayed(window=2, unroll=16, sigma=0.1)
    found = advanced(algorithm, DELAYED, "pes", 8, 100_000)
    samples, full = sum(g["t"] for g, _ in found) / 8, plain(algorithm, DELAYED, 8)["t"]
    assert off(samples, full) < 3
    assert off(samples, torch.zeros(2)) > 30  # the estimate is not just noise


@pytest.mark.lane("numerics")
def test_the_mean_of_es_over_a_whole_unroll_is_the_full_gradient_and_over_a_window_that_of_the_window():
    whole, window = Delayed(window=16, unroll=16, sigma=0.1), Delayed(window=2, unroll=16, sigma=0.1)
    ((samples, _),) = advanced(whole, DELAYED, "es", 1, 100_000)
    full = plain(whole, DELAYED, 1)["t"]
    assert off(samples["t"], full) < 3 and off(samples["t"], torch.zeros(2)) > 30
    found = advanced(window, DELAYED, "es", 8, 20_000)
    truncated = sum(g["t"][0] for g, _ in advanced(window, DELAYED, "truncated", 8)) / 8
    assert off(sum(g["t"] for g, _ in found) / 8, truncated) < 3


def test_pes_forgets_the_noise_of_earlier_windows_at_a_new_start():
    algorithm = Delayed(window=2, unroll=4, sigma=0.1)
    key = TaskKey(0, "train", 5, torch.tensor(3))
    context = context_of(key, key, 0, "pes")
    state, contribution = algorithm.advance(DELAYED, algorithm.start(DELAYED, context), context)
    noise = contribution.slots["model"]["t"] / state.noise["model"]["t"]
    assert torch.allclose(noise, noise[0].expand(2), rtol=1e-12)
    later = context_of(replace(key, meta_step=6), key, 1, "pes")
    after, _ = algorithm.advance(DELAYED, state, later)

    new = perturbation(DELAYED, later.key, 0.1)["model"]["t"]
    assert torch.equal(after.noise["model"]["t"], state.noise["model"]["t"] + new)


def test_lifetimes_are_log_uniform_in_windows():
    algorithm = Delayed(window=20, unroll=(100, 2000))
    lives = [
        algorithm.lifetime(context_of(TaskKey(0, "train", 0, torch.tensor(i)), None, 0, "pes")) for i in range(200)
    ]
    assert min(lives) >= 5 and max(lives) <= 100
    below = sum(life * 20 < (100 * 2000) ** 0.5 for life in lives)
    assert 80 < below < 120
    with pytest.raises(
        ConfigError, match="algorithm.unroll: 100 is no multiple of algorithm.window: 30; use 90 or 120"
    ):
        Delayed(window=30, unroll=100)
    assert (
        Delayed(window=20, unroll=100).lifetime(context_of(TaskKey(0, "train", 0, torch.tensor(0)), None, 0, "es")) == 5
    )


@pytest.mark.parametrize("wrong", [{"unroll": 10}, {"unroll": (100, 50)}, {"sigma": 0.0}, {"window": 0}])
def test_settings_that_make_no_unroll_are_refused(wrong):
    with pytest.raises(ConfigError, match=f"algorithm.{next(iter(wrong))}"):
        Delayed(**{"window": 20, **wrong})


def test_an_evaluation_begins_from_the_learned_state():
    """Reference: the recurrence in plain Python from x_0, as training has it; ``begin`` alone is zero."""
    theta = {"model": Parameters({"w": torch.eye(SIZE).double() / 2, "x0": torch.full((SIZE,), 0.7).double()})}
    key = TaskKey(0, "test", 0, torch.tensor(0))
    context = replace(context_of(key, key, 0, "pes"), training=False)
    algorithm = Recurrent(window=2, unroll=4)
    state = algorithm.step(theta, algorithm.start(theta, context), context, 0)
    u = key.stream("u", step=0).normal(SIZE).double()
    assert torch.equal(state, torch.tanh(theta["model"]["w"] @ theta["model"]["x0"] + u))
