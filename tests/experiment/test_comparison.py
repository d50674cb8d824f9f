"""A policy beside known methods, and the plots of runs in meta-environments."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from tiny import train

from metadist.config.build import build
from metadist.core.errors import ConfigError
from metadist.experiment.evaluate import evaluate_run
from metadist.experiment.judging import EvaluationOptions
from metadist.experiment.oracle_comparison import oracles
from metadist.tracking import Tracker

BANDIT = {"name": "bandit", "arms": 2, "episodes": 4}


def document(environment, algorithm=None, model=None):
    return {
        "name": "small",
        "environment": environment,
        "model": model or {"name": "gru", "hidden": 4},
        "algorithm": algorithm or {"name": "rl2", "minibatches": 1, "epochs": 1},
        "outer": {"meta_batch_size": 4, "shard_size": 4, "meta_steps": 2},
        "evaluate": {"every": 2, "tasks": 8, "test_tasks": 50},
        "workers": [{"max": 0, "min": 0}],
        "tracking": {"uri": "none"},
    }


def trained(tmp_path, *arguments):
    return train(build(document(*arguments)), run_dir=str(tmp_path / "run"))


def test_known_methods_by_environment_or_config():
    by_name = oracles("bandit", ["arms=2", "episodes=4"], ["all"], trials=200, split="test", seed=3)
    rows = {row["name"]: row for row in by_name["rows"]}
    assert rows["optimal"]["percent"] == 100 and rows["random"]["percent"] == 0
    assert rows["optimal"]["mean"] > rows["thompson"]["mean"] > rows["random"]["mean"]
    assert oracles("bandit", ["environment.arms=2", "episodes=4"], ["all"], trials=200, split="test", seed=3) == by_name
    by_config = oracles(
        "bandit_rl2", ["environment.arms=2", "environment.episodes=4"], ["gittins"], trials=200, split="test", seed=3
    )
    assert by_config["rows"] == [rows["gittins"]]


@pytest.mark.parametrize(
    ("name", "overrides", "methods", "expected"),
    [
        ("bandti", [], ["all"], "'bandti' is neither an environment .*did you mean 'bandit'"),
        ("bandit", ["armz=3"], ["all"], "unknown key 'environment.armz'; did you mean 'arms'"),
        ("bandit", [], ["gitins"], "'gitins' is not one of .*did you mean 'gittins'"),
        ("sinusoid_maml", [], ["all"], "key 'environment' is missing"),
        ("half_cheetah_vel", [], ["all"], "there are no oracles for 'HalfCheetahVel'"),
    ],
)
def test_mistakes_are_named(name, overrides, methods, expected):
    pytest.importorskip("gymnasium")
    with pytest.raises(ConfigError, match=expected):
        oracles(name, overrides, methods, trials=4, split="test", seed=0)


class Recorded(Tracker):
    """A tracker in memory."""

    def __init__(self):
        self.points = {}

    def metrics(self, step, values):
        self.points |= {(name, step): value for name, value in values.items()}


def test_what_is_recorded_of_a_run(tmp_path, monkeypatch):
    """Regret against the oracle on the very validation trials, and where the workers' seconds went."""
    tracker = Recorded()
    monkeypatch.setattr("metadist.experiment.recording.make_tracker", lambda *_, **__: tracker)
    result = trained(tmp_path, BANDIT)
    rows = {
        r["name"]: r
        for r in oracles("bandit", ["arms=2", "episodes=4"], ["all"], trials=8, split="validation", seed=0)["rows"]
    }
    points, last = tracker.points, result.outcome.progress.meta_step
    regret = points["eval/validation/regret", last]
    assert regret == pytest.approx(rows["optimal"]["mean"] - points["eval/validation/return", last])
    assert points["eval/validation/regret/per_step", last] == pytest.approx(regret / 4)
    assert sum(points[f"eval/validation/regret/episode_{n}", last] for n in (1, 2, 4)) <= regret + 4
    seconds = {
        part: points[f"engine/seconds_per_step/compute/rollout{part}", last]
        for part in ("", "/environment", "/inference")
    }
    assert 0 < seconds["/environment"] + seconds["/inference"] < seconds[""]
    assert all(
        points[f"engine/steps_per_second{part}", last] > 0 for part in ("", "/environment", "/inference", "/learning")
    )


def test_a_policy_beside_known_methods(tmp_path):
    result = trained(tmp_path, BANDIT)
    judged = evaluate_run(result.run_dir, EvaluationOptions(tasks=300, beside=["gittins"])).evaluations[0]
    rows = {row["name"]: row for row in judged.beside}
    own = rows["this policy, greedy"]
    assert own["mean"] == pytest.approx(judged.score) and own["difference"] == 0
    assert rows.keys() == {"this policy, greedy", "this policy, sampled", "optimal", "gittins", "random"}
    for row in rows.values():
        assert own["mean"] - row["mean"] == pytest.approx(row["difference"], abs=1e-9)
    whole = oracles("bandit", ["arms=2", "episodes=4"], ["gittins"], trials=300, split="test", seed=0)
    assert whole["rows"][0]["mean"] == pytest.approx(rows["gittins"]["mean"])


@pytest.mark.lane("numerics")
@pytest.mark.renders
@pytest.mark.parametrize(
    ("environment", "names"),
    [
        (BANDIT, {"learning_curve", "returns_test", "regret_test"}),
        (
            {"name": "gridworld", "episodes": 2, "horizon": 3},
            {"learning_curve", "returns_test", "regret_test", "trial"},
        ),
        ({"name": "navigation", "horizon": 5}, {"learning_curve", "returns_test", "regret_test", "trials"}),
    ],
)
def test_the_plots(environment, names, tmp_path):
    trained(tmp_path, environment)
    drawn = {path.stem: path for path in (tmp_path / "run" / "plots").glob("*.png")}
    assert drawn.keys() == names
    for path in drawn.values():
        assert len(torch.unique(torch.tensor(list(Image.open(path).convert("L").getdata())))) > 8, path


def test_adaptation_by_gradient_steps_has_no_curve_over_episodes_to_compare(tmp_path):
    algorithm = {"name": "maml_rl", "rollouts_per_task": 2, "epochs": 1}
    result = trained(tmp_path, {"name": "navigation", "horizon": 4}, algorithm, {"name": "reactive", "hidden": [4]})
    assert {path.stem for path in (tmp_path / "run" / "plots").glob("*.png")} == {"learning_curve", "returns_test"}
    with pytest.raises(ConfigError, match="--beside"):
        evaluate_run(result.run_dir, EvaluationOptions(tasks=4, inner_steps=2, beside=["random"]))
