"""Recurrent layers and attention in the inner loop: every engine against the plain loop over torch's own modules."""

from __future__ import annotations

import pytest
import torch
from gradient_cases import plain_contribution
from torch.nn.attention import SDPBackend, sdpa_kernel
from toys import keys, learner, relative_error, somewhere
from wide import Encoder, Gated, Recurrent, Sequences

from metadist.algorithms import MAML, Reptile
from metadist.core.algorithm import TaskContext
from metadist.core.engine import Engine
from metadist.core.outer import OuterLoop
from metadist.engine.agreement import compiled_disagrees

SECOND, FIRST = MAML(inner_lr=0.1, inner_steps=2), MAML(inner_lr=0.1, inner_steps=2, first_order=True)
SHARD = OuterLoop(meta_batch_size=4, shard_size=2)
MODULES = [Recurrent, Gated, Encoder]
EAGER = {
    "unrolled": Engine(),
    "mixed, forward": Engine(differentiation="mixed", hessian="forward"),
    "mixed, reverse": Engine(differentiation="mixed", hessian="reverse"),
}


def check(module, algorithm, engine):
    subject = learner(algorithm, module, Sequences(), outer=SHARD)
    theta, shard = somewhere(subject), keys(0, 1)
    with sdpa_kernel(SDPBackend.MATH):  # the reference differentiates twice
        expected, _ = plain_contribution(subject, theta, shard)
    subject.set_engine(engine)
    found = subject.contribute(theta, shard, 3)
    assert relative_error(found.slots["model"], expected["model"]) <= 1e-10


@pytest.mark.lane("numerics")
@pytest.mark.parametrize("name", EAGER)
@pytest.mark.parametrize("algorithm", [SECOND, FIRST], ids=["second", "first"])
@pytest.mark.parametrize("module", MODULES)
def test_meta_gradients_are_those_of_torch_s_own_modules(module, algorithm, name):
    check(module, algorithm, EAGER[name])


@pytest.mark.lane("compile")
@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("module", MODULES)
def test_compiled_meta_gradients(module):
    check(module, SECOND, Engine(compile=True))


@pytest.mark.lane("compile")
@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("module", MODULES)
def test_compiled_meta_gradients_back_over_the_steps(module):
    check(module, SECOND, Engine(compile=True, differentiation="mixed"))


@pytest.mark.lane("compile")
@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_compiled_shard_agrees_with_float64():
    subject = learner(SECOND, Recurrent, Sequences(), outer=SHARD, dtype=torch.float32)
    subject.set_engine(Engine(compile=True))
    assert compiled_disagrees(subject, 0) is None


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("algorithm", [SECOND, Reptile(inner_lr=0.1, inner_steps=2)], ids=["maml", "reptile"])
def test_evaluation_is_adaptation_and_prediction_of_each_task(module, algorithm):
    """Against torch's own module, task after task, adapted by ordinary autograd."""
    subject = learner(algorithm, module, Sequences(), outer=SHARD)
    theta, some = somewhere(subject), keys(0, 1, 5)
    found = subject.evaluate(theta, some, 0).columns["loss"]
    own = subject.model.module.eval()
    for row, key in zip(found, some.each()):
        task = subject.tasks.sample_task(key, key.split).to(torch.device("cpu"), torch.float64)
        context = TaskContext(key, 0, False, subject.tasks)
        phi = {n: t.clone().requires_grad_() for n, t in theta["model"].items()}
        losses = []
        for _ in range(3):
            with torch.no_grad():
                losses.append(context.loss(torch.func.functional_call(own, phi, (task.query.x,)), task.query))
            inner = context.loss(torch.func.functional_call(own, phi, (task.support.x,)), task.support)
            gradient = torch.autograd.grad(inner, list(phi.values()))
            phi = {n: (t - 0.1 * g).detach().requires_grad_() for (n, t), g in zip(phi.items(), gradient)}
        torch.testing.assert_close(row, torch.stack(losses), rtol=1e-10, atol=1e-10)
