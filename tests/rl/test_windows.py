"""Trials that are longer than a meta-step: their windows are those of whole trials, and so are the gradients."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from faults import everywhere
from trials import Chance, context, evaluate, learner, somewhere

from metadist.algorithms.rl2 import RL2
from metadist.core.errors import ConfigError
from metadist.core.random import TaskKey
from metadist.core.round import MetaStepKey, run_rounds
from metadist.environments.bandit import Bandit
from metadist.models.causal_transformer import CausalTransformer
from metadist.models.recurrent import GRU, LSTM
from metadist.rl.algorithm import TrialContext
from metadist.rl.trial import TRIAL_END, VALID, Trials, rollout
from metadist.training.scheduler import Scheduler
from metadist.workers.local import LocalExecutor

LONG = Chance(episodes=4, horizon=5)
WINDOW = 6
POLICIES = {
    "gru": GRU(hidden=8),
    "lstm": LSTM(hidden=8),
    "causal_transformer": CausalTransformer(width=8, depth=2, heads=2, window=5),
}


def played(subject, theta, meta_steps, rows=6):
    """The records of ``rows`` trials, one meta-step after the other, all under one θ."""
    before, found = None, []
    for meta_step in range(meta_steps):
        keys = TaskKey.of(0, "train", meta_step, range(rows))
        about = TrialContext(subject.tasks, subject.model, keys, meta_step, before)
        before, sums, weight = subject.algorithm.rollout(theta, about)
        found.append((before, sums, weight))
    return found


# Rollouts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("continuous", [False, True], ids=["discrete", "continuous"])
@pytest.mark.parametrize("name", POLICIES)
def test_under_one_theta_the_windows_are_the_whole_trials(name, continuous):
    environment = replace(LONG, continuous=continuous)
    subject = learner(RL2(window=WINDOW), POLICIES[name], environment)
    theta = somewhere(subject, scale=0.1)
    found = [records for records, _, _ in played(subject, theta, 14)]
    compared = 0
    for row in range(6):
        lives: dict[int, list[int]] = {}
        for meta_step, records in enumerate(found):
            lives.setdefault(int(records.columns["going/started"][row]), []).append(meta_step)
        for start, steps in list(lives.items())[1:-1]:  # the first life is cut, the last one may not be over
            key = TaskKey.of(0, "train", start, [row])
            whole = rollout(environment, context(subject).policy(theta), key)
            parts = [Trials.of(found[m]) for m in steps]
            for column in Trials.columns():
                if column == "task":
                    continue
                joined = torch.cat([getattr(p, column)[row] for p in parts])
                real = torch.cat([p.flag(VALID)[row] for p in parts])
                expected = getattr(whole, column)[0][whole.flag(VALID)[0]]
                torch.testing.assert_close(joined[real], expected, rtol=1e-5, atol=1e-6)
                # An action that is a float has rounding of its own in a batch of its own.
                exact = ("flags",) if continuous else ("action", "flags", "reward")
                assert column not in exact or torch.equal(joined[real], expected)
            returns = found[steps[-1]].columns["going/returns"][row]
            torch.testing.assert_close(returns, whole.by_episode(4)[0], rtol=0, atol=1e-5 if continuous else 1e-12)
            compared += len(steps) > 1
    assert compared >= 6


def test_the_first_trials_are_cut_so_that_later_ones_begin_in_different_meta_steps():
    environment = Bandit(arms=3, episodes=12)
    subject = learner(RL2(window=3), GRU(hidden=4), environment)
    found = played(subject, somewhere(subject), 9, rows=40)
    starts = torch.stack([records.columns["going/started"] for records, _, _ in found[:8]])
    begun = [int((row == m).sum()) for m, row in enumerate(starts)]
    assert begun[0] == 40 and all(b >= 3 for b in begun[1:]), "about a quarter of them in every meta-step"
    assert all(int(e - s) == 4 for s, e in zip(starts[7], found[7][0].columns["going/ends"]))
    for records, sums, weight in found:
        ended = (records.columns["flags"] & TRIAL_END).bool().any(1)
        assert sums["finished"] == int(ended.sum())
        assert sums["return"] == pytest.approx(float(records.columns["going/returns"][ended].sum()), abs=1e-9)
        assert weight == 40 * 3


def test_a_trial_is_the_same_alone_and_among_others():
    subject = learner(RL2(window=WINDOW), GRU(hidden=8), LONG)
    theta, alone = somewhere(subject), None
    among = [records for records, _, _ in played(subject, theta, 6)]
    for meta_step in range(6):
        keys = TaskKey.of(0, "train", meta_step, [3])
        alone, _, _ = subject.algorithm.rollout(
            theta, TrialContext(subject.tasks, subject.model, keys, meta_step, alone)
        )
        for column in ("action", "flags", "going/started", "going/ends", "going/step", "going/moment/0"):
            if column == "going/moment/0" and bool((alone.columns["flags"] & TRIAL_END).any()):
                continue  # the state after a trial's end is not used
            width = alone.columns[column].shape[1:]
            found = among[meta_step].columns[column][3:4]
            found = found[:, : width[0]] if width else found
            assert torch.equal(found, alone.columns[column]), column


# Gradients ------------------------------------------------------------------------------------------------------------


def gradient(subject, theta, records, statistics=(("deviation", 1.7), ("mean", 0.1))):
    found, _, weight = subject.algorithm.gradient(
        theta, records, dict(statistics), context(subject, len(records.columns["task"]))
    )
    return torch.cat([t.reshape(-1) for t in found["model"].values()]), weight


@pytest.mark.parametrize("name", POLICIES)
def test_with_lambda_0_the_windows_of_a_trial_have_the_gradients_of_its_bptt_windows(name):
    """λ = 0: an advantage needs the value of the next observation alone, which both know.

    Under the parameters that played: in an update after that, the memory at a border is still theirs.
    """
    environment = Bandit(arms=3, episodes=12)
    settings = {"gae_lambda": 0.0, "entropy": 0.01}
    windows = learner(RL2(window=4, **settings), POLICIES[name], environment, dtype=torch.float64)
    whole = learner(RL2(bptt=4, **settings), POLICIES[name], environment, dtype=torch.float64)
    theta = somewhere(whole)
    found = [records for records, _, _ in played(windows, theta, 7)]
    for row in range(6):
        starts = [int(records.columns["going/started"][row]) for records in found]
        start = next(s for s in starts if s > 0)
        parts = [found[m] for m, s in enumerate(starts) if s == start]
        assert len(parts) == 3
        expected = whole.algorithm.rollout(
            theta, TrialContext(environment, whole.model, TaskKey.of(0, "train", start, [row]), start)
        )[0]
        expected, _ = gradient(whole, theta, expected)
        parts = [type(p)({n: c[row : row + 1] for n, c in p.columns.items()}) for p in parts]
        total = sum(gradient(windows, theta, part)[0] for part in parts)
        torch.testing.assert_close(total, expected, rtol=1e-10, atol=1e-10)


def test_a_window_has_the_gradient_of_a_plain_loop():
    """Float64, the paper's equations spelled out: the memory is a constant, and the next value stands for the rest."""
    discount, mixing, clip, entropy, weight = 0.9, 0.8, 0.2, 0.03, 0.4
    algorithm = RL2(
        discount=discount, gae_lambda=mixing, clip=clip, entropy=entropy, value=weight, window=WINDOW, reward_scale=0.5
    )
    subject = learner(algorithm, GRU(hidden=8), LONG, dtype=torch.float64)
    acting, theta = somewhere(subject), somewhere(subject, scale=0.32, seed=4)
    records = played(subject, acting, 3)[2][0]
    found, counted = gradient(subject, theta, records, (("deviation", 1.7), ("mean", 0.1)))

    leaves = theta["model"].map(lambda t: t.detach().clone().requires_grad_())
    before, policy = context(subject).policy(acting), context(subject).policy(theta, leaves)
    columns, total, steps = records.columns, 0.0, 0
    goes_on = 0
    for row in range(6):
        flags = columns["flags"][row]
        length = int((flags & VALID).ne(0).sum())
        if not length:
            continue
        memory = columns["border/memory"][row : row + 1].double()
        seen = [columns[f"border/{n}"][row : row + 1] for n in ("action", "reward", "begun")]
        values, terms = [], []
        for t in range(length):
            features = torch.cat([columns["observation"][row, t : t + 1], *seen], -1).double()
            head, value, memory = policy(features.unsqueeze(1), memory)
            action = columns["action"][row, t]
            logs = head[0, 0].log_softmax(-1)
            terms.append((logs[action] - columns["log_probability"][row, t], -(logs.exp() * logs).sum()))
            values.append(value[0, 0])
            ended = (flags[t] & 4).ne(0).float().view(1, 1)
            seen = [
                torch.nn.functional.one_hot(action, 3).float().view(1, 3),
                columns["reward"][row, t].view(1, 1),
                ended,
            ]
        old = columns["value"][row]
        over = bool(flags[length - 1] & TRIAL_END)
        goes_on += not over
        beyond = torch.zeros((), dtype=torch.float64) if over else columns["border/following"][row]
        running, advantages = torch.zeros((), dtype=torch.float64), [None] * length
        for t in reversed(range(length)):
            following = beyond if t == length - 1 else old[t + 1]
            delta = 0.5 * columns["reward"][row, t].double() + discount * following - old[t]
            running = delta + discount * mixing * running
            advantages[t] = running
        for t in range(length):
            ratio, advantage = terms[t][0].exp(), (advantages[t] - 0.1) / 1.7
            surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
            error = 0.5 * (values[t] - (advantages[t] + old[t])) ** 2
            total = total - surrogate + weight * error - entropy * terms[t][1]
            steps += 1
    assert goes_on >= 2 and steps == counted
    expected = torch.autograd.grad(total, list(leaves.values()))
    torch.testing.assert_close(found, torch.cat([g.reshape(-1) for g in expected]), rtol=1e-10, atol=1e-10)

    # the value beyond is that of the parameters that played, and the border's memory is where they had come to
    following = played(subject, acting, 4)[3][0].columns
    for row in range(6):
        if following["going/step"][row] > WINDOW and int(following["going/started"][row]) <= 2:
            _, value, _ = before(
                torch.cat(
                    [
                        following["observation"][row, :1],
                        *(following[f"border/{n}"][row : row + 1] for n in ("action", "reward", "begun")),
                    ],
                    -1,
                )
                .double()
                .unsqueeze(1),
                following["border/memory"][row : row + 1].double(),
            )
            torch.testing.assert_close(value[0, 0], columns["border/following"][row].double(), rtol=1e-10, atol=1e-10)


