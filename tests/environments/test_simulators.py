"""Test Python simulators behind the batched interface: purity, spaces, and failures."""

import gc
import logging
import math
import pickle
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("gymnasium", reason="needs gymnasium: pip install 'metadist[rl]'")

import own_environments as own
from tiny import train
from trials import context, learner, somewhere

from metadist.algorithms.rl2 import RL2
from metadist.config.build import build
from metadist.core.computation import Rollout
from metadist.core.errors import ConfigError, NonFiniteError, WorkerError
from metadist.core.random import TaskKey
from metadist.core.round import Shard
from metadist.environments import Gymnasium
from metadist.environments.simulated import EnvironmentFault
from metadist.models.recurrent import GRU
from metadist.rl.environment import Continuous, Discrete
from metadist.rl.trial import EPISODE_END, TERMINATED, VALID, Trials, rollout
from metadist.workers.worker import TaskError, Worker


def environment(name, *, episodes=2, horizon=8, **options):
    return Gymnasium(make=f"own_environments:{name}", episodes=episodes, horizon=horizon, **options)


def subject(found, **options):
    return learner(RL2(minibatches=1), GRU(hidden=5), found, **options)


def played(found, keys, **options):
    made = subject(found)
    return rollout(found, context(made).policy(somewhere(made)), keys, **options)


def same(a, b):
    return all(torch.equal(getattr(a, n), getattr(b, n)) for n in Trials.columns())


KEYS = TaskKey.of(3, "train", 2, range(12))


# A trial is a pure function of its key --------------------------------------------------------------------------------


def test_a_trial_is_that_of_a_plain_loop():
    """Trials equal those by Gymnasium's own interface, with the same tasks, seeds and actions."""
    found = environment("Point", measures=("away",))
    trials, tasks = played(found, KEYS), found.sample(KEYS)
    noise = (KEYS.stream("reset").uniform(2, 2).double() * 2**24).long()
    ended_early = 0
    for row in range(12):
        plain, t = own.Point(), 0
        plain.set_task({name: column[row].numpy() for name, column in tasks.items()})
        for episode in range(2):
            seen, _ = plain.reset(seed=int(noise[row, episode, 0] * 2**24 + noise[row, episode, 1]))
            for clock in range(1, 9):
                torch.testing.assert_close(
                    trials.observation[row, t], torch.tensor(seen).flatten().float(), rtol=0, atol=1e-6
                )
                action = trials.action[row, t].clamp(-1, 1) * 3 + 1  # [−1, 1] is the whole of the box, [−2, 4]
                seen, reward, terminated, _, info = plain.step(np.clip(action.numpy(), -2, 4))
                assert float(trials.reward[row, t]) == pytest.approx(reward, abs=1e-6)
                assert float(trials.measured["away"][row, t]) == pytest.approx(info["away"], abs=1e-6)
                assert bool(trials.flag(TERMINATED)[row, t]) == terminated
                assert bool(trials.flag(EPISODE_END)[row, t]) == (terminated or clock == 8)
                t, ended_early = t + 1, ended_early + (terminated and clock < 8)
                if terminated:
                    break
        assert trials.flag(VALID)[row].sum() == t
    assert ended_early


def test_measured_values_by_episode():
    found = environment("Point", measures=("away", "height"), horizon=20)
    trials = played(found, KEYS)
    nearest, episode = trials.highest("away", 2), trials.episode()
    for row in range(12):
        for e in range(2):
            chosen = trials.flag(VALID)[row] & (episode[row] == e)
            assert nearest[row, e] == trials.measured["away"][row][chosen].max()
    assert trials.highest("height", 2).isnan().all()  # no info has it
    assert "away" not in trials.records().columns and same(trials, Trials.of(trials.records()))


def journey(found, keys, actions):
    """Return observations and rewards of B trials with the actions [B, T, A], in two episodes."""
    tasks, noise = found.sample(keys), keys.stream("reset").uniform(2, found.reset_noise)
    state, observation = found.reset(tasks, noise[:, 0])
    seen = [observation]
    for t in range(actions.shape[1]):
        if t == actions.shape[1] // 2:
            state, observation = found.restart(
                tasks, state, observation, torch.ones(len(actions), dtype=torch.bool), noise[:, 1]
            )
            seen.append(observation)
        step = found.step(tasks, state, actions[:, t], torch.empty(len(actions), 0))
        seen += [step.observation, step.reward.unsqueeze(1)]
    return torch.cat(seen, 1)


