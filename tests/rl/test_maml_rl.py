"""Compare MAML-RL's meta-gradient with plain loops, and with the exact gradient on an MDP that can be enumerated."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from trials import Chance, context, evaluate, learner, run, somewhere, train

from metadist.algorithms.maml_rl import MAMLRL
from metadist.core.errors import ConfigError
from metadist.core.parameters import Parameters
from metadist.core.round import MetaStepKey
from metadist.core.state import Records
from metadist.environments.navigation import Navigation
from metadist.models.reactive import Reactive
from metadist.models.recurrent import GRU
from metadist.rl.baseline import linear_baseline, returns_to_go


def flat(parameters):
    return torch.cat([t.reshape(-1) for t in parameters.values()])


def subject(environment=Chance(continuous=True, end=0.2, horizon=6), hidden=(5,), **options):
    settings = {"rollouts_per_task": 4, "inner_lr": 0.3, "discount": 0.9, "gae_lambda": 0.8, **options}
    return learner(MAMLRL(**settings), Reactive(hidden=hidden), environment, dtype=torch.float64, batch=4, shard=2)


# Against plain loops --------------------------------------------------------------------------------------------------


def plain_head(theta, x):
    """Compute the policy's two-layer network and its deviations by hand."""
    hidden = torch.tanh(x @ theta["head.0.weight"].T + theta["head.0.bias"])
    return hidden @ theta["head.2.weight"].T + theta["head.2.bias"], theta["log_std"]


def plain_log_probability(theta, x, action):
    mean, log_std = plain_head(theta, x)
    return torch.distributions.Independent(torch.distributions.Normal(mean, log_std.exp()), 1).log_prob(action)


def stage_of(records, task, stage):
    return {n: t[task, stage] for n, t in records.columns.items() if n != "task"}


def plain_surrogate(theta, data, clip=None):
    """Return (mean surrogate, mean estimate of KL(old ‖ new)), computed by trajectory and step."""
    total, divergence, count = 0.0, 0.0, 0
    for n, t in itertools.product(*map(range, data["valid"].shape)):
        if data["valid"][n, t]:
            difference = (
                plain_log_probability(theta, data["observation"][n, t].double(), data["action"][n, t].double())
                - data["log_probability"][n, t]
            )
            ratio, advantage = difference.exp(), data["advantage"][n, t]
            gain = ratio * advantage
            total = total + (gain if clip is None else torch.minimum(gain, ratio.clamp(1 - clip, 1 + clip) * advantage))
            divergence, count = divergence + ratio - 1 - difference, count + 1
    return total / count, divergence / count


def plain_adapted(algorithm, theta, records, task):
    penalty = 0.0
    for stage in range(algorithm.inner_steps):
        gain, kl = plain_surrogate(theta, stage_of(records, task, stage))
        slopes = torch.autograd.grad(gain, list(theta.values()), create_graph=True, allow_unused=True)
        theta = {n: p if g is None else p + algorithm.inner_lr * g for (n, p), g in zip(theta.items(), slopes)}
        penalty = penalty + kl
    return theta, penalty


@pytest.mark.parametrize(
    "options",
    [{}, {"inner_steps": 2, "clip": 0.02, "kl_penalty": 0.7, "entropy": 0.3}, {"optimizer": "trpo"}],
    ids=["promp", "two steps", "trpo"],
)
def test_the_meta_gradient_is_that_of_a_plain_loop_over_tasks(options):
    found = subject(**options)
    algorithm, about = found.algorithm, context(found, 3)
    old, new = somewhere(found, seed=1), somewhere(found, scale=0.32, seed=1)  # not where the trajectories came from
    records, _, _ = algorithm.rollout(old, about)
    gradients, sums, weight = algorithm.gradient(new, records, {}, about)
    expected = 0.0
    for task in range(3):
        leaves = {n: t.clone().requires_grad_() for n, t in new["model"].items()}
        theta, penalty = plain_adapted(algorithm, leaves, records, task)
        ppo = algorithm.optimizer == "ppo"
        gain, _ = plain_surrogate(
            theta, stage_of(records, task, algorithm.inner_steps), algorithm.clip if ppo else None
        )
        loss = -gain + (algorithm.kl_penalty * penalty if ppo else 0.0) - algorithm.entropy * theta["log_std"].sum()
        found_by_loop = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        expected = expected + torch.cat(
            [(torch.zeros_like(p) if g is None else g).reshape(-1) for p, g in zip(leaves.values(), found_by_loop)]
        )
    assert weight == 3.0 and sums["clip_fraction"] <= 3.0
    assert float((flat(gradients["model"]) - expected).norm() / expected.norm()) < 1e-10


