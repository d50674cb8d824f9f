"""Implicit gradients against exact solutions by ``torch.linalg.solve``, and against unrolled loops that converge."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from gradient_cases import make
from torch.utils import _pytree as pytree
from toys import Blobs, Curves, keys, learner, relative_error, somewhere, train

from metadist.algorithms import ANIL, IMAML, MAML, MetaSGD, ProtoNet, Reptile
from metadist.config.engine import EngineSettings
from metadist.core.algorithm import TaskContext
from metadist.core.engine import Engine
from metadist.core.errors import ConfigError
from metadist.core.outer import OuterLoop
from metadist.core.parameters import Layout
from metadist.core.random import TaskKey
from metadist.core.state import Slot
from metadist.engine import implicit
from metadist.engine.agreement import compiled_disagrees
from metadist.engine.memory import footprint
from metadist.engine.plan import Device
from metadist.models import MLP
from metadist.testing import quadratics

HESSIANS = ("forward", "reverse")
IMPLICIT = Engine(differentiation="implicit")
CPU = Device("cpu", "a processor", 2**36, None)


def small(algorithm=IMAML(), **options):
    return learner(algorithm, lambda: MLP(hidden=(4,), activation="tanh").build((2,), 2), Curves(), **options)


def under(subject, engine, theta, shard):
    subject.set_engine(engine)
    return subject.contribute(theta, shard, 3)


# On quadratics, whose minimum is known --------------------------------------------------------------------------------


def quadratic(algorithm):
    family = quadratics.Quadratics(dimension=3, rows=7)
    return learner(algorithm, lambda: quadratics.Linear().build(family.input_shape, 1), family)


def exact_on_quadratics(subject, theta, shard, strength):
    """Return Σ λ (H + λI)⁻¹ B (φ* − d) over the tasks, with φ* = (H + λI)⁻¹ (H c + λθ)."""
    tasks, total, start = subject.sample(shard), 0.0, theta["model"]["weight"].flatten()
    for i in range(len(shard.tasks)):
        task = pytree.tree_map(lambda t, i=i: t[i], tasks)
        h = quadratics.hessian(task.support)
        a = h + strength * torch.eye(len(h), dtype=torch.float64)
        phi = torch.linalg.solve(a, h @ quadratics.optimum(task.support) + strength * start)
        pull = quadratics.hessian(task.query) @ (phi - quadratics.optimum(task.query))
        total = total + strength * torch.linalg.solve(a, pull)
    return total


@pytest.mark.parametrize("engine", [Engine(), Engine(differentiation="mixed"), IMPLICIT], ids=str)
def test_every_way_of_differentiating_ends_at_the_exact_gradient_of_a_quadratic(engine):
    """The inner loop converges: the gradient of its steps is then that of its minimum."""
    subject = quadratic(IMAML(inner_lr=0.15, inner_steps=80, damping=0.0))
    theta = somewhere(subject)
    got = under(subject, engine, theta, keys(0, 1, 5)).slots["model"]
    assert relative_error(got, exact_on_quadratics(subject, theta, keys(0, 1, 5), 2.0)) < 1e-9


@pytest.mark.parametrize(("solver", "iterations"), [("cg", 3), ("neumann", 60)])
@pytest.mark.parametrize("hessian", HESSIANS)
def test_both_solvers_on_a_quadratic(solver, iterations, hessian):
    """Conjugate gradients are exact after as many steps as there are parameters."""
    algorithm = IMAML(inner_lr=0.15, inner_steps=80, damping=0.0, solver=solver, solver_iterations=iterations)
    subject = quadratic(algorithm)
    theta = somewhere(subject)
    got = under(subject, replace(IMPLICIT, hessian=hessian), theta, keys(0, 1)).slots["model"]
    assert relative_error(got, exact_on_quadratics(subject, theta, keys(0, 1), 2.0)) < 1e-9


# On networks, at any φ_k: the linear system by the whole Hessian matrix -----------------------------------------------


def by_linear_algebra(subject, theta, shard, damping):
    """Return Σ over tasks of ∂F/∂θ − (∂²g/∂θ∂φ) (∂²g/∂φ² + δI)⁻¹ ∂F/∂φ: whole matrices, by ordinary autograd."""
    tasks, total = subject.sample(shard), {}
    for i, key in enumerate(shard.each()):
        task = pytree.tree_map(lambda t, i=i: t[i], tasks)
        for name, vector in _one_by_linear_algebra(subject, theta, key, task, damping).items():
            total[name] = total.get(name, 0.0) + vector
    return total


def _one_by_linear_algebra(subject, theta, key, task, damping):
    algorithm, layouts = subject.algorithm, {n: slot.layout for n, slot in subject.slots.items()}
    learned = [n for n, slot in subject.slots.items() if slot.rule == "gradient"]
    context, model = TaskContext(key, 3, True, subject.tasks), subject.bind(theta, key, True)
    with torch.no_grad():
        phi = algorithm.adapt(model, theta, task.support, context)[-1]
    at = layouts["model"].flatten(phi).clone().requires_grad_()

    def inner(vector, *slots):
        given = {**theta, **{n: layouts[n].unflatten(s) for n, s in zip(learned, slots)}}
        descent = algorithm.descent(model, given, task.support, context)
        return descent.loss(layouts["model"].unflatten(vector), algorithm.inner_steps - 1)

    prediction = algorithm.predict(model, layouts["model"].unflatten(at), task.query.x)
    (v,) = torch.autograd.grad(context.loss(prediction, task.query), at)
    slots = [layouts[n].flatten(theta[n]).clone() for n in learned]
    blocks = torch.autograd.functional.hessian(inner, (at.detach(), *slots))[0]
    x = torch.linalg.solve(blocks[0] + damping * torch.eye(len(v), dtype=torch.float64), v)
    return {name: -block.T @ x for name, block in zip(learned, blocks[1:])}


@pytest.mark.lane("numerics")
@pytest.mark.parametrize("hessian", HESSIANS)
@pytest.mark.parametrize(
    "solver",
    [
        {"solver": "cg", "solver_iterations": 30},
        {"solver": "neumann", "solver_iterations": 80, "neumann_step": 0.15},
    ],
    ids=str,
)
@pytest.mark.parametrize("damping", [0.0, 1.0])
def test_the_solution_on_a_network(solver, hessian, damping):
    """φ_k is no minimum here, and need not be one: the linear system is the same."""
    subject = small(IMAML(inner_lr=0.1, inner_steps=2, regularization=3.0, damping=damping, **solver))
    theta = somewhere(subject)
    expected = by_linear_algebra(subject, theta, keys(0, 1), 3.0 * damping)
    got = under(subject, replace(IMPLICIT, hessian=hessian), theta, keys(0, 1))
    assert relative_error(got.slots["model"], expected["model"]) < 1e-8


@dataclass(frozen=True)
class LearnedStrength(IMAML):
    """iMAML with a learned λ for every parameter: θ is in the inner loss twice."""

    def slots(self, model, parameters):
        strengths = parameters.map(lambda t: torch.full_like(t, self.regularization))
        return {"strength": (Slot(Layout.of(strengths)), strengths)}

    def descent(self, model, theta, support, context):
        plain = self.support_loss(model, support, context)

        def loss(phi, step):
            distance = (phi - theta["model"]).square() * theta["strength"]
            return plain(phi, step) + sum(t.sum() for t in distance.values()) / 2

        return replace(super().descent(model, theta, support, context), loss=loss)


@pytest.mark.parametrize("hessian", HESSIANS)
def test_everything_in_the_inner_loss_has_a_gradient(hessian):
    subject = small(LearnedStrength(inner_lr=0.1, inner_steps=2, damping=0.0, solver_iterations=30))
    theta = somewhere(subject)
    expected = by_linear_algebra(subject, theta, keys(0, 4), 0.0)
    got = under(subject, replace(IMPLICIT, hessian=hessian), theta, keys(0, 4))
    for slot in ("model", "strength"):
        assert relative_error(got.slots[slot], expected[slot]) < 1e-8, slot


@dataclass(frozen=True)
class Indifferent(IMAML):
    """An objective without a slope."""

    def objective(self, model, theta, trajectory, task, context):
        loss, prediction = super().objective(model, theta, trajectory, task, context)
        return loss * 0.0, prediction


def test_a_gradient_of_zero_stays_zero():
    """The residual is then 0 from the start, and no step divides by it."""
    subject = small(Indifferent(inner_lr=0.1, inner_steps=2))
    got = under(subject, IMPLICIT, somewhere(subject), keys(0, 1))
    assert not got.slots["model"].any()


# The algorithm --------------------------------------------------------------------------------------------------------


def test_no_regulariser_at_test():
    """Evaluation and service take plain gradient steps, by torch.optim."""
    subject = small(IMAML(inner_lr=0.1, inner_steps=3, regularization=5.0))
    theta, shard = somewhere(subject), TaskKey.of(7, "test", 0, [0])
    task = pytree.tree_map(lambda t: t[0], subject.sample(shard))
    module = subject.model.module
    parameters = {n: t.clone().requires_grad_() for n, t in theta["model"].items()}
    optimizer, losses = torch.optim.SGD(parameters.values(), lr=0.1), []
    for _ in range(4):
        predictions = [torch.func.functional_call(module, parameters, (x,)) for x in (task.support.x, task.query.x)]
        losses.append(float(torch.nn.functional.mse_loss(predictions[1].detach(), task.query.y)))
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(predictions[0], task.support.y).backward()
        optimizer.step()
    assert subject.evaluate(theta, shard, 0).columns["loss"][0].tolist() == pytest.approx(losses, rel=1e-10)
    pulled = small(IMAML(inner_lr=0.1, inner_steps=3, regularization=5.0, test_regularization=5.0))
    nearer = pulled.evaluate(theta, shard, 0).columns["loss"][0]
    assert float(nearer[0]) == pytest.approx(losses[0], rel=1e-10)
    assert abs(float(nearer[-1]) - losses[-1]) > 1e-6


@pytest.mark.lane("numerics")
def test_it_learns():
    outer = OuterLoop(meta_batch_size=8, shard_size=8, lr=2e-2, meta_steps=80)
    subject = small(IMAML(inner_lr=0.1, regularization=0.5, solver_iterations=3), outer=outer, engine=IMPLICIT)

    def held_out(state):
        records = subject.evaluate(state.theta(subject.slots), TaskKey.of(0, "validation", 0, range(200)), 0)
        return records.columns["loss"][:, -1]

    gained = held_out(subject.initial(0)) - held_out(train(subject, outer.meta_steps))
    assert float(gained.mean()) > 6 * float(gained.std()) / len(gained) ** 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"regularization": -1.0}, "algorithm.regularization: -1.0 is not a finite number of 0 or more"),
        ({"damping": float("nan")}, "algorithm.damping: nan"),
        ({"solver_iterations": 0}, "algorithm.solver_iterations: 0"),
        ({"solver": "lu"}, "algorithm.solver: 'lu' is not one of cg, neumann"),
        ({"neumann_step": -0.1}, "algorithm.neumann_step: -0.1"),
    ],
)
def test_settings_are_checked(options, message):
    with pytest.raises(ConfigError, match=message):
        IMAML(**options)


# The engine -----------------------------------------------------------------------------------------------------------

FAST = OuterLoop(meta_batch_size=8, shard_size=8, meta_steps=10)


@pytest.mark.parametrize(
    ("algorithm", "reason"),
    [
        (MAML(), "MAML does not state, by `implicit`, .* a minimum that depends on θ"),
        (ANIL(), "ANIL does not state"),
        (MetaSGD(), "MetaSGD does not state"),
        (Reptile(), "Reptile contributes a delta"),
        (ProtoNet(), "ProtoNet has no inner loop"),
        (IMAML(regularization=0.0), "IMAML does not state"),
        (IMAML(inner_batch_size=2), "algorithm.inner_batch_size: 2 gives each inner step a loss of its own"),
    ],
)
def test_refused_where_it_is_not_defined(algorithm, reason):
    family = Blobs() if isinstance(algorithm, ProtoNet) else Curves()
    subject = learner(algorithm, lambda: MLP(hidden=(4,)).build(family.input_shape, 2), family, outer=FAST)
    message = f"engine.differentiation: implicit, but {reason}.*; use unrolled or auto"
    with pytest.raises(ConfigError, match=message):
        subject.plan(EngineSettings(differentiation="implicit", compile="never"), CPU)
    subject.set_engine(IMPLICIT)
    with pytest.raises(ConfigError, match=message):
        subject.contribute(somewhere(subject), keys(0), 3)


def test_auto_is_implicit_where_the_algorithm_states_a_minimum():
    plan = small(outer=FAST).plan(EngineSettings(compile="never"), CPU)
    assert (plan.engine.differentiation, plan.engine.hessian) == ("implicit", "reverse")
    assert "ends in a minimum" in plan.reasons["differentiation"]
    assert small(MAML(), outer=FAST).plan(EngineSettings(compile="never"), CPU).engine.differentiation == "unrolled"
    for chosen in ("unrolled", "mixed"):
        assert small(outer=FAST).plan(EngineSettings(compile="never", differentiation=chosen), CPU).engine == replace(
            Engine(differentiation=chosen), hessian="forward" if chosen == "unrolled" else "reverse"
        )


@pytest.mark.lane("numerics")
@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.long)])
def test_memory_does_not_grow_with_inner_steps(compile):
    found = footprint(small(IMAML(inner_steps=20)), replace(IMPLICIT, compile=compile))
    assert found.further <= found.first / 50


@pytest.mark.lane("numerics")
@pytest.mark.parametrize(("model", "hessian"), [("mlp", "forward"), ("own", "reverse")])
def test_vectorised_and_in_chunks(model, hessian):
    """Tasks together, one by one and in chunks: the same sums."""
    subject = make(IMAML(inner_lr=0.05, inner_steps=3), model)
    theta, engine = somewhere(subject), replace(IMPLICIT, hessian=hessian)
    together = under(subject, engine, theta, keys(0, 1, 5, 6)).slots["model"]
    single = sum(under(subject, engine, theta, keys(i)).slots["model"] for i in (0, 1, 5, 6))
    assert relative_error(together, single) < 1e-10
    assert (
        relative_error(under(subject, replace(engine, chunk=2), theta, keys(0, 1, 5, 6)).slots["model"], single) < 1e-10
    )


@pytest.mark.lane("compile")
@pytest.mark.parametrize("hessian", ["forward", pytest.param("reverse", marks=pytest.mark.long)])
def test_compiled_equals_eager_in_float64(hessian):
    """A shard that is shorter than the others too, by the same graphs, for any number of inner steps."""
    subject = make(IMAML(inner_lr=0.1, inner_steps=3), "mlp", outer=OuterLoop(meta_batch_size=6, shard_size=4))
    theta, engine = somewhere(subject), replace(IMPLICIT, hessian=hessian)
    expected = [under(subject, engine, theta, keys(*tasks)) for tasks in ((0, 1, 5, 6), (2, 3))]
    subject.set_engine(replace(engine, compile=True))
    for tasks, eager in zip(((0, 1, 5, 6), (2, 3)), expected):
        got = subject.contribute(theta, keys(*tasks), 3)
        assert relative_error(got.slots["model"], eager.slots["model"]) < 1e-12
        assert got.metrics["loss"] == pytest.approx(eager.metrics["loss"], rel=1e-12)
    seconds = subject._compiled.seconds
    subject.with_algorithm(IMAML(inner_lr=0.1, inner_steps=5)).contribute(theta, keys(0, 1, 5, 6), 3)
    assert subject._compiled.seconds == seconds
    assert compiled_disagrees(subject, 0) is None


@pytest.mark.lane("compile")
def test_a_wrong_compiled_shard_is_found(monkeypatch):
    subject = make(IMAML(inner_lr=0.1, inner_steps=1), "mlp", outer=OuterLoop(meta_batch_size=4, shard_size=2))
    subject.set_engine(replace(IMPLICIT, compile=True))
    right = implicit.dot
    monkeypatch.setattr(implicit, "dot", lambda a, b: right(a, b) + 0.01)
    subject.warm_up(0)
    monkeypatch.setattr(implicit, "dot", right)
    assert "is off by" in compiled_disagrees(subject, 0)