@pytest.mark.parametrize(("name", "pure"), [("Point", True), ("Leaky", False)])
def test_simulators_serve_one_trial_after_another(name, pure):
    """The bits depend neither on earlier trials nor on other rows, if a reset clears the environment's state."""
    found = environment(name, horizon=100)
    actions = torch.rand(12, 16, 1, generator=torch.Generator().manual_seed(0)) * 2 - 1
    first = journey(found, KEYS, actions)
    gc.collect()
    assert len(found._idle[0]) == 12  # kept simulators, which this trial uses again
    again, part = journey(found, KEYS, actions), journey(found, TaskKey.of(3, "train", 2, [7, 2]), actions[[7, 2]])
    assert (torch.equal(first, again) and torch.equal(first[[7, 2]], part)) == pure
    assert torch.equal(first, journey(environment(name, horizon=100), KEYS, actions))


@pytest.mark.parametrize(("name", "source"), [("Leaky", "kept"), ("normalised", "kept"), ("Gambling", "of random")])
def test_the_dry_run_refuses_environments_that_remember_or_gamble(name, source):
    subject(environment("Point")).dry_run(0)
    with pytest.raises(ConfigError, match=f"'own_environments:{name}' gives another trial .*{source}"):
        subject(environment(name)).dry_run(0)


def test_simulators_stay_at_home():
    found = environment("Point")
    played(found, KEYS)
    there = pickle.loads(pickle.dumps(found))
    assert there == found and there._idle == {} and same(played(there, KEYS), played(found, KEYS))


# Tasks and spaces -----------------------------------------------------------------------------------------------------


def test_tasks_are_data_keyed_by_seed_split_step_and_index():
    found = environment("Point")
    whole = found.sample(TaskKey.of(3, "train", 2, range(50)))
    assert whole["goal"].shape == (50,) and whole["wind"].shape == (50, 2) and whole["goal"].dtype == torch.float64
    part = environment("Point").sample(TaskKey.of(3, "train", 2, [41, 7]))
    assert all(torch.equal(part[n], whole[n][[41, 7]]) for n in whole)
    for seed, meta_step in ((4, 2), (3, 3)):
        assert not (found.sample(TaskKey.of(seed, "train", meta_step, range(50)))["goal"] == whole["goal"]).any()
    assert (whole["goal"] < 1).all() and (
        found.sample(TaskKey.of(3, "test", 0, range(50)))["goal"] >= 2
    ).all()  # the environment got the split


def test_tasks_of_the_older_form_are_keyed_as_well():
    found, before = environment("Old"), np.random.get_state()[1].copy()
    goals = found.sample(KEYS)["task"]
    np.random.seed(5)
    assert torch.equal(environment("Old").sample(KEYS)["task"], goals) and len(goals.unique()) == 12
    np.random.seed(5)
    drawn = np.random.uniform()
    np.random.seed(5)
    found.sample(KEYS)
    assert np.random.uniform() == drawn and before is not None  # the state of the global generator did not change
    assert played(found, KEYS).reward.std() > 0


def test_discrete_actions_and_observations_of_parts():
    found = environment("Choices")
    assert found.actions == Discrete(2) and found.observation_size == 5
    trials = played(found, KEYS)
    assert torch.equal(trials.reward, trials.action + 5.0)
    cell = found.sample(KEYS)["task"].squeeze(1)
    for start in (0, 8):
        assert torch.equal(trials.observation[:, start, :3], torch.eye(3)[cell])
    assert torch.equal(trials.observation[:, 1, 3:], trials.action[:, :1].expand(-1, 2).float())


def test_wrappers_and_endless_episodes():
    truncated = played(environment("wrapped"), KEYS)
    assert (
        truncated.reward.shape[1] == 14
        and not truncated.flag(EPISODE_END)[:, :6].any()
        and truncated.flag(EPISODE_END)[:, 6].all()
    )
    endless = played(environment("Point", arguments={"near": 0.0}, horizon=9), KEYS)
    assert (
        endless.reward.shape[1] == 18 and endless.flag(EPISODE_END)[:, 8].all() and not endless.flag(TERMINATED).any()
    )


# Invalid environments -------------------------------------------------------------------------------------------------