def test_fisher_products_go_through_the_adaptation():
    """Compute Σ Jᵀ M J over tasks: J by finite differences of adapted heads, M the covariance of Gaussian scores."""
    found = subject(optimizer="trpo")
    algorithm, about, theta = found.algorithm, context(found, 2), somewhere(found)
    records, _, _ = algorithm.rollout(theta, about)
    generator, epsilon, expected = torch.Generator().manual_seed(0), 1e-5, 0.0
    names = [n for n in theta["model"] if not n.startswith("value")]
    shapes = {n: theta["model"][n].shape for n in names}

    def heads(vector, task):
        parts = dict(
            zip(names, (p.view(s) for p, s in zip(vector.split([s.numel() for s in shapes.values()]), shapes.values())))
        )
        adapted, _ = plain_adapted(algorithm, {n: p.requires_grad_() for n, p in parts.items()}, records, task)
        last = stage_of(records, task, 1)
        mean, log_std = plain_head(adapted, last["observation"].double())
        return torch.cat([mean, log_std.expand_as(mean)], -1)[last["valid"]].detach()

    vector = flat({n: theta["model"][n] for n in names})
    direction = torch.randn(len(vector), generator=generator, dtype=torch.float64)
    for task in range(2):
        columns = [
            (heads(vector + epsilon * e, task) - heads(vector - epsilon * e, task)) / (2 * epsilon)
            for e in torch.eye(len(vector), dtype=torch.float64)
        ]
        jacobian, head = torch.stack(columns, -1), heads(vector, task)
        metric = torch.cat(
            [(-2 * head[..., 2:]).exp(), torch.full_like(head[..., 2:], 2.0)], -1
        )  # 1/σ² for means, 2 for log σ
        expected = expected + torch.einsum("sap,sa,saq,q->p", jacobian, metric, jacobian, direction) / len(head)
    whole = {n: torch.zeros_like(t) for n, t in theta["model"].items()}
    whole.update({n: p.view(shapes[n]) for n, p in zip(names, direction.split([s.numel() for s in shapes.values()]))})
    product, weight = algorithm.fisher(theta, records, Parameters(whole), about)
    assert weight == 2.0 and not any(product[n].any() for n in whole if n.startswith("value"))
    torch.testing.assert_close(flat({n: product[n] for n in names}), expected, rtol=1e-5, atol=1e-7)


def test_the_baseline_is_numpys_ridge_regression():
    generator = torch.Generator().manual_seed(0)
    observation = 4 * torch.randn(2, 5, 7, 2, generator=generator)
    observation[0, 0, 0, 0] = 50.0  # clipped to 10
    valid = torch.rand(2, 5, 7, generator=generator) < 0.8
    target = returns_to_go(torch.randn(2, 5, 7, generator=generator), valid, 0.9)
    computed = linear_baseline(observation, target, valid, ridge=1e-3)
    for task in range(2):
        o, t = observation[task].clamp(-10, 10).double().numpy(), np.broadcast_to(np.arange(7) / 100, (5, 7))
        features = np.stack([o[..., 0], o[..., 1], o[..., 0] ** 2, o[..., 1] ** 2, t, t**2, t**3, np.ones_like(t)], -1)
        used = valid[task].numpy()
        rows, wanted = (
            np.concatenate([features[used], np.sqrt(1e-3) * np.eye(8)]),
            np.concatenate([target[task].numpy()[used], np.zeros(8)]),
        )
        weights = np.linalg.lstsq(rows, wanted, rcond=None)[0]
        np.testing.assert_allclose(computed[task].numpy(), features @ weights, rtol=1e-8, atol=1e-9)
    running = 0.0
    reward = torch.tensor([[1.0, 2.0, 3.0]])
    for r in (2.0, 1.0):
        running = r + 0.5 * running
    assert float(returns_to_go(reward, torch.tensor([[True, True, False]]), 0.5)[0, 0]) == running


