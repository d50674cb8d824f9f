"""Test Meta-World: task lists, known traps, and trials against its own interface."""

import gc
import sys

import pytest
import torch
from trials import context, learner, somewhere

from metadist.algorithms.rl2 import RL2
from metadist.core.errors import ConfigError
from metadist.core.random import SPLITS, TaskKey
from metadist.environments import MetaWorld
from metadist.environments.meta_world import families, listed
from metadist.models.recurrent import GRU
from metadist.rl.environment import Continuous
from metadist.rl.trial import EPISODE_END, Trials, rollout

metaworld = pytest.importorskip("metaworld", reason="needs Meta-World: pip install 'metadist[metaworld]'")

KEYS = TaskKey.of(3, "train", 2, range(4))


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("METADIST_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def policy(environment):
    made = learner(RL2(), GRU(hidden=5), environment)
    return context(made).policy(somewhere(made))


def of(environment, split):
    """Return the tasks of a split as hashable values."""
    family, parameters = environment.tasks_of(split)
    return {(int(f), *p.tolist()) for f, p in zip(family, parameters)}


def test_splits_and_task_seeds_have_no_goal_in_common():
    """Meta-World's own neighbouring seeds share goals: the test goals of one are the training goals of the next."""
    theirs = [metaworld.ML1("reach-v3", seed=s) for s in (0, 1)]
    assert theirs[0].test_tasks == theirs[1].train_tasks
    every = [of(MetaWorld(task_seed=seed), split) for seed in (0, 1) for split in SPLITS]
    assert [len(s) for s in every] == [50] * 6 and len(set.union(*every)) == 300
    sampled = {s: MetaWorld().sample(TaskKey.of(9, s, 4, range(500)))["parameters"] for s in SPLITS}
    for split, parameters in sampled.items():
        assert {tuple(p) for p in parameters.tolist()} == {p[1:] for p in of(MetaWorld(), split)}


def test_tasks_are_the_benchmarks_own():
    theirs = metaworld.ML1("push-v3", seed=6)
    environment = MetaWorld(family="push-v3", task_seed=2)
    for split, tasks in (("train", theirs.train_tasks), ("test", theirs.test_tasks)):
        simulator = theirs.train_classes["push-v3"]()
        for task, parameters in zip(tasks, environment.tasks_of(split)[1]):
            simulator.set_task(task)
            assert simulator._last_rand_vec.tolist() == parameters.tolist()


def test_a_trial_is_that_of_meta_worlds_own_interface():
    environment = MetaWorld(horizon=30, task_seed=0)
    trials, theirs = rollout(environment, policy(environment), KEYS), metaworld.ML1("reach-v3", seed=0)
    chosen = environment.sample(KEYS)["parameters"]
    for row in range(2):
        plain = theirs.train_classes["reach-v3"]()
        for task in theirs.train_tasks:
            plain.set_task(task)
            if plain._last_rand_vec.tolist() == chosen[row].tolist():
                break
        for t in range(60):
            if t % 30 == 0:
                seen, _ = plain.reset()
            assert torch.equal(trials.observation[row, t], torch.from_numpy(seen).float())
            assert not seen[36:].any()  # the goal is hidden
            seen, reward, _, _, info = plain.step(trials.action[row, t].clamp(-1, 1).numpy())
            assert float(trials.reward[row, t]) == pytest.approx(reward, rel=1e-5)
            assert float(trials.measured["success"][row, t]) == info["success"]
    assert torch.equal(trials.flag(EPISODE_END).nonzero()[:, 1].unique(), torch.tensor([29, 59]))


def test_success_is_that_of_any_step():
    """Meta-World's own scripted policy reaches the goal without information about episodes."""
    from metaworld.policies import SawyerReachV3Policy

    environment = MetaWorld(horizon=150, episodes=1)
    tasks, scripted = environment.sample(KEYS), SawyerReachV3Policy()
    state, observation = environment.reset(tasks, torch.rand(4, 2))
    successes = []
    for _ in range(150):
        shown = observation.double().numpy()
        shown[:, 36:] = tasks["parameters"][:, 3:].numpy()
        action = torch.tensor([scripted.get_action(row) for row in shown]).float()
        step = environment.step(tasks, state, action, torch.empty(4, 0))
        observation = step.observation
        successes.append(step.measured["success"])
    successes = torch.stack(successes, 1)
    assert successes[:, -1].all() and not successes[:, 0].any()
    flags = torch.ones(4, 150, dtype=torch.uint8)
    blank = torch.zeros(4, 150)
    trials = Trials(
        blank.unsqueeze(2),
        blank,
        blank,
        blank,
        blank,
        flags,
        torch.arange(4),
        {"success": successes * (torch.arange(150) < 149)},
    )
    assert trials.highest("success", 1).eq(1).all()  # although not at the episode's end


def test_earlier_trials_have_no_effect():
    environment, used = MetaWorld(horizon=20), MetaWorld(horizon=20)
    acting = policy(environment)
    rollout(used, acting, TaskKey.of(8, "train", 0, range(4)))
    gc.collect()
    first, again = rollout(environment, acting, KEYS), rollout(used, acting, KEYS)
    for name in Trials.columns():
        assert torch.equal(getattr(first, name), getattr(again, name)), name


@pytest.mark.long
def test_a_reset_clears_the_state_of_every_family():
    """For all fifty families: compare a trial by a new simulator with one by a simulator that ran another task."""
    numbers = torch.arange(len(families()))
    parameters = {f: torch.tensor(listed("ML1", name, 0, "train")[1][:2]) for f, name in enumerate(families())}
    tasks = {"family": numbers, "parameters": torch.stack([parameters[f][0] for f in range(50)])}
    other = {"family": numbers, "parameters": torch.stack([parameters[f][1] for f in range(50)])}
    used = MetaWorld(horizon=30)
    acting = policy(used)
    keys = TaskKey.of(0, "train", 0, range(50))
    rollout(used, acting, keys, tasks=other)
    gc.collect()
    first, again = rollout(MetaWorld(horizon=30), acting, keys, tasks=tasks), rollout(used, acting, keys, tasks=tasks)
    different = (first.observation != again.observation).flatten(1).any(1) | (first.reward != again.reward).any(1)
    assert [families()[i] for i in different.nonzero().flatten().tolist()] == []


@pytest.mark.long
@pytest.mark.parametrize(("benchmark", "training"), [("ML10", 10), ("ML45", 45)])
def test_families_of_meta_testing_are_not_trained_on(benchmark, training):
    environment = MetaWorld(benchmark=benchmark)
    seen = {split: {task[0] for task in of(environment, split)} for split in SPLITS}
    assert len(seen["train"]) == training and len(seen["test"]) == 5 and not seen["train"] & seen["test"]
    assert seen["validation"] == seen["train"] and not of(environment, "validation") & of(environment, "train")
    assert [len(of(environment, s)) for s in SPLITS] == [50 * training, 50 * training, 250]
    listed.cache_clear()
    assert of(environment, "test") == of(MetaWorld(benchmark=benchmark), "test")  # from the file
    trials = rollout(MetaWorld(benchmark=benchmark, horizon=5), policy(environment), KEYS)
    assert trials.reward.shape == (4, 10) and torch.isfinite(trials.observation).all()


def test_a_damaged_list_is_made_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("METADIST_CACHE", str(tmp_path))
    listed.cache_clear()
    expected = of(MetaWorld(), "train")
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], b"nonsense"):
        file.write_bytes(damaged)
        listed.cache_clear()
        assert (
            of(MetaWorld(), "train") == expected and file.read_bytes() == whole and list(tmp_path.iterdir()) == [file]
        )


def test_sizes_and_protocol():
    environment = MetaWorld()
    assert environment.observation_size == 39 and environment.actions == Continuous(4) and environment.horizon == 500
    told = environment.protocol("test")
    assert (
        told["benchmark"] == "ML1" and told["family"] == "reach-v3" and told["tasks_listed"] == 50 and told["metaworld"]
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"family": "reach-v2"},
            r"environment\.family: 'reach-v2' is not a family of Meta-World; did you mean 'reach-v3'",
        ),
        ({"horizon": 501}, r"environment\.horizon: 501 is above 500"),
        ({"benchmark": "ML11"}, r"environment\.benchmark: 'ML11'.*did you mean 'ML1"),
        ({"task_seed": -1}, r"environment\.task_seed: -1"),
    ],
)
def test_impossible_settings_are_named(wrong, message):
    with pytest.raises(ConfigError, match=message):
        _ = MetaWorld(**wrong).observation_size


def test_missing_package_is_named_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "metaworld", None)
    with pytest.raises(
        ConfigError, match=r"needs metaworld, which is not installed: pip install 'metadist\[metaworld\]'"
    ):
        _ = MetaWorld().observation_size