# Meta-steps -----------------------------------------------------------------------------------------------------------

SMALL = {"epochs": 2, "minibatches": 2}


def trained(subject, wrap=None, meta_steps=6):
    executor = LocalExecutor(subject)
    fleet = Scheduler(executor if wrap is None else wrap(executor), subject)
    state, report = subject.initial(0), {}
    for step in range(meta_steps):
        state, report = run_rounds(subject.meta_step(MetaStepKey("run", step, 0), state), fleet.sum)
    executor.close()
    return state.sha256(), fleet, report, state


@pytest.mark.parametrize(
    "settings",
    [SMALL, {"optimizer": "trpo", **SMALL}, {"bptt": 3, "bptt_together": True, **SMALL}],
    ids=["ppo", "trpo", "bptt"],
)
def test_a_window_as_long_as_the_trial_is_full_bptt(settings):
    """The same bits as without windows: every window is one whole trial, which begins with an empty memory."""
    plain, windows = (
        trained(learner(RL2(window=window, **settings), LSTM(hidden=8), LONG, batch=8)) for window in (None, LONG.steps)
    )
    assert plain[0] == windows[0]
    assert {n: v for n, v in windows[2].items() if n in plain[2]} == pytest.approx(plain[2])
    assert trained(learner(RL2(window=WINDOW, **settings), LSTM(hidden=8), LONG, batch=8))[0] != plain[0]