# What it estimates ----------------------------------------------------------------------------------------------------

# Two states, two actions, two steps, always from state 0: 8 trajectories (or 4 of one step).
MOVE = torch.tensor([[[0.8, 0.2], [0.3, 0.7]], [[0.4, 0.6], [0.9, 0.1]]], dtype=torch.float64)  # [state, action, next]
PAY = torch.tensor([[1.0, -0.5], [0.2, 2.0]], dtype=torch.float64)  # [state, action]
RATE = 1.3


def probabilities(theta):
    """Return π(a | s) [2, 2] of the linear policy on one-hot states."""
    return (theta["head.0.weight"].T + theta["head.0.bias"]).softmax(-1)


def exact_return(theta, horizon):
    policy, following = probabilities(theta), torch.zeros(2, dtype=torch.float64)
    for _ in range(horizon):
        following = (policy * (PAY + MOVE @ following)).sum(-1)
    return following[0]


def trajectories(theta, horizon):
    """List every trajectory with its probability: (states, actions, probability)."""
    policy = probabilities(theta)
    for actions in itertools.product(range(2), repeat=horizon):
        for after in itertools.product(range(2), repeat=horizon - 1):
            states = (0, *after)
            chance = math.prod(float(policy[s, a]) for s, a in zip(states, actions))
            chance *= math.prod(float(MOVE[s, a, n]) for s, a, n in zip(states, actions, after))
            yield states, actions, chance


def stage(theta, horizon):
    """Make one stage of all trajectories whose mean is the expectation: advantages are returns to go × N p(τ) T."""
    rows = list(trajectories(theta, horizon))
    policy, scale = probabilities(theta), len(rows) * horizon
    states, actions = (torch.tensor([row[i] for row in rows]) for i in (0, 1))
    togo = PAY[states, actions].flip(1).cumsum(1).flip(1)
    chance = torch.tensor([row[2] for row in rows], dtype=torch.float64).unsqueeze(1)
    assert float(chance.sum()) == pytest.approx(1.0)
    return {
        "observation": torch.eye(2, dtype=torch.float64)[states],
        "action": actions,
        "advantage": togo * chance * scale,
        "log_probability": policy[states, actions].log(),
        "valid": torch.ones(len(rows), horizon, dtype=torch.bool),
    }


def enumerated(horizon):
    """Return (θ, its flat policy parameters, the expected meta-gradient of ``objective``, φ)."""
    algorithm = MAMLRL(inner_lr=RATE, kl_penalty=0.0, normalize=False, rollouts_per_task=1)
    found = learner(
        algorithm, Reactive(hidden=()), Chance(count=2, continuous=False), dtype=torch.float64, batch=4, shard=2
    )
    about, theta = context(found, 1), somewhere(found, scale=0.7)["model"]
    bound = about.policy(found.initial(0).theta(found.slots))
    phi, _ = algorithm.adapted(bound, theta, stage(theta, horizon))
    data = {n: torch.stack([a, b]) for (n, a), b in zip(stage(theta, horizon).items(), stage(phi, horizon).values())}
    meta, _ = torch.func.grad(lambda theta: algorithm.objective(bound, theta, data), has_aux=True)(theta)
    return theta, -meta, phi


def policy_only(parameters):
    return {n: t.detach() for n, t in parameters.items() if n.startswith("head")}


