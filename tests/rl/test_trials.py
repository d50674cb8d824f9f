"""Test trials: the policy's inputs, its memory across episodes, and advantages."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from trials import Chance, context, learner, somewhere

from metadist.algorithms.rl2 import RL2
from metadist.core.errors import NonFiniteError
from metadist.core.random import TaskKey
from metadist.models.recurrent import GRU
from metadist.rl.environment import Step
from metadist.rl.trial import EPISODE_END, TERMINATED, TRIAL_END, VALID, Repetition, advantages, rollout

SUBJECT = learner(RL2(), GRU(hidden=5), Chance())
POLICY = context(SUBJECT).policy(somewhere(SUBJECT))


def trials(count=40, environment=SUBJECT.tasks, policy=POLICY, **options):
    return rollout(environment, policy, TaskKey.of(3, "train", 2, range(count)), **options)


def test_flags_say_how_every_step_ended():
    found = trials()
    for row in range(40):
        clock = episode = 0
        for t in range(found.flags.shape[1]):
            flags = int(found.flags[row, t])
            if episode == 3:
                assert flags == 0
                continue
            clock += 1
            ends = bool(flags & TERMINATED) or clock == 4
            assert flags & VALID and bool(flags & EPISODE_END) == ends
            episode, clock = episode + ends, 0 if ends else clock
            assert bool(flags & TRIAL_END) == (episode == 3)
        assert episode == 3
    assert len({int((row & VALID).sum()) for row in found.flags}) > 3


def test_returns_by_episode_are_those_of_a_plain_loop():
    found = trials()
    expected = torch.zeros(40, 3, dtype=torch.float64)
    for row in range(40):
        episode = 0
        for t in range(found.flags.shape[1]):
            if found.flags[row, t] & VALID:
                expected[row, episode] += float(found.reward[row, t])
                episode += bool(found.flags[row, t] & EPISODE_END)
    torch.testing.assert_close(found.by_episode(3), expected, rtol=0, atol=1e-12)


def test_advantages_are_those_of_a_plain_loop_across_episode_ends():
    found, discount, mixing, scale = trials(), 0.9, 0.7, 2.0
    computed = advantages(found, discount, mixing, scale)
    crossed = 0
    for row in range(40):
        steps = int((found.flags[row] & VALID).bool().sum())
        values = [float(v) for v in found.value[row, :steps]] + [0.0]  # nothing follows a trial's end
        deltas = [scale * float(found.reward[row, t]) + discount * values[t + 1] - values[t] for t in range(steps)]
        for t in range(steps):
            expected = sum((discount * mixing) ** (s - t) * deltas[s] for s in range(t, steps))
            assert float(computed[row, t]) == pytest.approx(expected, abs=1e-5)
            crossed += bool(found.flags[row, t] & EPISODE_END) and t + 1 < steps
        assert not computed[row, steps:].any()
    assert crossed > 40


def test_a_task_is_rolled_out_alike_in_any_company():
    alone = rollout(SUBJECT.tasks, POLICY, TaskKey.of(3, "train", 2, [7]))
    for name in ("action", "reward", "flags", "observation"):
        length = alone.flags.shape[1]
        assert getattr(trials(), name)[7:8, :length].equal(getattr(alone, name)), name


def test_stages_and_serial_numbers_key_the_noise():
    serial, episodes = torch.arange(40).unsqueeze(1), SUBJECT.tasks.episodes
    first = trials()
    stage = trials(repetition=Repetition(episodes, stage=1))
    numbered = trials(repetition=Repetition(episodes, serial=serial))
    assert not first.observation[:, 0].equal(stage.observation[:, 0])
    assert first.observation[0, 0].equal(numbered.observation[0, 0])
    assert (first.observation[1:, 0] != numbered.observation[1:, 0]).all()


def heads(found, policy=POLICY):
    """Compute the policy's outputs at all steps together, from the memory of a trial's start."""
    features = policy.features(found.observation, found.seen(policy))
    return policy(features, policy.start(len(features), features.device))[0]


def test_rollout_and_learner_give_the_policy_the_same_inputs():
    found = trials()
    again = POLICY.distribution.log_probability(heads(found), found.action)
    valid = found.flag(VALID)
    torch.testing.assert_close(again[valid], found.log_probability[valid], rtol=0, atol=1e-5)


def test_the_last_reward_and_action_of_an_episode_reach_the_first_step_of_the_next():
    found = trials()
    ended = found.flag(EPISODE_END) & ~found.flag(TRIAL_END)
    row, t = (int(i) for i in ended.nonzero()[0])
    shown = found.seen(POLICY)
    assert shown.reward[row, t + 1] == found.reward[row, t] != 0
    assert shown.begun[row, t + 1] == 1 and shown.begun[row, 0] == 0
    assert shown.action[row, t + 1].argmax() == found.action[row, t]
    assert not shown.reward[:, 0].any() and not shown.action[:, 0].any()
    changed = found.reward.clone()
    changed[row, t] += 1.0
    moved = (heads(replace(found, reward=changed)) - heads(found)).abs().amax(-1)
    assert moved[row, t + 1] > 1e-4
    assert not moved[row, : t + 1].any() and not moved[:row].any() and not moved[row + 1 :].any()


def test_memory_survives_episode_ends_and_not_trial_ends():
    found = trials()
    row, t = (int(i) for i in (found.flag(EPISODE_END) & ~found.flag(TRIAL_END)).nonzero()[0])
    assert t >= 1
    changed = found.observation.clone()
    changed[row, t - 1] += 1.0  # within the first episode
    moved = (heads(replace(found, observation=changed)) - heads(found)).abs().amax(-1)
    assert moved[row, t + 1] > 1e-5, "forgotten at the episode's end"
    other = [i for i in range(40) if i != row]
    assert not moved[other].any()
    # A trial starts as if nothing had been before it: its first action is the one of an empty memory.
    first = POLICY.step(
        found.observation[:, 0], found.seen(POLICY).__class__.nothing(40, 3, torch.device("cpu")), torch.zeros(40, 5)
    )[0]
    log_probability = POLICY.distribution.log_probability(first, found.action[:, 0])
    torch.testing.assert_close(log_probability, found.log_probability[:, 0], rtol=0, atol=1e-6)


@dataclass(frozen=True)
class Broken(Chance):
    """Returns NaN after ``ends`` of its episodes have terminated, where the task's number is below 0."""

    ends: int = 0

    def reset(self, tasks, noise):
        return (noise, torch.zeros(len(noise))), noise

    def restart(self, tasks, state, observation, ended, noise):
        return state, observation

    def step(self, tasks, state, action, noise):
        step = super().step(tasks, state[0], action, noise)
        broken = (state[1] >= self.ends) & (tasks["number"] < 0)
        observation = torch.where(broken.unsqueeze(-1), torch.nan, step.observation)
        return Step(
            (step.observation, state[1] + step.terminated),
            observation,
            torch.where(broken, torch.nan, step.reward),
            step.terminated,
        )


def test_nan_names_the_tasks_that_gave_it():
    environment = Broken()
    bad = environment.sample(TaskKey.of(3, "train", 2, range(40)))["number"] < 0
    with pytest.raises(NonFiniteError) as caught:
        trials(environment=environment)
    assert caught.value.tasks == tuple(bad.nonzero().squeeze(1).tolist())


def test_nan_after_a_trial_has_no_effect():
    subject = learner(RL2(), GRU(hidden=5), Broken(ends=3, horizon=12), batch=64, shard=16)
    theta, about = somewhere(subject), context(subject, 16)
    records, sums, _ = subject.algorithm.rollout(theta, about)
    over = (records.columns["flags"] & VALID) == 0
    assert (over & (subject.tasks.sample(about.keys)["number"] < 0).unsqueeze(1)).any()
    gradients, more, _ = subject.algorithm.gradient(theta, records, {"mean": 0.0, "deviation": 1.0}, about)
    assert all(torch.isfinite(t).all() for t in gradients["model"].values())
    assert all(math.isfinite(v) for v in (*sums.values(), *more.values()))
