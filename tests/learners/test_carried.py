"""Particles: the learner against a plain population, the toy against plain autograd, and what the dry run refuses."""

from __future__ import annotations

from dataclasses import dataclass, replace

import particles
import pytest
import torch

from metadist.core.carried import CarriedContribution
from metadist.core.computation import Advance
from metadist.core.errors import ConfigError, NonFiniteError
from metadist.core.outer import OuterLoop
from metadist.core.parameters import Parameters
from metadist.core.round import EvaluationRequest, MetaStepKey, Shard
from metadist.core.state import Contribution, Records
from metadist.testing import InexactError, check_algorithm
from metadist.testing.carried import LearnedRate, Population
from metadist.testing.quadratics import Quadratics
from metadist.testing.running import compute, compute_round, meta_step

SGD = OuterLoop(optimizer="sgd", lr=0.02, meta_batch_size=5, shard_size=2)


def trained(learner, steps, seed=0):
    state, outputs = learner.initial(seed), {}
    for number in range(steps):
        run = lambda round: compute_round(learner, round, outputs, {})  # noqa: E731
        state = meta_step(learner, state, number, seed, run=run).state
    return state, outputs


@pytest.mark.parametrize("vectorized", [True, False])
def test_a_population_in_plain_python_takes_the_same_meta_steps(vectorized):
    """Reference: particles that advance one by one, a plain mean and plain gradient descent, in float64."""
    kind = type("Kind", (LearnedRate,), {"vectorized": vectorized})
    algorithm = kind(window=2, windows=3)
    learner = particles.learner(algorithm, dtype=torch.float64, outer=SGD)
    state, _ = trained(learner, 7)
    population = Population(algorithm, learner.model, learner.tasks, size=5)
    theta = learner.initial(0).theta(learner.slots)
    for number in range(7):
        each = population.advance(theta, number)
        mean = sum(c.slots["rate"]["log_rate"] for c in each) / 5
        theta = {**theta, "rate": Parameters({"log_rate": theta["rate"]["log_rate"] - 0.02 * mean})}
    assert abs(float(state.slots["rate"]) - float(theta["rate"]["log_rate"])) < 1e-12
    assert float(state.slots["rate"]) != float(learner.initial(0).slots["rate"])
    assert len({p.started for p in population.particles.values()}) > 1, "starts are staggered"


def plain_gradient(task, phi, rate, steps, query):
    """∂/∂log-rate of the mean query loss after each step of gradient descent: autograd through a plain loop."""
    log_rate = torch.tensor(rate, dtype=torch.float64).log().requires_grad_()
    x, y, losses = task.support.x.double(), task.support.y.double(), []
    phi = phi.clone().requires_grad_()
    for step in range(steps):
        loss = ((x @ phi.T - y) ** 2).mean()
        phi = phi - log_rate.exp() * torch.autograd.grad(loss, phi, create_graph=True)[0]
        if step in query:
            losses.append(((task.query.x.double() @ phi.T - task.query.y.double()) ** 2).mean())
    return float(torch.autograd.grad(torch.stack(losses).mean(), log_rate)[0]), phi.detach()


def test_a_window_as_long_as_the_unroll_has_the_full_gradient_and_a_shorter_one_has_not():
    def contributions(window, windows):
        algorithm = type("Together", (LearnedRate,), {"staggered": False})(window=window, windows=windows, rate=0.05)
        learner = particles.learner(algorithm, dtype=torch.float64)
        population = Population(algorithm, learner.model, Quadratics(), size=1)
        theta = learner.initial(0).theta(learner.slots)
        start = population.context(theta, 0, 0, 0).fresh()["weight"]
        task = population.context(theta, 0, 0, 0).task
        return [float(population.advance(theta, t)[0].slots["rate"]["log_rate"]) for t in range(windows)], start, task

    [whole], start, task = contributions(6, 1)
    full, _ = plain_gradient(task, start, 0.05, 6, range(6))
    assert whole == pytest.approx(full, rel=1e-10)
    parts, start, task = contributions(2, 3)
    for number, part in enumerate(parts):  # each is the gradient of its own window, from the carried state on
        _, begin = plain_gradient(task, start, 0.05, 2 * number, [0]) if number else (0, start)
        expected, _ = plain_gradient(task, begin, 0.05, 2, range(2))
        assert part == pytest.approx(expected, rel=1e-10)
    assert sum(parts) / 3 != pytest.approx(full, rel=1e-3), "truncation is a bias"


def test_evaluation_starts_afresh_and_goes_on_beyond_training():
    learner = particles.learner(LearnedRate(window=1, windows=2, rate=0.05), dtype=torch.float64)
    state = learner.initial(0)
    request = EvaluationRequest(MetaStepKey("run", 3, 0), "test", 3, 20)
    records = compute_round(learner, learner.evaluation(request, state), {}, {})
    assert records.columns["loss"].shape == (3, 21)
    population = Population(learner.algorithm, learner.model, learner.tasks, size=3)
    theta = state.theta(learner.slots)
    for number in range(3):
        context = population.context(theta, number, 0, 0, "test")
        _, phi = plain_gradient(context.task, context.fresh()["weight"], 0.05, 20, [0])
        loss = ((context.task.query.x @ phi.T - context.task.query.y) ** 2).mean()
        assert float(records.columns["loss"][number, 20]) == pytest.approx(float(loss), rel=1e-10)
        assert float(records.columns["mse"][number, 20]) == pytest.approx(float(loss), rel=1e-10)
    assert learner.summarise(request, records).score == pytest.approx(float(records.columns["mse"][:, 20].mean()))