def differences(function, theta, epsilon=1e-6):
    """Compute central finite differences of ``function`` in every policy parameter, flat."""
    vector, found = flat(theta), []
    shapes = {n: t.shape for n, t in theta.items()}

    def named(v):
        return {n: p.view(s) for p, (n, s) in zip(v.split([s.numel() for s in shapes.values()]), shapes.items())}

    for e in torch.eye(len(vector), dtype=torch.float64):
        found.append((function(named(vector + epsilon * e)) - function(named(vector - epsilon * e))) / (2 * epsilon))
    return torch.stack(found)


@pytest.mark.parametrize("horizon", [1, 2])
def test_the_inner_step_is_unbiased(horizon):
    theta, _, phi = enumerated(horizon)
    step = (flat(policy_only(phi)) - flat(policy_only(theta))) / RATE
    torch.testing.assert_close(
        step, differences(lambda p: exact_return(p, horizon), policy_only(theta)), rtol=1e-7, atol=1e-8
    )


def after_adaptation(theta, horizon):
    """Compute E[return after the expected gradient step] exactly."""
    slope = differences(lambda p: exact_return(p, horizon), theta, 1e-4)
    vector = flat(theta) + RATE * slope
    shapes = [t.shape for t in theta.values()]
    return exact_return(
        dict(zip(theta, (p.view(s) for p, s in zip(vector.split([s.numel() for s in shapes]), shapes)))), horizon
    )


def test_with_one_step_the_meta_gradient_is_that_of_the_return_after_adaptation():
    theta, meta, _ = enumerated(1)
    exact = differences(lambda p: after_adaptation(p, 1), policy_only(theta), 1e-4)
    torch.testing.assert_close(flat(policy_only(meta)), exact, rtol=1e-5, atol=1e-7)


def test_with_more_steps_it_lacks_how_later_actions_change_the_worth_of_earlier_ones():
    """The low-variance curvature is ∇²J − H12 − H12ᵀ (Rothfuss et al. 2019, section 5).

    H12 = E Σ ∇log π(a_t | s_t) ∇Q(s_t, a_t)ᵀ.
    """
    theta, meta, phi = enumerated(2)
    here = policy_only(theta)
    exact = differences(lambda p: after_adaptation(p, 2), here, 1e-4)
    slope = differences(lambda p: exact_return(p, 2), policy_only(phi))
    policy, h12 = probabilities(here), 0.0
    for action in range(2):  # Q depends on θ at the first step only
        score = differences(lambda p, a=action: probabilities(p)[0, a].log(), here)
        worth = differences(lambda p, a=action: (MOVE[0, a] * (probabilities(p) * PAY).sum(-1)).sum(), here)
        h12 = h12 + policy[0, action] * torch.outer(score, worth)
    torch.testing.assert_close(flat(policy_only(meta)), exact - RATE * (h12 + h12.T) @ slope, rtol=1e-5, atol=1e-6)
    assert float((flat(policy_only(meta)) - exact).norm() / exact.norm()) > 0.01  # the bias is there to be seen


# As a whole -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner_steps", [1, 2])
def test_on_the_first_minibatch_every_ratio_is_1(inner_steps):
    environment = Chance(continuous=True, end=0.2, horizon=6)
    found = learner(
        MAMLRL(inner_steps=inner_steps, rollouts_per_task=5), Reactive(hidden=(8,)), environment, batch=8, shard=4
    )
    theta, about = somewhere(found), context(found, 8)
    records, _, _ = found.algorithm.rollout(theta, about)
    bound, worst = about.policy(theta), 0.0
    for task in range(8):
        data = {n: t[task] for n, t in records.columns.items() if n != "task"}
        phi = theta["model"]
        for k in range(inner_steps + 1):
            there = {n: t[k] for n, t in data.items()}
            policy = type(bound)(bound.model, phi, bound.actions)
            head = policy(there["observation"], torch.zeros(5, 0))[0]
            ratio, _ = found.algorithm.ratio(bound, head, there)
            worst = max(worst, float((ratio - 1).abs().max()))
            phi = found.algorithm.adapted(bound, phi, there)[0]
    assert worst < 1e-5
    _, report = train(found, 1)
    assert abs(report["first_kl"]) < 1e-9