@pytest.mark.parametrize("seed", range(2))
def test_lost_trials_are_played_again_under_the_parameters_of_each_meta_step(seed):
    subject = learner(RL2(window=WINDOW, **SMALL), GRU(hidden=8), LONG, batch=8)
    expected = trained(subject)[0]
    chance = random.Random(seed)

    def drop(executor, shard):
        for key in list(executor._kept.outputs):
            if chance.random() < 0.04:
                del executor._kept.outputs[key]

    sha256, fleet, *_ = trained(subject, everywhere(drop))
    assert fleet.retried["missing"] > 2
    assert sha256 == expected
    assert fleet.tasks_done == 8 * 6, "trials that are played again count once"


def test_a_policy_learns_from_windows():
    """A trial of 20 pulls in windows of 4: after 60 meta-steps it is far above chance, and far above its start."""
    subject = learner(
        RL2(window=4, epochs=3, minibatches=2, discount=0.95, gae_lambda=0.9, entropy=0.01),
        GRU(hidden=16),
        Bandit(arms=2, episodes=20),
        batch=128,
        shard=32,
        lr=1e-2,
    )
    _, _, _, state = trained(subject, meta_steps=60)
    before, after = (evaluate(subject, s, 400)["greedy"].sum(1) for s in (subject.initial(0), state))
    gained = after - before
    assert float(gained.mean()) > 6 * float(gained.std()) / 20


# Refusals -------------------------------------------------------------------------------------------------------------


def test_mistakes_are_refused_by_name():
    with pytest.raises(ConfigError, match=r"algorithm.window: 0; expected 1 or more"):
        RL2(window=0)
    subject = learner(RL2(window=WINDOW, **SMALL), GRU(hidden=8), LONG, batch=8)
    with pytest.raises(ConfigError, match="population of 8 trials, whose states go on"):
        subject.with_meta_batch_size(6)
    assert not learner(RL2(), GRU(hidden=8), LONG).has_states
