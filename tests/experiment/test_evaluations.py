"""Evaluations of a finished run: what they record, what may deviate from the run, and what is refused."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from pyarrow import parquet

import metadist
from metadist.core.errors import ConfigError
from metadist.core.random import TaskKey
from metadist.experiment.evaluate import evaluate_group
from metadist.experiment.judging import EvaluationOptions
from metadist.experiment.load import load_run

pytestmark = pytest.mark.lane("numerics")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluations")
    return tiny.train(tiny.experiment(), run_dir=str(folder / "run"), plots=False)


def rows(path: Path) -> dict[str, np.ndarray]:
    table = parquet.read_table(path)
    return {name: table[name].to_numpy() for name in table.column_names}


def predict(weights, x):
    first, bias, last, offset = weights
    return torch.relu(x @ first.T + bias) @ last.T + offset


def by_hand(result, tasks: int, *overrides: str, steps: int = 2):
    """The query MSE of each test task after each step, one task at a time, with autograd."""
    experiment = tiny.experiment(*overrides)
    learner, state = experiment.learner, result.state
    learner.prepare(torch.device("cpu"))
    found = []
    for index in range(tasks):
        keys = TaskKey.of(experiment.evaluation_seed, "test", 0, [index])
        task = torch.utils._pytree.tree_map(lambda t: t[0], learner.sample(keys))
        weights = [p.detach().clone().requires_grad_() for p in state.theta(learner.slots)["model"].values()]
        row = []
        for _ in range(steps + 1):
            row.append((predict(weights, task.query.x) - task.query.y).square().mean().item())
            loss = (predict(weights, task.support.x) - task.support.y).square().mean()
            gradients = torch.autograd.grad(loss, weights)
            weights = [(w - 0.01 * g).detach().requires_grad_() for w, g in zip(weights, gradients)]
        found.append(row)
    return np.array(found)


def test_the_final_test_has_a_row_per_task_and_step(run):
    table = rows(Path(run.run_dir) / "evaluation_tasks.parquet")
    assert table["task"].tolist() == [t for t in range(8) for _ in range(3)]
    assert table["step"].tolist() == [0, 1, 2] * 8
    mse = table["mse"].reshape(8, 3)
    assert np.allclose(mse, by_hand(run, 8), rtol=1e-5)
    assert mse.mean(0).tolist() == pytest.approx(run.evaluations[0].mean)


def test_overrides_are_applied_and_recorded(run):
    shots = load_run(run.run_dir).evaluate("tasks.k_shot=9", tasks=5, inner_steps=1)
    assert shots.tasks == 5
    assert shots.protocol["inner_steps"] == 1
    newest = max(Path(run.run_dir).glob("evaluations/*/evaluation.json"), key=lambda p: p.stat().st_mtime)
    about = json.loads(newest.read_text())
    assert about["overrides"] == ["tasks.k_shot=9"]
    assert about["evaluation"]["mean"] == shots.mean
    assert about["params_sha256"] == run.state.sha256()
    table = rows(newest.parent / "tasks.parquet")["mse"].reshape(5, 2)
    assert np.allclose(table, by_hand(run, 5, "tasks.k_shot=9", steps=1), rtol=1e-5)


def test_an_evaluation_in_python_leaves_the_result_as_it_was(run):
    loaded = load_run(run.run_dir)
    x = torch.linspace(-1, 1, 4).unsqueeze(1)
    before = loaded.predict(loaded.adapt(x, x), x)
    count = len(list(Path(run.run_dir).glob("evaluations/*")))
    judged = loaded.evaluate("tasks.k_shot=2", normalization="inductive", record=False)
    assert judged.mean != run.evaluations[0].mean
    assert torch.equal(loaded.predict(loaded.adapt(x, x), x), before)
    assert loaded.evaluate(record=False).mean == run.evaluations[0].mean
    assert len(list(Path(run.run_dir).glob("evaluations/*"))) == count, "record=False writes nothing"


@pytest.mark.parametrize(
    ("overrides", "options", "expected"),
    [
        (["outer.lr=0.1"], {}, "outer.lr can't be overridden: an evaluation does not train"),
        (["algorithm.inner_lr=0.1"], {}, "algorithm.inner_lr can't be overridden"),
        (["evaluate.patience=3"], {}, "evaluate.patience can't be overridden"),
        (["engine.dtype=float64"], {}, "engine.dtype can't be overridden"),
        (["tasks.k_shots=3"], {}, "unknown key 'tasks.k_shots'; did you mean 'k_shot'"),
        (["environment.arms=3"], {}, "environment.arms: this run has tasks"),
        (["evaluate.policy=sampled"], {}, "a meta-environment has one"),
        (["evaluate.inner_steps=3"], {"inner_steps": 2}, "given twice"),
        (["tasks.k_shot=0"], {}, "k_shot"),
        ([], {"split": "tset"}, "did you mean 'test'"),
        ([], {"inner_steps": -1}, "below 0"),
        ([], {"shots": 3}, "'shots' is not one of tasks, split"),
    ],
)
def test_what_makes_no_sense_is_refused(run, overrides, options, expected):
    before = sorted(Path(run.run_dir).rglob("*"))
    with pytest.raises(ConfigError, match=expected):
        load_run(run.run_dir).evaluate(*overrides, **options)
    assert sorted(Path(run.run_dir).rglob("*")) == before


def test_other_outputs_than_the_models_are_refused(tmp_path, images):
    tasks = {"name": "image_folder", "path": str(images), "n_way": 3, "k_shot": 1, "query_shots": 1}
    document = {**tiny.document(), "tasks": tasks}
    run = tiny.train(metadist.config.build.build(document), run_dir=str(tmp_path / "run"), plots=False)
    loaded = load_run(run.run_dir)
    with pytest.raises(
        ConfigError, match=r"tasks.n_way=2: '3.weight' would have shape \[2, 8\] in place of .* \[3, 8\]"
    ):
        loaded.evaluate("tasks.n_way=2")
    with pytest.raises(ConfigError, match=r"image_size.*would have shape"):
        loaded.evaluate("tasks.image_size=14")
    other = Path(str(images) + "-other")
    Path(images).rename(other)
    moved = loaded.evaluate(f"tasks.path={other}", record=False)
    assert moved.mean == run.evaluations[0].mean, "the same images elsewhere"


def test_steps_of_a_method_without_steps_are_refused(tmp_path, images):
    tasks = {"name": "image_folder", "path": str(images), "n_way": 3, "k_shot": 1, "query_shots": 1}
    document = {**tiny.document(), "tasks": tasks, "algorithm": {"name": "protonet"}}
    run = tiny.train(metadist.config.build.build(document), run_dir=str(tmp_path / "run"), plots=False)
    with pytest.raises(ConfigError, match="'ProtoNet' adapts without gradient steps"):
        load_run(run.run_dir).evaluate(inner_steps=3)


@pytest.fixture
def images(tmp_path):
    from PIL import Image

    generator = np.random.default_rng(0)
    for split, count in (("train", 4), ("validation", 3), ("test", 3)):
        for label in range(count):
            folder = tmp_path / "images" / split / f"{split}{label}"
            folder.mkdir(parents=True)
            for index in range(4):
                Image.fromarray(generator.integers(0, 255, (28, 28), dtype=np.uint8)).save(folder / f"{index}.png")
    return tmp_path / "images"


def test_a_meta_environment_has_rows_by_episode(tmp_path):
    document = {
        "name": "small",
        "environment": {"name": "bandit", "arms": 2, "episodes": 4},
        "model": {"name": "gru", "hidden": 4},
        "algorithm": {"name": "rl2", "minibatches": 1, "epochs": 1},
        "outer": {"meta_batch_size": 4, "shard_size": 4, "meta_steps": 1},
        "evaluate": {"every": 1, "tasks": 4, "test_tasks": 6},
        "workers": [{"max": 0, "min": 0}],
        "tracking": {"uri": "none"},
    }
    run = tiny.train(metadist.config.build.build(document), run_dir=str(tmp_path / "run"), plots=False)
    table = rows(tmp_path / "run/evaluation_tasks.parquet")
    assert table["episode"].tolist() == [1, 2, 3, 4] * 6
    assert table["greedy"].reshape(6, 4).mean(0).tolist() == pytest.approx(run.evaluations[0].mean)
    loaded = load_run(run.run_dir)
    longer = loaded.evaluate("environment.episodes=7", tasks=5)
    assert len(longer.mean) == 7
    sampled = loaded.evaluate("evaluate.policy=sampled", record=False)
    assert sampled.policy == "sampled"
    for overrides, options, expected in (
        (["environment.arms=3"], {}, "would have shape"),
        ([], {"inner_steps": 1}, "'RL2' adapts without gradient steps"),
        ([], {"normalization": "inductive"}, "a meta-environment has none"),
    ):
        with pytest.raises(ConfigError, match=expected):
            loaded.evaluate(*overrides, **options)


# Seeds ----------------------------------------------------------------------------------------------------------------


def test_all_seeds_of_a_group_are_judged_on_the_same_tasks(tmp_path, cli_group):
    folder, about = cli_group
    lists = {s["evaluation"]["protocol"]["task_list_sha256"] for s in about["seeds"]}
    assert len(lists) == 1
    group = evaluate_group(str(folder), EvaluationOptions(tasks=7, workers="0"))
    assert len({r.evaluations[0].protocol["task_list_sha256"] for r in group.results}) == 1
    assert {r.evaluations[0].protocol["seed"] for r in group.results} == {4}
    scores = [r.evaluations[0].score for r in group.results]
    assert group.summary["eval/test/mse/mean"] == pytest.approx(sum(scores) / 2)
    [record] = folder.glob("evaluations/*/evaluation.json")
    assert [s["seed"] for s in json.loads(record.read_text())["seeds"]] == [4, 2]
    for seed in (4, 2):
        assert (folder / f"seed-{seed}/evaluations/{record.parent.name}/tasks.parquet").exists()
    other = evaluate_group(str(folder), EvaluationOptions(workers="0", overrides=["evaluate.seed=9"], record=False))
    assert {r.evaluations[0].protocol["seed"] for r in other.results} == {9}


def test_a_group_of_an_earlier_version_resumes_with_its_own_tasks(tmp_path, cli_group):
    from contextlib import nullcontext

    from metadist.experiment.request import RunRequest
    from metadist.experiment.seeds import train_seeds
    from metadist.training.observers import Observer

    folder, _ = cli_group
    about = json.loads((folder / "group.json").read_text())
    del about["evaluate_seed"]
    (folder / "group.json").write_text(json.dumps(about))
    again = train_seeds(
        tiny.document(), [4, 2], RunRequest(run_dir=str(folder), resume=True), lambda _: nullcontext(Observer())
    )
    assert [r.evaluations[0].protocol["seed"] for r in again.results] == [4, 2]
    judged = evaluate_group(str(folder), EvaluationOptions(workers="0", record=False))
    assert {r.evaluations[0].protocol["seed"] for r in judged.results} == {4}, "an evaluation shares its tasks"


@pytest.fixture
def cli_group(tmp_path):
    from contextlib import nullcontext

    from metadist.experiment.request import RunRequest
    from metadist.experiment.seeds import train_seeds
    from metadist.training.observers import Observer

    request = RunRequest(run_dir=str(tmp_path / "group"), plots=False)
    group = train_seeds(tiny.document(), [4, 2], request, lambda _: nullcontext(Observer()))
    return tmp_path / "group", group.as_dict()


# MLflow ---------------------------------------------------------------------------------------------------------------


@pytest.mark.lane("services")
def test_an_evaluation_is_a_child_run_in_mlflow(tmp_path, monkeypatch, empty_store):
    monkeypatch.setenv("METADIST_RUNS", str(tmp_path / "runs"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    empty_store(tmp_path / "runs/mlflow.db")
    run = tiny.train(tiny.experiment("tracking.uri=auto"), run_dir=str(tmp_path / "run"), plots=False)
    judged = load_run(run.run_dir).evaluate("tasks.k_shot=6", split="validation")

    def query(sql):
        with contextlib.closing(sqlite3.connect(tmp_path / "runs/mlflow.db")) as connection:
            return connection.execute(sql).fetchall()

    [(child,)] = query("SELECT run_uuid FROM tags WHERE key = 'metadist.kind' AND value = 'evaluation'")
    assert query(f"SELECT status FROM runs WHERE run_uuid = '{child}'") == [("FINISHED",)]
    [(parent,)] = query(f"SELECT value FROM tags WHERE run_uuid = '{child}' AND key = 'mlflow.parentRunId'")
    assert query(f"SELECT value FROM tags WHERE run_uuid = '{parent}' AND key = 'metadist.run_id'") == [(run.run_id,)]
    params = dict(query(f"SELECT key, value FROM params WHERE run_uuid = '{child}'"))
    assert params["overrides"] == "['tasks.k_shot=6']" and params["split"] == "validation"
    [(value,)] = query(f"SELECT value FROM metrics WHERE run_uuid = '{child}' AND key = 'eval/validation/mse'")
    assert value == pytest.approx(judged.score)
    assert list((tmp_path / "runs/mlartifacts").rglob(f"{child}/artifacts/tasks.parquet"))
    assert len(query("SELECT * FROM runs")) == 2, "the run itself is the parent"