FAULTS = [
    ("raise", r"episode 1, after 2 steps: raised ZeroDivisionError: boom"),
    ("reset", r"before its first step: raised OSError: no such robot"),
    ("shape", r"the observation has shape \[1, 1\]; expected \[2, 1\]"),
    ("type", r"the observation is of type object; expected numbers"),
    ("reward", r"the reward is 'high' \(str\); expected a number"),
    ("vector", r"the reward is '\[1. 1.\]' \(ndarray\); expected a number"),
    ("measure", r"info\['away'\] is 'None' \(NoneType\); expected a number"),
    ("old", r"step\(\) returned 4 values; expected \(observation, reward, terminated, truncated, info\)"),
]


def bad(how, **options):
    return environment("Bad", arguments={"how": how}, measures=("away",), **options)


@pytest.mark.parametrize(("how", "message"), FAULTS)
def test_a_fault_names_environment_and_task(how, message):
    goals = bad(how).sample(KEYS)["goal"]
    first = float(goals[goals > 0.5][0])
    named = rf"environment own_environments:Bad, task \{{goal: {first:.6g}, wind: \[.*\]\}}, .*" + message
    with pytest.raises(EnvironmentFault, match=named):
        played(bad(how), KEYS)
    with pytest.raises(WorkerError, match=named + r".* \(environment\.on_error: abort\)"):
        played(bad(how, on_error="abort"), KEYS)


@pytest.mark.lane("numerics")
@pytest.mark.parametrize("how", [*(how for how, _ in FAULTS), "nan"])
def test_skipped_trials_are_left_out_and_the_others_go_on(how, caplog):
    found = bad(how, on_error="skip")
    wrong = found.sample(KEYS)["goal"] > 0.5
    assert 0 < wrong.sum() < 12
    with caplog.at_level(logging.WARNING):
        trials = played(found, KEYS)
    assert caplog.text.count("the trial is left out") == int(wrong.sum())
    assert (trials.flags[wrong] == 0).all() and trials.flag(VALID)[~wrong].all()
    whole = played(bad("never"), KEYS)
    for name in Trials.columns():
        assert torch.equal(getattr(trials, name)[~wrong], getattr(whole, name)[~wrong]), name
    assert all(torch.isfinite(getattr(trials, n).float()).all() for n in Trials.columns())
    gc.collect()
    assert len(found._idle[0]) >= int((~wrong).sum()) and all(s.goal is None or s.goal <= 0.5 for s in found._idle[0])


def test_learning_leaves_skipped_trials_out():
    """The gradient of a shard with skipped trials is that of the other trials."""
    made = subject(bad("raise", on_error="skip"), batch=12, shard=12)
    theta, about = somewhere(made), context(made, 12, seed=3, meta_step=2)
    records, sums, weight = made.algorithm.rollout(theta, about)
    right = ~(made.tasks.sample(about.keys)["goal"] > 0.5)
    assert weight == 16 * right.sum()
    settings = {"mean": 0.1, "deviation": 2.0}
    gradient, _, total = made.algorithm.gradient(theta, records, settings, about)
    alone = type(records)({name: column[right] for name, column in records.columns.items()})
    expected, _, same_total = made.algorithm.gradient(theta, alone, settings, about)
    assert total == same_total == weight
    for name, value in gradient["model"].items():
        torch.testing.assert_close(value, expected["model"][name], rtol=1e-4, atol=1e-4)


@pytest.mark.lane("services")  # an environment of the user's own is tried in another process too
def test_a_run_goes_on_without_skipped_trials(tmp_path):
    """Shards whose trials were all left out have no weight, in training and in evaluation."""
    document = {
        "environment": {
            "name": "gymnasium",
            "make": "own_environments:Bad",
            "on_error": "skip",
            "horizon": 4,
            "measures": ["away"],
        },
        "model": {"name": "gru", "hidden": 4},
        "algorithm": {"name": "rl2", "minibatches": 3},
        "outer": {"meta_batch_size": 6, "shard_size": 1, "meta_steps": 2},
        "evaluate": {"every": 2, "tasks": 8, "test_tasks": 12},
        "workers": [{"min": 0, "max": 0}],
        "tracking": {"uri": "none", "log_every": 1},
    }
    config = build(document)
    result = train(config, run_dir=str(tmp_path / "run"), plots=False)
    right = config.tasks.made.sample(TaskKey.of(0, "test", 0, range(12)))["goal"] % 1 <= 0.5
    (judged,) = [e for e in result.evaluations if e.split == "test"]
    assert judged.tasks == len(judged.trials["greedy"]) == int(right.sum()) < 12
    assert len(judged.measured["away"]) == 2 and all(math.isfinite(v) for v in (*judged.mean, *judged.measured["away"]))
    wrong = config.tasks.made.sample(TaskKey.of(0, "train", 0, range(6)))["goal"] % 1 > 0.5
    first = result.outcome.progress.curve[0]
    assert first["left_out"] == int(wrong.sum()) > 0


