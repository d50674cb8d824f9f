"""Compare RL² with a plain implementation, and test the controls that give its scores a meaning."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from trials import Chance, context, evaluate, learner, somewhere, train

from metadist.algorithms.rl2 import RL2
from metadist.core.computation import Gradient
from metadist.core.errors import ConfigError
from metadist.core.random import TaskKey
from metadist.environments.bandit import Bandit
from metadist.environments.tabular_mdp import TabularMDP
from metadist.models.causal_transformer import CausalTransformer
from metadist.models.reactive import Reactive
from metadist.models.recurrent import GRU, LSTM
from metadist.rl.policy import Policy
from metadist.rl.trial import VALID, Trials, advantages, rollout
from metadist.testing.running import meta_step as run_meta_step

POLICIES = {
    "gru": GRU(hidden=16),
    "lstm": LSTM(hidden=16),
    "reactive": Reactive(hidden=(16,)),
    "causal_transformer": CausalTransformer(width=16, depth=2, heads=2, window=5),
}
SETTINGS = {"mean": 0.1, "deviation": 1.7}


def flat(parameters):
    return torch.cat([t.reshape(-1) for t in parameters.values()])


# The first minibatch is on policy -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "environment",
    [Bandit(arms=4, episodes=12), Chance(), Chance(continuous=True)],
    ids=["bandit", "chance", "continuous"],
)
@pytest.mark.parametrize("name", POLICIES)
def test_on_the_first_minibatch_every_ratio_is_1_and_kl_is_0(name, environment):
    subject = learner(RL2(), POLICIES[name], environment, batch=64, shard=16)
    theta, about = somewhere(subject, scale=0.1), context(subject, 64)
    records, _, _ = subject.algorithm.rollout(theta, about)
    policy, batch = about.policy(theta), Trials.of(records)
    for window in subject.algorithm.windows(policy, batch, {}):
        _, ratio = subject.algorithm.ratio(policy, window)
        assert float((ratio - 1).abs().max()) < 1e-5
    _, report = train(subject, 1)
    assert abs(report["first_kl"]) < 1e-9 < abs(report["kl"])


# The gradient ---------------------------------------------------------------------------------------------------------


def plain_gru(theta, features):
    """Compute logits [T, A] and value [T] from one trial's features [T, F] (Cho et al. 2014, in ``nn.GRU``'s form)."""
    w, u, b, c = (theta[f"core.{n}_l0"] for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    state, logits, values = torch.zeros(u.shape[1], dtype=w.dtype), [], []
    for x in features:
        (xr, xz, xn), (hr, hz, hn) = (w @ x + b).chunk(3), (u @ state + c).chunk(3)
        reset, update = torch.sigmoid(xr + hr), torch.sigmoid(xz + hz)
        state = (1 - update) * torch.tanh(xn + reset * hn) + update * state
        logits.append(theta["head.weight"] @ state + theta["head.bias"])
        values.append((theta["value.weight"] @ state + theta["value.bias"]).squeeze(0))
    return torch.stack(logits), torch.stack(values)


def plain_loss(algorithm, theta, trials):
    """Compute Σ over valid steps of −clipped surrogate + value · ½ (V − target)² − entropy · H, by trial and step."""
    total = torch.zeros((), dtype=torch.float64)
    for row in range(len(trials.task)):
        steps = int((trials.flags[row] & VALID).bool().sum())
        features, previous = [], torch.zeros(3 + 2, dtype=torch.float64)
        for t in range(steps):
            features.append(torch.cat([trials.observation[row, t].double(), previous]))
            action = torch.eye(3, dtype=torch.float64)[trials.action[row, t]]
            ended = 1.0 if trials.flags[row, t] & 4 else 0.0
            previous = torch.cat([action, torch.tensor([float(trials.reward[row, t]), ended], dtype=torch.float64)])
        logits, values = plain_gru(theta, features)
        old = [*trials.value[row, :steps].tolist(), 0.0]
        advantage = 0.0
        for t in reversed(range(steps)):
            delta = algorithm.reward_scale * float(trials.reward[row, t]) + algorithm.discount * old[t + 1] - old[t]
            advantage = delta + algorithm.discount * algorithm.gae_lambda * advantage
            target, normal = advantage + old[t], (advantage - SETTINGS["mean"]) / SETTINGS["deviation"]
            logs = logits[t] - logits[t].logsumexp(0)
            ratio = (logs[trials.action[row, t]] - trials.log_probability[row, t]).exp()
            now = float(ratio.detach())
            bounded = min(max(now, 1 - algorithm.clip), 1 + algorithm.clip)
            surrogate = ratio * normal if now * normal <= bounded * normal else torch.tensor(bounded * normal)
            error = (values[t] - target) ** 2
            if algorithm.value_clip is not None:
                near = old[t] + (values[t] - old[t]).clamp(-algorithm.value_clip, algorithm.value_clip)
                error = torch.maximum(error, (near - target) ** 2)
            total = total - surrogate + algorithm.value * 0.5 * error + algorithm.entropy * (logs.exp() * logs).sum()
    return total


@pytest.mark.parametrize(
    "options", [{}, {"value_clip": 0.05, "reward_scale": 0.3, "clip": 0.05}], ids=["plain", "clipped"]
)
def test_the_gradient_is_that_of_a_plain_implementation(options):
    algorithm = RL2(**options)
    subject = learner(algorithm, GRU(hidden=4), Chance(), dtype=torch.float64)
    about, old, new = context(subject, 6), somewhere(subject, seed=1), somewhere(subject, seed=2)
    new = {**new, "model": old["model"] + (new["model"] - old["model"]) * 0.7}
    records, _, _ = algorithm.rollout(old, about)
    gradients, sums, weight = algorithm.gradient(new, records, SETTINGS, about)
    leaves = {n: t.clone().requires_grad_() for n, t in new["model"].items()}
    expected = torch.autograd.grad(plain_loss(algorithm, leaves, Trials.of(records)), list(leaves.values()))
    torch.testing.assert_close(
        flat(gradients["model"]), torch.cat([g.reshape(-1) for g in expected]), rtol=1e-9, atol=1e-10
    )
    assert 0.05 < sums["clip_fraction"] / weight < 0.95 and weight == float(
        (records.columns["flags"] & VALID).bool().sum()
    )


def gradient(bptt, *, together=False):
    environment = Chance(episodes=3, horizon=4)
    algorithm = RL2(bptt=bptt, bptt_together=together)
    subject = learner(algorithm, GRU(hidden=4), environment, dtype=torch.float64)
    about, theta = context(subject, 6), somewhere(subject)
    records, _, _ = algorithm.rollout(theta, about)
    return algorithm.gradient(theta, records, SETTINGS, about), records.columns["flags"].shape[1]


def test_backpropagation_through_the_whole_trial_is_a_window_as_long_as_the_trial():
    (whole, sums, _), length = gradient(None)
    (windowed, _, _), _ = gradient(length)
    assert flat(whole["model"]).equal(flat(windowed["model"]))
    (short, same_sums, _), _ = gradient(3)
    assert float((flat(short["model"]) - flat(whole["model"])).norm() / flat(whole["model"]).norm()) > 1e-3
    # The memory is carried on, so that nothing but the gradient changes.
    assert same_sums == pytest.approx(sums, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("bptt", [1, 3, 5, 12])
def test_windows_together_are_windows_one_after_the_other(bptt):
    (expected, sums, weight), _ = gradient(bptt)
    (together, same_sums, same_weight), _ = gradient(bptt, together=True)
    torch.testing.assert_close(flat(together["model"]), flat(expected["model"]), rtol=1e-9, atol=1e-11)
    assert same_sums == pytest.approx(sums, rel=1e-9) and same_weight == weight


def test_updates_end_once_the_divergence_passes_its_limit():
    subject = learner(RL2(kl_limit=1e-4, epochs=10), GRU(hidden=8), Chance(), lr=0.03)
    kls = []

    def watch(round, total):
        if round.index:
            kls.append(total.metrics["kl"] / total.weight)

    _, report = train(subject, 1, watch=watch)
    assert report["updates"] == len(kls) < 40
    assert kls[-1] > 1e-4 and all(kl <= 1e-4 for kl in kls[:-1])


def test_advantages_are_normalised_over_all_shards():
    subject, seen = learner(RL2(epochs=1), GRU(hidden=8), Chance()), []
    train(subject, 1, watch=lambda round, *_: seen.append({shard.computation for shard in round.shards}))
    whole = learner(RL2(epochs=1, minibatches=1), GRU(hidden=8), Chance(), shard=16)
    about = context(whole, 16)
    theta = whole.initial(0).theta(whole.slots)
    batch = Trials.of(whole.algorithm.rollout(theta, about)[0])
    (window,) = whole.algorithm.windows(about.policy(theta), batch, {})
    advantage = window.advantage[window.valid].double()
    for computations in seen[1:]:
        [computation] = computations
        found = dict(computation.statistics)
        assert found["mean"] == pytest.approx(float(advantage.mean()), abs=1e-6)
        assert found["deviation"] == pytest.approx(float(advantage.std(correction=0)), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"discount": 1.5}, r"algorithm.discount: 1.5; expected \[0, 1\]"),
        ({"minibatches": 0}, "algorithm.minibatches: 0; expected 1 or more"),
        ({"optimizer": "adam"}, "algorithm.optimizer: 'adam' is not one of ppo, trpo"),
        ({"optimizer": "trpo", "kl_limit": 0.1}, "algorithm.kl_limit: 0.1 goes with optimizer: ppo"),
        ({"bptt": 0}, "algorithm.bptt: 0; expected 1 or more"),
        ({"bptt_together": True}, "algorithm.bptt_together: true needs algorithm.bptt"),
    ],
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        RL2(**options)


# Controls -------------------------------------------------------------------------------------------------------------

BANDIT = Bandit(arms=2, episodes=10)
TRIALS = 4000


@dataclass(frozen=True)
class Shuffled(Policy):
    """A policy that gets the reward of another trial at every step."""

    def features(self, observation, seen):
        order = torch.roll(torch.arange(len(observation)), 1)
        return super().features(observation, seen.__class__(seen.action, seen.reward[order], seen.begun))


def trained(model, meta_steps):
    algorithm = RL2(epochs=6, minibatches=2, gae_lambda=0.95)
    subject = learner(algorithm, model, BANDIT, batch=512, shard=128, lr=1e-2, clip_norm=0.5)
    return subject, train(subject, meta_steps)[0]


@pytest.mark.lane("numerics")
def test_a_policy_with_memory_adapts_and_shuffled_rewards_destroy_that():
    subject, state = trained(GRU(hidden=24), 40)
    theta, keys = state.theta(subject.slots), TaskKey.of(0, "test", 0, range(TRIALS))
    policy = context(subject).policy(theta)
    returns = rollout(BANDIT, policy, keys).by_episode(10).sum(1)
    shuffled = rollout(BANDIT, Shuffled(policy.model, policy.parameters, policy.actions), keys).by_episode(10).sum(1)
    error = returns.std() / math.sqrt(TRIALS)
    assert returns.mean() > 5.6  # the optimum is 6.0218
    assert abs(shuffled.mean() - 5.0) < 3.5 * error


@pytest.mark.lane("numerics")
def test_a_policy_without_memory_scores_the_memoryless_optimum():
    subject, state = trained(Reactive(hidden=(16,)), 10)
    for returns in (v.sum(1) for n, v in evaluate(subject, state, TRIALS).items() if n != "task"):
        assert abs(returns.mean() - 5.0) < 3.5 * returns.std() / math.sqrt(TRIALS)


@pytest.mark.parametrize("name", ["entropy", "gae_lambda"])
def test_linear_schedules(name):
    algorithm = RL2(**{name: 0.05, f"final_{name}": 0.01, f"{name}_steps": 100})
    assert [round(getattr(algorithm.at(step), name), 6) for step in (0, 50, 100, 1000)] == [0.05, 0.03, 0.01, 0.01]
    assert getattr(RL2(**{name: 0.05}).at(1000), name) == 0.05


def test_lambda_reaches_the_shards_as_it_is_at_their_meta_step():
    """The first meta-steps are those of λ = 0, and differ from those of the final λ = 1."""
    line = {"gae_lambda": 0.0, "final_gae_lambda": 1.0}
    near, one, zero = (
        train(learner(RL2(**more), GRU(hidden=8), Chance()), 2)[0].sha256()
        for more in (line | {"gae_lambda_steps": 1}, {"gae_lambda": 1.0}, {"gae_lambda": 0.0})
    )
    assert len({near, one, zero}) == 3  # λ: 0 then 1; 1 and 1; 0 and 0
    first = [
        train(learner(RL2(**more), GRU(hidden=8), Chance()), 1)[0].sha256()
        for more in (line | {"gae_lambda_steps": 1}, {"gae_lambda": 0.0})
    ]
    assert first[0] == first[1]


@pytest.mark.parametrize("meta_step", [0, 75, 150])
def test_advantages_have_mean_0_and_deviation_1_at_the_lambda_of_their_meta_step(meta_step):
    """The rollout's statistics and the update rounds use the same λ; with λ's first value: 1.96 ± 1.43 at 150."""
    schedule = {"gae_lambda": 0.3, "final_gae_lambda": 0.8, "gae_lambda_steps": 150, "reward_scale": 0.1}
    subject = learner(RL2(**schedule), GRU(hidden=8), TabularMDP(episodes=4), batch=32, shard=8)
    seen = []

    state = subject.initial(0)
    run_meta_step(subject, state, meta_step, 0, lambda round, _: seen.append(round.shards[0].computation))
    statistics = dict(next(c for c in seen if isinstance(c, Gradient)).statistics)
    about = context(subject, 32, meta_step=meta_step)
    batch = Trials.of(RL2(**schedule).rollout(state.theta(subject.slots), about)[0])
    lam = 0.3 + 0.5 * meta_step / 150
    estimate = advantages(batch, 0.99, lam, 0.1)[batch.flag(VALID)].double()
    normal = (estimate - statistics["mean"]) / statistics["deviation"]
    assert abs(float(normal.mean())) < 1e-6
    assert abs(float(normal.std(correction=0)) - 1) < 1e-6
