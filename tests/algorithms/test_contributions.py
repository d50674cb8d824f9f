"""Contributions by slot: a gradient to one slot, a delta to another, a statistic to a third; against a plain loop."""

from dataclasses import dataclass

import plain
import pytest
import torch
from gradient_cases import MODELS, make, plain_contribution, plain_objective
from toys import keys, relative_error, somewhere, train

from metadist.algorithms import MAML, Reptile
from metadist.core.engine import Engine
from metadist.core.errors import ConfigError
from metadist.core.inner_loop import Descent
from metadist.core.outer import OuterLoop
from metadist.core.parameters import Layout, Parameters
from metadist.core.state import Slot
from metadist.engine.meta_gradient import MetaGradient
from metadist.testing import check_algorithm


@dataclass(frozen=True)
class Mixture(MAML):
    """The body by MAML's gradient; an offset of the rates by a delta; the mean support loss at φ_k as a statistic."""

    def slots(self, model, parameters):
        ones = parameters.map(torch.ones_like)
        seen = Parameters({"loss": next(iter(parameters.values())).new_zeros(())})
        return {
            "scale": (Slot(Layout.of(ones)), ones),
            "seen": (Slot(Layout.of(seen), "average"), seen),
            "fixed": (Slot(Layout.of(seen), "constant"), seen),
        }

    def descent(self, model, theta, support, context):
        phi = theta["model"]
        rates = theta["scale"] * self.inner_lr
        return Descent(self.support_loss(model, support, context), phi, rates, self.fresh(phi))

    def contribute(self, model, theta, trajectory, task, context):
        phi = trajectory[-1]
        loss = context.loss(model(phi, task.support.x), task.support)
        return {"scale": theta["model"] - phi, "seen": Parameters({"loss": loss})}


@dataclass(frozen=True)
class Everything(Mixture):
    def contribute(self, model, theta, trajectory, task, context):
        return {**super().contribute(model, theta, trajectory, task, context), "model": trajectory[-1]}


def objective(learner, theta, key, task):
    """MAML's query loss with one rate for each parameter: ``plain_objective`` reads rates in slot ``inner_lr``."""
    rates = {n: t * learner.algorithm.inner_lr for n, t in theta["scale"].items()}
    return plain_objective(learner, {**theta, "inner_lr": rates}, key, task)


def own_contributions(learner, theta, shard):
    """Σ over tasks of θ − φ_k and of the support loss at φ_k, by a loop with ordinary autograd."""
    algorithm, family = learner.algorithm, learner.tasks
    delta, seen = 0.0, 0.0
    for key in shard.each():
        task = family.sample_task(key, key.split).to(torch.device("cpu"), torch.float64)
        model = plain.Plain(learner.model.module, None)
        start = {n: t.clone().requires_grad_() for n, t in theta["model"].items()}
        rates = {n: t * algorithm.inner_lr for n, t in theta["scale"].items()}

        def loss(phi, step, model=model, task=task):
            return plain.loss(family, model(phi, task.support.x, step=step), task.support)

        phi = plain.descend(loss, start, rates, algorithm.inner_steps)
        delta = delta + torch.cat([(start[n] - phi[n]).detach().flatten() for n in start])
        seen += float(loss(phi, 0).detach())
    return delta, seen


ENGINES = {
    "eager": Engine(),
    "mixed": Engine(differentiation="mixed"),
    "mixed in reverse": Engine(differentiation="mixed", hessian="reverse"),
    "compiled": Engine(compile=True),
    "compiled mixed": Engine(compile=True, differentiation="mixed"),
}
COMPILED = pytest.mark.lane("compile")


