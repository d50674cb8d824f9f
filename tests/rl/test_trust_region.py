"""Compare a step within a trust region with dense linear algebra."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from trials import Chance, context, learner, run, somewhere, train

from metadist.algorithms.rl2 import RL2
from metadist.core.computation import Rollout, Surrogate
from metadist.core.errors import ConfigError
from metadist.core.round import MetaStepKey, run_rounds
from metadist.core.state import State
from metadist.models.causal_transformer import CausalTransformer
from metadist.models.reactive import Reactive
from metadist.models.recurrent import GRU, LSTM
from metadist.rl.trial import VALID, Trials
from metadist.rl.trust_region import DIRECTION, TrustRegion, conjugate_gradient, dot


def solve(matrix, b, region):
    """Run ``conjugate_gradient`` with products that take no rounds."""

    def product(p):
        return matrix @ p
        yield

    search = conjugate_gradient(b, product, region)
    with pytest.raises(StopIteration) as done:
        next(search)
    return done.value.value


@pytest.mark.parametrize("size", [1, 7, 40])
def test_conjugate_gradients_solve_a_linear_system(size):
    generator = torch.Generator().manual_seed(size)
    root, b = (torch.randn(size, n, generator=generator, dtype=torch.float64) for n in (size, 1))
    matrix, b = root @ root.T / size, b.squeeze(1)
    damped = matrix + 0.1 * torch.eye(size, dtype=torch.float64)
    x, image = solve(matrix, b, TrustRegion(0.01, 3 * size, 0.1, 10))
    torch.testing.assert_close(x, torch.linalg.solve(damped, b), rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(image, damped @ x, rtol=1e-8, atol=1e-9)
    early, image = solve(matrix, b, TrustRegion(0.01, 1, 0.1, 10))
    torch.testing.assert_close(image, damped @ early, rtol=1e-10, atol=1e-12)


def test_a_dot_product_of_many_terms():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(300_001, generator=generator) for _ in range(2))
    assert dot(a, b) == pytest.approx(math.fsum((a.double() * b.double()).tolist()), rel=1e-12)


# A whole step of a tiny policy ----------------------------------------------------------------------------------------


def flat(parameters):
    return torch.cat([t.reshape(-1) for t in parameters.values()])


def subject(model=GRU(hidden=3), environment=Chance(episodes=2, horizon=3), **options):
    options = {"optimizer": "trpo", "cg_steps": 200, "entropy": 0.0, **options}
    return learner(RL2(**options), model, environment, dtype=torch.float64, batch=16, shard=4)


def rolled(learner, theta, tasks=16):
    about = context(learner, tasks)
    records, sums, weight = learner.algorithm.rollout(theta, about)
    settings = learner.algorithm.settings_of({n: v / weight for n, v in sums.items()})
    return about, records, settings


def by_definition(learner, theta, records, about):
    """Compute E over visited states and *all* actions of ∇log π ∇log πᵀ, by step and action: dense [P, P]."""
    leaves = theta["model"].map(lambda t: t.clone().requires_grad_())
    policy, batch = about.policy(theta, leaves), Trials.of(records)
    head, _, _ = policy(
        policy.features(batch.observation, batch.seen(policy)), policy.start(len(batch.task), batch.task.device)
    )
    logs, valid = head.log_softmax(-1), batch.flag(VALID)
    total = torch.zeros(flat(leaves).numel(), flat(leaves).numel(), dtype=torch.float64)
    for row, t in valid.nonzero().tolist():
        for action in range(logs.shape[-1]):
            found = torch.autograd.grad(
                logs[row, t, action], list(leaves.values()), retain_graph=True, allow_unused=True
            )
            score = torch.cat(
                [(torch.zeros_like(p) if g is None else g).reshape(-1) for p, g in zip(leaves.values(), found)]
            )
            total += float(logs[row, t, action].detach().exp()) * torch.outer(score, score)
    return total / valid.sum()


@pytest.mark.parametrize(
    "model",
    [GRU(hidden=3), LSTM(hidden=2), Reactive(hidden=(3,)), CausalTransformer(4, 1, 2, 1.0, 3)],
    ids=lambda m: type(m).__name__,
)
def test_fisher_products_are_those_of_the_fisher_matrix(model):
    found = subject(model)
    theta = somewhere(found)
    about, records, _ = rolled(found, theta, 3)
    dense = by_definition(found, theta, records, about)
    generator = torch.Generator().manual_seed(0)
    direction = theta["model"].map(lambda t: torch.randn(t.shape, generator=generator, dtype=torch.float64))
    product, weight = found.algorithm.fisher(theta, records, direction, about)
    torch.testing.assert_close(flat(product) / weight, dense @ flat(direction), rtol=1e-9, atol=1e-12)


def test_a_meta_step_is_the_natural_gradient_of_a_dense_solve():
    found = subject(epochs=1, minibatches=1, damping=1e-2, kl=1e-3)
    theta = somewhere(found)
    state = found.initial(0)
    state = State({**state.slots, "model": flat(theta["model"])}, state.outer)
    about, records, settings = rolled(found, theta)
    dense = by_definition(found, theta, records, about) + 1e-2 * torch.eye(
        flat(theta["model"]).numel(), dtype=torch.float64
    )
    gradients, _, weight = found.algorithm.gradient(theta, records, settings, about)
    solution = torch.linalg.solve(dense, -flat(gradients["model"]) / weight)
    whole = solution * (2 * 1e-3 / (solution @ dense @ solution)).sqrt()
    policy_steps, report = [], {}

    def watch(round, total):
        if round.shards[0].function == "value_gradient":  # under the θ that the line search has found
            policy_steps.append(round.parameters.slots["model"] - flat(theta["model"]))

    after, report = train(found, 1, state=state, watch=watch)
    assert report["step_fraction"] == 1.0 and report["cg_residual"] < 1e-6
    torch.testing.assert_close(policy_steps[0], whole, rtol=1e-6, atol=1e-9)
    assert 0 < report["kl"] <= 1e-3 and report["improvement"] > 0
    # Small enough a step for the quadratic model of the divergence (without its damping) to be near the truth.
    bare = whole @ (dense - 1e-2 * torch.eye(len(whole), dtype=torch.float64)) @ whole / 2
    assert report["kl"] == pytest.approx(float(bare), rel=0.1)
    assert not after.slots[DIRECTION].any()


def test_the_value_fit_changes_no_parameter_of_the_actions():
    found, before_fit = subject(epochs=3, minibatches=2), []

    def watch(round, total):
        if round.shards[0].function == "value_gradient":
            before_fit.append(round.parameters.slots["model"])

    state, report = train(found, 1, watch=watch)
    names = [
        n for n, t in found.slots["model"].layout.unflatten(state.slots["model"] - before_fit[0]).items() if t.any()
    ]
    assert names == ["value.weight", "value.bias"] and report["updates"] == 6


@pytest.mark.lane("numerics")
@pytest.mark.parametrize("model", [GRU(hidden=8), Reactive(hidden=(8,))], ids=lambda m: type(m).__name__)
def test_every_step_improves_within_the_bound(model):
    found = learner(
        RL2(optimizer="trpo", kl=0.05, cg_steps=5, gae_lambda=0.9), model, Chance(continuous=True), batch=16, shard=4
    )
    state = found.initial(0)
    for _ in range(5):
        state, report = train(found, 1, state=state)
        assert 0 < report["kl"] <= 0.05 and report["improvement"] > 0


def test_a_step_too_far_is_cut_short_and_one_that_never_fits_is_not_taken():
    # Without damping to speak of and with a bound far beyond where the quadratic model holds.
    far = learner(
        RL2(optimizer="trpo", kl=3.0, cg_steps=10, damping=1e-8, epochs=1), GRU(hidden=8), Chance(), batch=16, shard=4
    )
    _, report = train(far, 1)
    assert report["step_fraction"] < 1 and report["kl"] <= 3.0
    never = learner(
        RL2(optimizer="trpo", kl=3.0, cg_steps=10, damping=1e-8, epochs=1, backtracks=1),
        GRU(hidden=8),
        Chance(),
        batch=16,
        shard=4,
    )
    start, seen = never.initial(0), {}
    train(never, 1, state=start, watch=lambda round, _: seen.setdefault(round.shards[0].function, round.parameters))
    assert seen["value_gradient"].slots["model"].equal(start.slots["model"])


def test_a_step_that_overflows_is_refused_and_is_no_fault():
    found = learner(RL2(optimizer="trpo", minibatches=1), GRU(hidden=4), Chance(continuous=True), batch=4, shard=4)
    shards = found.shards(MetaStepKey("run", 0, 0), Rollout(), tasks=4)
    state = found.initial(0)
    rolled = found.compute(replace(shards[0], keeps=True), state.slots)
    surrogate = Surrogate(1.0, (("deviation", 1.0), ("mean", 0.0)))
    away = {**state.slots, DIRECTION: torch.full_like(state.slots["model"], -1e30)}
    total = found.compute(replace(shards[0], computation=surrogate), away, [rolled.output])
    assert all(map(math.isfinite, total.metrics.values())) and total.metrics["kl"] / total.weight > 1e50


def test_surrogate_rounds_judge_the_policy_that_is_then_taken():
    found = learner(RL2(optimizer="trpo", kl=0.02), GRU(hidden=8), Chance(), batch=16, shard=4)
    kept, seen = {}, []

    def watched(round):
        seen.append(round)
        return run(found, round, kept)

    _, judged = run_rounds(found.meta_step(MetaStepKey("run", 0, 0), found.initial(0)), watched)
    # The value is fitted from the θ that the line search has found.
    after = next(round for round in seen if round.shards[0].function == "value_gradient").parameters
    published = [round.parameters for round in seen if round.shards[0].function == "surrogate"][-1]
    old = published.slots["model"]
    fraction = judged["step_fraction"]
    assert torch.equal(old + fraction * published.slots[DIRECTION], after.slots["model"])


def test_decay_that_leaves_the_trust_region_is_refused():
    with pytest.raises(ConfigError, match="outer.weight_decay: 0.1 would move the policy out of its trust region"):
        learner(RL2(optimizer="trpo"), GRU(hidden=3), Chance(), weight_decay=0.1)