def test_the_states_of_a_shard_have_the_same_bits_whichever_way_they_came():
    """A state that was encoded, decoded and advanced again is the state itself."""
    learner = particles.learner()
    state, outputs = trained(learner, 4)
    shard = learner.carried(MetaStepKey("check", 4, 0))[0]
    copied = {key: Records({n: c.clone() for n, c in r.columns.items()}) for key, r in outputs.items()}
    assert (
        compute(learner, shard, state, copied)
        .slots["rate"]
        .equal(compute(learner, shard, state, outputs).slots["rate"])
    )


# ---- particles that diverge


@dataclass(frozen=True)
class Diverging(LearnedRate):
    """Particle 3 has a state of infinity in meta-step 2."""

    def advance(self, theta, state, context):
        state, contribution = super().advance(theta, state, context)
        bad = (context.particle == 3) & torch.as_tensor(context.meta_step == 2)
        return {**state, "phi": state["phi"].map(lambda t: torch.where(bad, t / 0, t))}, contribution


def test_a_particle_that_diverges_ends_the_run_or_starts_afresh():
    with pytest.raises(NonFiniteError, match=r"particles \[3\] gave NaN or Inf \(seed 0, meta-step 2\)") as caught:
        trained(particles.learner(Diverging(windows=50)), 3)
    assert caught.value.tasks == (3,)
    learner = particles.learner(Diverging(windows=50), non_finite="skip")
    _, outputs = trained(learner, 5)
    assert outputs[2, 0, 1].columns["ends"].tolist()[1] == 3
    assert outputs[3, 0, 1].columns["started"].tolist() == [0, 3]
    assert all(bool(torch.isfinite(c).all()) for c in outputs[2, 0, 1].columns.values())
    assert learner.leaves_out_tasks


# ---- the dry run


@dataclass(frozen=True)
class Drawing(LearnedRate):
    def start(self, theta, context):
        return {**super().start(theta, context), "noise": torch.rand(2)}


@dataclass(frozen=True)
class Growing(LearnedRate):
    def advance(self, theta, state, context):
        state, contribution = super().advance(theta, state, context)
        return {**state, "steps": state["steps"].double()}, contribution


@dataclass(frozen=True)
class Silent(LearnedRate):
    def advance(self, theta, state, context):
        state, contribution = super().advance(theta, state, context)
        return state, CarriedContribution({}, contribution.metrics)


@dataclass(frozen=True)
class Complex(LearnedRate):
    def start(self, theta, context):
        return {**super().start(theta, context), "waves": torch.zeros(2, dtype=torch.complex64)}


@dataclass(frozen=True)
class Broken(LearnedRate):
    def start(self, theta, context):
        raise ValueError("no such start")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Drawing, "gives another contribution or state when the same particles are advanced again"),
        (
            Growing,
            r"'Growing'.advance returns tensor . of the state as \[\] torch.float64, and start as \[\] torch.int64",
        ),
        (Silent, "'Silent'.advance contributes to the slots none; expected rate"),
        (Complex, "of the state of 'Complex' is torch.complex64; one of float64, .* travels between workers"),
        (Broken, r"particles of 'Broken' can't be advanced: ValueError: no such start \(.*test_carried.py"),
    ],
)
def test_the_dry_run_refuses(kind, message):
    with pytest.raises(ConfigError, match=message):
        particles.learner(kind()).dry_run(0)


def test_the_dry_run_accepts_the_toy_and_finds_its_hashes_again():
    learner = particles.learner()
    learner.dry_run(0)
    assert learner.sampled_hashes(0) == particles.learner().sampled_hashes(0)
    assert any(name.startswith("states") for name in learner.sampled_hashes(0))


def test_the_population_can_not_change_its_size():
    with pytest.raises(ConfigError, match="outer.meta_batch_size: 7; the run has a population of 5 particles"):
        particles.learner().with_meta_batch_size(7)


def test_weights_count_by_slot_and_metric():
    """Σ w·g / Σ w, by hand, for particles of different weights."""

    @dataclass(frozen=True)
    class Weighted(LearnedRate):
        def advance(self, theta, state, context):
            state, contribution = super().advance(theta, state, context)
            return state, replace(contribution, weight=1.0 + context.particle)

    learner = particles.learner(Weighted(), dtype=torch.float64)
    shard = Shard("check", 0, 0, 0, Advance(), 0, 5, 0, keeps=True)
    found = learner.compute(shard, learner.initial(0).slots).result
    population = Population(Weighted(), learner.model, learner.tasks, size=5)
    each = population.advance(learner.initial(0).theta(learner.slots), 0)
    assert found.weight == 15.0
    by_hand = sum((1.0 + i) * float(c.slots["rate"]["log_rate"]) for i, c in enumerate(each))
    assert float(found.slots["rate"]) == pytest.approx(by_hand, rel=1e-12)
    losses = sum((1.0 + i) * float(c.metrics["loss"]) for i, c in enumerate(each))
    assert found.metrics["loss"] == pytest.approx(losses, rel=1e-12)
    assert isinstance(found, Contribution)


# ---- metadist.testing


@pytest.mark.lane("numerics")
def test_the_toy_has_all_properties():
    check_algorithm(LearnedRate(windows=2))


@dataclass(frozen=True)
class Neighbourly(LearnedRate):
    """Uses a value that is another one under vmap."""

    def advance(self, theta, state, context):
        state, contribution = super().advance(theta, state, context)
        alone = torch._C._functorch.peek_interpreter_stack() is None
        return state, replace(contribution, weight=1.0 + alone)


@pytest.mark.lane("numerics")
def test_a_particle_that_differs_under_vmap_is_found():
    with pytest.raises(InexactError, match="particles advance the same way under vmap in shards, and one by one"):
        check_algorithm(Neighbourly(windows=2))