def test_stages_have_trajectories_of_their_own_and_normal_advantages():
    found = subject(environment=Chance(continuous=True, end=0.05, horizon=8))
    about, theta = context(found, 3), somewhere(found)
    columns = found.algorithm.rollout(theta, about)[0].columns
    first = columns["observation"][:, :, :, 0].flatten(0, 2)
    assert len(first.unique(dim=0)) == 3 * 2 * 4
    for task, k in itertools.product(range(3), range(2)):
        advantage = columns["advantage"][task, k][columns["valid"][task, k]]
        assert abs(float(advantage.mean())) < 1e-9 and float(advantage.std(correction=0)) == pytest.approx(
            1.0, abs=1e-5
        )
    alone = found.algorithm.rollout(theta, context(found, 1))[0].columns
    assert alone["action"].equal(columns["action"][:1]) and alone["valid"].equal(columns["valid"][:1])


def test_shards_sum_to_the_whole_batch():
    def first_gradient(shard):
        found = learner(
            MAMLRL(rollouts_per_task=3),
            Reactive(hidden=(5,)),
            Chance(continuous=True),
            dtype=torch.float64,
            batch=4,
            shard=shard,
        )
        rounds, kept = found.meta_step(MetaStepKey("run", 0, 0), found.initial(0)), {}
        total = run(found, rounds.send(run(found, next(rounds), kept)), kept)
        return total.slots["model"] / total.weight

    torch.testing.assert_close(first_gradient(1), first_gradient(4), rtol=1e-9, atol=1e-12)


def test_evaluation_has_a_column_for_every_number_of_steps():
    found = subject(environment=Navigation(horizon=15))
    state = found.initial(0)
    columns = evaluate(found, state, 6, inner_steps=3)
    assert columns["greedy"].shape == columns["sampled"].shape == (6, 4)
    default = evaluate(found, state, 6)
    assert default["sampled"].equal(columns["sampled"][:, :2]) and default["greedy"].dtype == torch.float64


@pytest.mark.lane("numerics")
@pytest.mark.parametrize(
    "options", [{"optimizer": "ppo"}, {"optimizer": "trpo", "kl": 0.02, "cg_steps": 5}], ids=["promp", "trpo"]
)
def test_it_learns_to_adapt(options):
    """With goals in all directions no one action is good: a (paired) gain by adaptation comes from the trajectories."""
    algorithm = MAMLRL(rollouts_per_task=10, inner_lr=0.3, gae_lambda=0.95, **options)
    found = learner(algorithm, Reactive(hidden=(16,)), Navigation(horizon=10), batch=20, shard=20, lr=1e-2)
    before = evaluate(found, found.initial(0), 100)["sampled"]
    state, report = train(found, 12)
    after = evaluate(found, state, 100)["sampled"]
    gain = after[:, 1] - after[:, 0]
    assert gain.mean() > 5 * gain.std() / 10 and gain.mean() > 1.5 * (before[:, 1] - before[:, 0]).mean()
    if algorithm.optimizer == "trpo":
        assert 0 < report["kl"] <= 0.02 and report["improvement"] > 0


def test_records_survive_a_journey_as_columns():
    found = subject()
    about = context(found, 2)
    records, _, _ = found.algorithm.rollout(somewhere(found), about)
    assert all(len(t) == 2 for t in records.columns.values())
    halves = [Records({n: t[i : i + 1] for n, t in records.columns.items()}) for i in range(2)]
    assert Records.concatenate(halves).columns["advantage"].equal(records.columns["advantage"])


def test_a_policy_with_memory_is_refused():
    with pytest.raises(ConfigError, match="needs a policy without memory"):
        learner(MAMLRL(), GRU(hidden=4), Chance())


@pytest.mark.parametrize(
    ("options", "message"),
    [({"inner_steps": 0}, "algorithm.inner_steps: 0; expected 1 or more"), ({"inner_lr": -1.0}, "algorithm.inner_lr")],
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        MAMLRL(**options)