@pytest.mark.parametrize(
    "engine",
    [pytest.param(e, marks=[COMPILED] * ("compiled" in e) + [pytest.mark.long] * (e == "compiled")) for e in ENGINES],
)
def test_each_slot_has_its_own_contribution(engine):
    subject, shard = make(Mixture(inner_lr=0.1, inner_steps=2), "mlp"), keys(0, 1, 5)
    theta = somewhere(subject)
    expected, loss = plain_contribution(subject, theta, shard, objective)
    delta, seen = own_contributions(subject, theta, shard)
    subject.set_engine(ENGINES[engine])
    got = subject.contribute(theta, shard, 3)
    assert set(got.slots) == {"model", "scale", "seen"}
    assert relative_error(got.slots["model"], expected["model"]) <= 1e-10
    assert relative_error(got.slots["scale"], delta) <= 1e-12
    assert relative_error(expected["scale"], delta) > 1e-2, "the slot would have another gradient of its own"
    assert float(got.slots["seen"]) == pytest.approx(seen, rel=1e-12)
    assert got.metrics["loss"] == pytest.approx(loss, rel=1e-12)


def test_slots_that_are_not_given_are_differentiated_and_the_given_ones_are_not():
    mixture, everything, reptile = (make(kind(inner_steps=2), "mlp") for kind in (Mixture, Everything, Reptile))
    assert mixture.meta_gradient.learned == ("model",)
    assert mixture.meta_gradient.given == {"scale", "seen"}
    for subject in (everything, reptile):
        assert subject.meta_gradient.learned == ()
        assert "differentiates through nothing" in subject.meta_gradient.cannot_walk_back
    assert [s.algorithm.contribution for s in (mixture, reptile)] == ["by slot", "delta"]


def test_a_meta_step_updates_each_slot_by_its_rule():
    outer = OuterLoop(optimizer="sgd", lr=0.5, meta_batch_size=5, shard_size=2, meta_steps=1)
    subject = make(Mixture(inner_lr=0.1), "mlp", outer=outer)
    before, after = subject.initial(0), train(subject, 1)
    theta = {n: p.map(torch.clone) for n, p in before.theta(subject.slots).items()}
    shard = keys(0, 1, 2, 3, 4, seed=0, meta_step=0)
    gradient, _ = plain_contribution(subject, theta, shard, objective)
    delta, seen = own_contributions(subject, theta, shard)
    assert relative_error(before.slots["model"] - after.slots["model"], 0.5 * gradient["model"] / 5) < 1e-10
    assert relative_error(before.slots["scale"] - after.slots["scale"], 0.5 * delta / 5) < 1e-10
    assert float(after.slots["seen"]) == pytest.approx(seen / 5, rel=1e-12)
    assert after.slots["fixed"].equal(before.slots["fixed"])


@pytest.mark.lane("numerics")
def test_it_passes_the_check_of_algorithms():
    check_algorithm(Mixture(inner_steps=2))


class Constant(Mixture):
    def contribute(self, model, theta, trajectory, task, context):
        return {**super().contribute(model, theta, trajectory, task, context), "fixed": theta["fixed"]}


class Misnamed(Mixture):
    def contribute(self, model, theta, trajectory, task, context):
        return {**super().contribute(model, theta, trajectory, task, context), "scale": Parameters({})}


class Closed(Mixture):
    receivers = ("model", "frozen")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Constant, "gives slot 'fixed', which takes no contribution; expected some of model, scale, seen"),
        (Misnamed, r"gives no '\S+' of slot 'scale', which has '\S+' \[\d+"),
        (Closed, "names 'frozen' in receivers, which is no slot that takes contributions"),
    ],
)
def test_contributions_that_no_slot_takes_are_refused_before_the_run(kind, message):
    with pytest.raises(ConfigError, match=message):
        make(kind(), "mlp").dry_run(0)


def test_nothing_is_tried_for_algorithms_that_contribute_gradients(monkeypatch):
    """Their set-up costs no adaptation."""
    subject = make(MAML(), "mlp")
    monkeypatch.setattr(type(subject), "sample", lambda *_: pytest.fail("sampled"))
    assert isinstance(subject.meta_gradient, MetaGradient)
    assert "mlp" in MODELS