def test_nan_is_refused_where_it_is_rolled_out():
    wrong = (bad("nan").sample(KEYS)["goal"] > 0.5).nonzero().flatten().tolist()
    with pytest.raises(NonFiniteError) as caught:
        played(bad("nan"), KEYS)
    assert caught.value.tasks == tuple(wrong)
    with pytest.raises(WorkerError, match="the observation has NaN or Inf"):
        played(bad("nan", on_error="abort"), KEYS)


def test_a_worker_blames_the_tasks_whose_environments_raise():
    made = subject(bad("raise"), batch=4, shard=4)
    worker = Worker(made, name="w", device="cpu", gpus=0, threads=1)
    shard = Shard("run", 2, 0, 0, Rollout(), 0, 4, seed=3, key_step=2, keeps=True)
    goals = made.tasks.sample(TaskKey.of(3, "train", 2, range(4)))["goal"]
    with pytest.raises(TaskError, match="EnvironmentFault: environment own_environments:Bad, task") as caught:
        worker.compute(shard, made.initial(0).slots)
    assert caught.value.tasks == tuple((goals > 0.5).nonzero().flatten().tolist()) != ()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("unknown", "unknown task field 'gaol'; did you mean 'goal'"),
        ("missing", "task field 'wind' is missing"),
        ("shape", r"task field 'wind' is float64 \[3\], and was float64 \[2\] in the first task"),
        ("text", "a task's field 'goal' is 'far'; expected a number"),
    ],
)
def test_tasks_that_are_not_alike(how, message):
    with pytest.raises(ConfigError, match=message):
        environment("Changing", arguments={"how": how}).sample(KEYS)


def test_tasks_from_elsewhere_have_known_fields():
    found = environment("Point")
    tasks = found.sample(KEYS)
    with pytest.raises(ConfigError, match="unknown task field 'gaol'; did you mean 'goal'.*has: goal, wind"):
        played(found, KEYS, tasks={"gaol": tasks["goal"], "wind": tasks["wind"]})
    with pytest.raises(ConfigError, match="task field 'wind' is missing"):
        played(found, KEYS, tasks={"goal": tasks["goal"]})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"environment\.make: ''; expected package\.module:function"),
        ({"make": "own_environments"}, r"environment\.make: 'own_environments'; expected"),
        ({"make": "no_such_module:make"}, "No module named 'no_such_module'"),
        ({"make": "own_environments:Pont"}, "has no 'Pont'; did you mean 'Point'"),
        ({"make": "own_environments:Point", "arguments": {"far": 1}}, r"Point\(far\) raised TypeError"),
        ({"make": "own_environments:no_tasks"}, "without sample_tasks"),
        (
            {"make": "own_environments:unusual"},
            "action space Dict.*expected a Box, Discrete, MultiDiscrete or MultiBinary",
        ),
        ({"make": "own_environments:Point", "on_error": "ignore"}, r"environment\.on_error: 'ignore' is not allowed"),
        ({"make": "own_environments:Point", "horizon": 0}, r"environment\.horizon: 0 is below 1"),
        (
            {"make": "own_environments:Point", "episode": 2},
            r"unknown key 'environment\.episode'; did you mean 'episodes'",
        ),
    ],
)
def test_impossible_settings_are_named_before_a_run(options, message):
    with pytest.raises(ConfigError, match=message):
        build({"environment": {"name": "gymnasium", **options}, "model": {"name": "gru"}, "algorithm": {"name": "rl2"}})


def test_a_config_builds_a_policy_that_fits():
    document = {
        "environment": {"name": "gymnasium", "make": "own_environments:Point"},
        "model": {"name": "gru"},
        "algorithm": {"name": "rl2"},
    }
    made = build(document).learner
    assert made.tasks.actions == Continuous(1) and made.tasks.protocol("test")["make"] == "own_environments:Point"


def test_missing_packages_are_named_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(ConfigError, match=r"needs gymnasium, which is not installed: pip install 'metadist\[rl\]'"):
        _ = environment("Point").observation_size
