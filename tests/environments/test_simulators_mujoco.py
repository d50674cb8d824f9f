"""Compare HalfCheetah and Ant with hidden tasks to Gymnasium's own environments."""

import gc
import sys

import pytest
import torch
from trials import context, learner, somewhere

from metadist.algorithms.rl2 import RL2
from metadist.core.errors import ConfigError
from metadist.core.random import SPLITS, TaskKey
from metadist.environments import AntDir, HalfCheetahDir, HalfCheetahVel
from metadist.models.recurrent import GRU
from metadist.rl.environment import Continuous
from metadist.rl.trial import EPISODE_END, TERMINATED, VALID, Trials, rollout

pytest.importorskip("mujoco", reason="needs MuJoCo: pip install 'metadist[rl]'")
gymnasium = pytest.importorskip("gymnasium", reason="needs gymnasium: pip install 'metadist[rl]'")

BODIES = [
    HalfCheetahVel(horizon=40),
    HalfCheetahDir(horizon=40),
    AntDir(horizon=40),
    AntDir(horizon=40, contact_forces=True),
]
KEYS = TaskKey.of(3, "train", 2, range(6))
#: the first entries of an observation, by Gymnasium's documentation
CHEETAH = ["z", "pitch"] + ["angle"] * 6 + ["v_x", "v_z", "turning"] + ["joint"] * 6
NAMES = {
    HalfCheetahVel: CHEETAH,
    HalfCheetahDir: CHEETAH,
    AntDir: ["z"] + ["orientation"] * 4 + ["angle"] * 8 + ["velocity"] * 3 + ["turning"] * 3 + ["joint"] * 8,
}


def policy(environment):
    made = learner(RL2(), GRU(hidden=5), environment)
    return context(made).policy(somewhere(made))


def fresh(environment):
    """Return the same environment with new simulators."""
    return type(environment)(**environment.__getstate__())


def expected_reward(environment, task, info, action):
    """Compute the reward by the formulae of Gymnasium's documentation, from the reported speed."""
    cost = environment.control_cost * float(action.double().square().sum())
    if isinstance(environment, HalfCheetahVel):
        return -abs(info["x_velocity"] - task) - cost
    return (
        task * info["x_velocity"]
        - cost
        + (info["reward_survive"] + info["reward_contact"] if isinstance(environment, AntDir) else 0.0)
    )


@pytest.mark.parametrize("environment", BODIES, ids=repr)
def test_a_trial_is_that_of_gymnasiums_own_body(environment):
    """The states equal those of gymnasium.make's environment, which has another task's reward; rewards are by hand."""
    trials, tasks = rollout(environment, policy(environment), KEYS), environment.sample(KEYS)
    words = (KEYS.stream("reset").uniform(2, 2).double() * 2**24).long()
    for row in range(3):
        options = (
            {"include_cfrc_ext_in_observation": environment.contact_forces} if isinstance(environment, AntDir) else {}
        )
        plain = gymnasium.make("Ant-v5" if options else "HalfCheetah-v5", **options)
        (task,), episode = [float(t[row]) for t in tasks.values()], 0
        for t in range(int(trials.flag(VALID)[row].sum())):
            if t == 0 or trials.flag(EPISODE_END)[row, t - 1]:
                seen, _ = plain.reset(seed=int(words[row, episode, 0] * 2**24 + words[row, episode, 1]))
                episode += 1
            shown = torch.from_numpy(seen).clone()
            shown[
                [name.startswith("joint") for name in NAMES[type(environment)]]
                + [False] * (len(shown) - len(NAMES[type(environment)]))
            ] *= 0.1
            assert torch.equal(trials.observation[row, t], shown.float())
            action = trials.action[row, t].clamp(-1, 1)
            seen, _, terminated, _, info = plain.step(action.numpy())
            assert float(trials.reward[row, t]) == pytest.approx(
                expected_reward(environment, task, info, action), abs=1e-5
            )
            assert float(trials.measured["x_velocity"][row, t]) == pytest.approx(info["x_velocity"], rel=1e-6)
            assert bool(trials.flag(TERMINATED)[row, t]) == terminated
        assert episode == 2


