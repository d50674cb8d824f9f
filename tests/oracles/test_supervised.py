"""Baselines of supervised tasks against scikit-learn and the model that made the data."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
import toys
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid

from metadist.algorithms import MAML
from metadist.core.errors import ConfigError
from metadist.core.random import TaskKey
from metadist.core.round import EvaluationRequest, MetaStepKey
from metadist.core.state import Records
from metadist.core.task import Classification, Examples, Task, TaskFamily
from metadist.experiment.baseline_comparison import paired_with_baselines
from metadist.experiment.evaluate import evaluate_run
from metadist.experiment.judging import EvaluationOptions
from metadist.oracles.supervised import PENALTIES, Known, baselines, chosen_baselines, measure, pool


class Clouds(Classification):
    """Three Gaussian classes of unequal number in six dimensions; queries of unequal number."""

    input_shape, outputs = (6,), 3

    def sample_task(self, key, split):
        g = key.generator()
        centres = 2 * torch.randn(3, 6, generator=g)

        def drawn(count):
            y = torch.cat([torch.arange(3), torch.randint(3, (count - 3,), generator=g)])
            return Examples(centres[y] + torch.randn(count, 6, generator=g), y)

        return Task(drawn(9), drawn(8 + int(key.tasks) % 3))


class Offsets(TaskFamily):
    """y = x · b + offset of the task (deviation 2) + noise (deviation 0.5), the same b for all tasks."""

    input_shape = (3,)
    b = torch.tensor([1.0, -2.0, 0.5])

    def sample_task(self, key, split):
        g = key.generator()
        offset = 2 * torch.randn(1, generator=g)

        def drawn(count):
            x = torch.randn(count, 3, generator=g)
            return Examples(x, (x @ self.b + offset + 0.5 * torch.randn(count, generator=g)).unsqueeze(1))

        return Task(drawn(4), drawn(20))


KEYS = TaskKey.of(3, "test", 0, range(12))


def arrays(family):
    for key in KEYS.each():
        task = family.sample_task(key, "test")
        yield (
            task.support.x.double().numpy(),
            task.support.y.numpy(),
            task.query.x.double().numpy(),
            task.query.y.numpy(),
        )


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("nearest_mean", NearestCentroid()),
        ("nearest_neighbour", KNeighborsClassifier(1)),
    ],
)
def test_classifiers_are_scikit_learns(name, reference):
    expected = [float((reference.fit(x, y).predict(q) == t).mean()) for x, y, q, t in arrays(Clouds())]
    found = measure(Clouds(), [name], KEYS)[name]
    assert found.tolist() == pytest.approx(expected, abs=1e-12)


def test_logistic_regression_is_fitted_to_the_standardised_support_set():
    expected = []
    for x, y, q, t in arrays(Clouds()):
        fitted = LogisticRegression(max_iter=1000).fit((x - x.mean(0)) / x.std(0), y)
        expected.append(float((fitted.predict((q - x.mean(0)) / x.std(0)) == t).mean()))
    assert measure(Clouds(), ["logistic_regression"], KEYS)["logistic_regression"].tolist() == pytest.approx(expected)


def test_majority_is_that_of_the_support_set():
    expected = [float((np.bincount(y).argmax() == t).mean()) for _, y, _, t in arrays(Clouds())]
    assert measure(Clouds(), ["majority"], KEYS)["majority"].tolist() == pytest.approx(expected)


def by_leaving_one_out(x, y, query):
    """Ridge regression by scikit-learn, the penalty with the least error when each row is left out in turn."""
    x, query = (x - x.mean(0)) / x.std(0), (query - x.mean(0)) / x.std(0)
    n = len(x)

    def error(penalty):
        total = 0.0
        for i in range(n):
            others = np.arange(n) != i
            fitted = Ridge(alpha=penalty * n).fit(x[others], y[others, 0])
            total += float((fitted.predict(x[i : i + 1])[0] - y[i, 0]) ** 2)
        return total

    penalty = min(PENALTIES, key=error)
    return Ridge(alpha=penalty * n).fit(x, y[:, 0]).predict(query)


def test_ridge_is_scikit_learns_with_the_best_penalty_on_the_support_set():
    family = Offsets()
    expected = []
    for x, y, q, t in arrays(family):
        expected.append(float(((by_leaving_one_out(x, y.astype(float), q) - t[:, 0]) ** 2).mean()))
    assert measure(family, ["ridge"], KEYS)["ridge"].tolist() == pytest.approx(expected, rel=1e-5)


def test_pooled_ridge_finds_slopes_and_variances():
    pooled = pool(Offsets(), 3)
    assert pooled.coefficients[:, 0] == pytest.approx(Offsets.b.tolist(), abs=0.1)
    assert float(pooled.between[0]) == pytest.approx(4.0, rel=0.15)
    assert float(pooled.within[0]) == pytest.approx(0.25, rel=0.05)


def test_pooled_ridge_is_near_the_best_possible_error():
    """With known slopes, the error is σ² plus the variance of the offset given four rows: 0.25 + 1 / (1/4 + 4/0.25)."""
    found = measure(Offsets(), ["pooled_ridge", "ridge", "support_mean"], TaskKey.of(3, "test", 0, range(400)))
    assert float(found["pooled_ridge"].mean()) == pytest.approx(0.25 + 1 / (0.25 + 16), rel=0.06)
    assert found["pooled_ridge"].mean() < found["ridge"].mean() < found["support_mean"].mean() * 2


def test_padding_has_no_part():
    alone = [measure(Clouds(), ["nearest_mean"], TaskKey.of(3, "test", 0, [i]))["nearest_mean"][0] for i in range(12)]
    assert torch.stack(alone).tolist() == measure(Clouds(), ["nearest_mean"], KEYS)["nearest_mean"].tolist()


def test_logistic_regression_on_one_class_is_the_majority():
    one = Known(np.zeros((2, 1)), np.array([1, 1]), np.ones((3, 1)), 2)
    assert baselines(Clouds())["logistic_regression"](one).argmax(1).tolist() == [1, 1, 1]


@pytest.mark.lane("numerics")
def test_a_run_beside_its_baselines(tmp_path):
    """Rows equal ``measure`` on the tasks that the run is judged on, and differences are paired."""
    run = tiny.train(tiny.experiment(), run_dir=str(tmp_path / "run"), plots=False, test=False)
    options = EvaluationOptions(tasks=20, beside=["support_mean", "ridge"])
    judged = evaluate_run(run.run_dir, options).evaluations[0]
    rows = {row["name"]: row for row in judged.beside}
    expected = measure(run.experiment.learner.tasks, ["ridge"], TaskKey.of(run.experiment.seed, "test", 0, range(20)))
    assert rows.keys() == {"this learner", "this learner, 0 steps", "support_mean", "ridge"}
    assert rows["ridge"]["mean"] == pytest.approx(float(expected["ridge"].mean()))
    assert rows["this learner"]["mean"] == pytest.approx(judged.score, rel=1e-6)
    assert rows["ridge"]["difference"] == pytest.approx(rows["ridge"]["mean"] - judged.score, rel=1e-4)
    with pytest.raises(ConfigError, match="--compare.*'gittins' is not one of"):
        evaluate_run(run.run_dir, EvaluationOptions(beside=["gittins"]))


class Shared(Offsets):
    """Twelve tasks of three schools: the tasks of a school are no independent draws."""

    def sources(self, key, split):
        return int(key.tasks) % 3


def test_errors_are_over_the_sources_of_the_tasks():
    found = measure(Shared(), ["ridge", "support_mean"], KEYS)
    records = Records({"task": KEYS.tasks, "mse": found["ridge"].unsqueeze(1), "source": (KEYS.tasks % 3).unsqueeze(1)})
    learner = toys.learner(MAML(), lambda: torch.nn.Linear(3, 1), Shared())
    request = EvaluationRequest(MetaStepKey("run", 0, KEYS.seed), "test", 12)
    rows = {row["name"]: row for row in paired_with_baselines(learner, request, records, ["support_mean"])}
    ahead = (found["support_mean"] - found["ridge"]).numpy()
    sums = [(ahead - ahead.mean())[np.arange(12) % 3 == school].sum() for school in range(3)]
    by_school = float(np.sqrt(3 / 2 * np.square(sums).sum())) / 12
    by_task = float(ahead.std(ddof=1)) / np.sqrt(12)
    assert rows["support_mean"]["difference"] == pytest.approx(float(ahead.mean()))
    assert rows["support_mean"]["difference_error"] == pytest.approx(max(by_school, by_task))


def test_names():
    assert chosen_baselines("--compare", Offsets(), ["all"]) == list(baselines(Offsets()))
    with pytest.raises(ConfigError, match="--compare.*'nearest_men'.*did you mean 'nearest_mean'"):
        chosen_baselines("--compare", Clouds(), ["nearest_men"])