@pytest.mark.lane("numerics")
@pytest.mark.parametrize("environment", BODIES, ids=repr)
def test_earlier_trials_have_no_effect(environment):
    """MuJoCo starts its solver from the last step's accelerations: a reset must clear them too."""
    used, acting = fresh(environment), policy(environment)
    rollout(used, acting, TaskKey.of(5, "test", 0, range(6)))
    gc.collect()
    assert len(used._idle[0]) == 6 and any(abs(s.data.qacc_warmstart).max() > 1 for s in used._idle[0])
    first, again = rollout(fresh(environment), acting, KEYS), rollout(used, acting, KEYS)
    for name in Trials.columns():
        assert torch.equal(getattr(first, name), getattr(again, name)), name
    assert len(used._idle[0]) in (0, 6)


def test_targets_and_directions():
    target = HalfCheetahVel().sample(TaskKey.of(0, "train", 0, range(20_000)))["target"].double()
    assert 0 <= target.min() < 0.01 and 2.99 < target.max() <= 3 and abs(target.mean() - 1.5) < 4 * 0.866 / 20_000**0.5
    slow = HalfCheetahVel(slowest=0.5, fastest=2.0)
    per_split = [slow.sample(TaskKey.of(0, split, 0, range(1000)))["target"] for split in SPLITS]
    assert (
        len(torch.cat(per_split).unique()) > 2990
        and torch.cat(per_split).min() >= 0.5
        and torch.cat(per_split).max() <= 2
    )
    direction = AntDir().sample(TaskKey.of(0, "train", 0, range(10_000)))["direction"]
    assert set(direction.tolist()) == {1.0, -1.0} and abs(float(direction.mean())) < 4 / 100


def test_sizes_and_protocol():
    assert [(e.observation_size, e.actions) for e in BODIES] == [(17, Continuous(6))] * 2 + [
        (27, Continuous(8)),
        (105, Continuous(8)),
    ]
    told = HalfCheetahVel(fastest=2.0).protocol("test")
    assert (
        told["targets"] == [0.0, 2.0]
        and told["horizon"] == 200
        and told["control_cost"] == 0.05
        and {"mujoco", "gymnasium"} < told.keys()
    )


@pytest.mark.parametrize(
    ("cls", "wrong", "message"),
    [
        (HalfCheetahVel, {"fastest": 0.0}, r"environment\.fastest: 0\.0 is not above environment\.slowest, 0\.0"),
        (AntDir, {"control_cost": -1.0}, r"environment\.control_cost: -1\.0"),
        (HalfCheetahDir, {"episodes": 0}, r"environment\.episodes: 0 is below 1"),
        (HalfCheetahDir, {"on_error": "skpi"}, r"environment\.on_error: 'skpi'.*did you mean 'skip'"),
    ],
)
def test_impossible_settings_are_named(cls, wrong, message):
    with pytest.raises(ConfigError, match=message):
        cls(**wrong)


def test_missing_mujoco_is_named_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "mujoco", None)
    with pytest.raises(
        ConfigError, match=r"HalfCheetahVel needs mujoco, which is not installed: pip install 'metadist\[rl\]'"
    ):
        _ = fresh(BODIES[0]).actions


def test_it_learns_from_a_meta_step():
    """Run rollouts and every gradient round; on the first minibatch the policy equals the one that acted."""
    made = learner(RL2(minibatches=2, epochs=1), GRU(hidden=8), HalfCheetahVel(horizon=10), batch=4, shard=2)
    about, theta = context(made, 4), somewhere(made)
    records, sums, weight = made.algorithm.rollout(theta, about)
    gradient, more, total = made.algorithm.gradient(
        theta, records, made.algorithm.settings_of({n: v / weight for n, v in sums.items()}), about
    )
    assert weight == total == 80 and abs(more["kl"]) / total < 1e-9 and more["clip_fraction"] == 0
    assert all(torch.isfinite(t).all() and t.abs().max() > 0 for t in gradient["model"].values())
