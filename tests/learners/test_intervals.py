"""Confidence intervals of tasks that are drawn, listed, or made from few sources."""

import math

import numpy as np
import pytest
import torch
import toys
from scipy import stats

from metadist.algorithms import MAML
from metadist.core.random import TaskKey
from metadist.core.round import EvaluationRequest, MetaStepKey
from metadist.core.state import Records
from metadist.core.task import Examples, Task, TaskFamily
from metadist.learners.intervals import Sampling, student_t
from metadist.models import MLP
from metadist.testing.toys import Blobs

FIELDS = 7


@pytest.mark.parametrize("freedom", [1, 2, 3, 6, 7, 30, 199])
def test_student_t_is_scipy_s(freedom):
    assert student_t(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-10)


def column(values):
    return torch.as_tensor(values, dtype=torch.float64).unsqueeze(1)


def test_sources_of_equally_many_tasks_count_as_one_value_each():
    """The interval over 7 fields of 20 draws is the t interval of the 7 means."""
    values = torch.randn(FIELDS, generator=torch.Generator().manual_seed(0)).repeat_interleave(20)
    sources = torch.arange(FIELDS).repeat_interleave(20).unsqueeze(1)
    means = values[::20].double()
    expected = stats.t.ppf(0.975, FIELDS - 1) * float(means.std()) / math.sqrt(FIELDS)
    assert float(Sampling(140, sources).half_width(column(values))) == pytest.approx(expected, rel=1e-6)
    assert float(Sampling(140).half_width(column(values))) < expected / 4


def by_pairs(values, sources):
    """The standard error from every pair of tasks, as often as they share a source; each task with itself once."""
    centred, total = values - values.mean(), 0.0
    for i, mine in enumerate(sources):
        for j, other in enumerate(sources):
            shared = 1 if i == j else len(set(mine) & set(other))
            total += shared * centred[i] * centred[j]
    groups = len({s for task in sources for s in task})
    return math.sqrt(max(total, 0) * groups / (groups - 1)) / len(values), groups


def test_tasks_of_several_sources_are_compared_pair_by_pair():
    generator = np.random.default_rng(3)
    sources = [generator.choice(10, 3, replace=False).tolist() for _ in range(60)]
    effect = generator.normal(size=10)
    values = np.array([effect[s].mean() for s in sources]) + 0.1 * generator.normal(size=60)
    error, groups = by_pairs(values, sources)
    found = Sampling(60, torch.tensor(sources)).half_width(column(values))
    assert float(found) == pytest.approx(error * stats.t.ppf(0.975, groups - 1), rel=1e-9)


@pytest.mark.lane("numerics")
@pytest.mark.parametrize(("sources", "of_a_task", "least"), [(7, 1, 0.91), (20, 5, 0.82)])
def test_the_interval_covers_the_mean_over_all_sources(sources, of_a_task, least):
    """Over 200 draws, the interval of independent tasks covers it in one case of four."""
    generator, hits = torch.Generator().manual_seed(0), torch.zeros(2)
    for _ in range(500):
        effect = torch.randn(sources, generator=generator, dtype=torch.float64)
        drawn = torch.rand(200, sources, generator=generator).argsort(1)[:, :of_a_task]
        values = column(effect[drawn].mean(1) + 0.3 * torch.randn(200, generator=generator))
        for i, sampling in enumerate((Sampling(200, drawn), Sampling(200))):
            hits[i] += bool(values.mean().abs() <= sampling.half_width(values))
    assert hits[0] / 500 >= least and hits[1] / 500 < 0.35


def test_intervals_of_independent_tasks_keep_their_bits():
    values = torch.randn(50, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = 1.96 * values.std(0) / math.sqrt(50)
    sources = torch.arange(50).unsqueeze(1)
    for sampling in (Sampling(50), Sampling(50, sources), Sampling(50, sources.repeat(1, 2) // 25)):
        assert sampling.half_width(values).equal(expected) and sampling.independent
    assert Sampling(1).half_width(values[:1]).isnan().all()
    assert Sampling(1, None, 1).half_width(values[:1]).isnan().all()


# Families -------------------------------------------------------------------------------------------------------------


class Fields(TaskFamily):
    """Rows of a few fields; the tasks of a field differ by their rows. ``listed``: a task for each field."""

    input_shape, outputs = (1,), 1

    def __init__(self, listed=False):
        self.listed = listed

    def sources(self, key, split):
        return int(key.stream("field").integers(FIELDS))

    def listed_tasks(self, split):
        return FIELDS if self.listed else None

    def sample_task(self, key, split):
        if split != "train":
            assert not self.listed or int(key.tasks) < FIELDS
        field = int(key.tasks) if self.listed and split != "train" else Fields.sources(self, key, split)
        x = key.stream("x").normal(12, 1)
        y = x * field + field
        return Task(Examples(x[:6], y[:6]), Examples(x[6:], y[6:]))

    def protocol(self, split):
        return {"fields": FIELDS}


def judged(family, tasks=100, split="test"):
    learner = toys.learner(MAML(inner_lr=0.01), lambda: MLP(hidden=(4,)).build((1,), 1), family)
    request = EvaluationRequest(MetaStepKey("r", 0, 0), split, tasks, None)
    state = learner.initial(0)
    round = learner.evaluation(request, state)
    return learner.summarise(request, Records.concatenate([learner.compute(s, state.slots) for s in round.shards]))


def test_draws_from_few_fields_have_the_interval_of_the_fields():
    drawn = judged(Fields())
    assert drawn.tasks == 100 and drawn.protocol["interval"] == "over 7 sources (Student's t)"
    assert drawn.ci95_tasks is not None and drawn.ci95[-1] > 3 * drawn.ci95_tasks[-1]
    assert drawn.metrics()["eval/test/mse/ci95_tasks"] == drawn.ci95_tasks[-1]
    # By validations too, which choose the best.
    assert judged(Fields(), split="validation").protocol["interval"] == drawn.protocol["interval"]


class Once(Fields):
    def sources(self, key, split):
        return None


def test_listed_tasks_are_taken_once_each():
    listed = judged(Once(listed=True))
    assert (listed.tasks, listed.protocol["tasks"]) == (FIELDS, FIELDS)
    assert listed.protocol["interval"] == "over tasks, each of 7 once (Student's t)"
    assert listed.ci95[-1] == pytest.approx(listed.ci95_tasks[-1] * stats.t.ppf(0.975, FIELDS - 1) / 1.96)
    assert judged(Once(listed=True), 4).tasks == 4
    assert judged(Once(listed=True), split="train").tasks == 100
    usual = judged(Once())
    assert (usual.protocol["interval"], usual.ci95_tasks) == ("over tasks", None)


def test_an_evaluation_of_few_sources_is_recorded_by_task(tmp_path):
    from pyarrow import parquet

    from metadist.experiment.evaluation_record import write_tasks

    learner = toys.learner(MAML(inner_lr=0.01, inner_steps=2), lambda: MLP(hidden=(4,)).build((1,), 1), Fields())
    keys, state = TaskKey.of(0, "test", 0, range(5)), learner.initial(0)
    records = learner.evaluate(state.theta(learner.slots), keys, 0)
    tables = torch.arange(5 * 3 * 4).reshape(5, 3, 2, 2).double()
    judged = learner.summarise(EvaluationRequest(MetaStepKey("r", 0, 0), "test", 5, None), records)
    more = Records({**records.columns, "table": tables})
    rows = parquet.read_table(write_tasks(tmp_path / "tasks.parquet", judged, more)).to_pylist()
    assert [row["step"] for row in rows] == [0, 1, 2] * 5
    assert rows[4]["source"] == [Fields.sources(None, keys.each()[1], "test")]
    assert rows[4]["table"] == tables[1, 1].flatten().tolist()


def test_episodes_of_few_classes_name_their_classes():
    from metadist.tasks.images import ImageSet
    from metadist.tasks.omniglot import Omniglot

    class Seven(Omniglot):
        def load(self):
            pixels = np.zeros((21 * 4, 1, 28, 28), np.uint8)
            return ImageSet.of(pixels, [f"c{i}" for i in range(21)], [4] * 21, [""] * 21)

        def split_classes(self, images):
            return {"train": list(range(7)), "validation": list(range(7, 14)), "test": list(range(14, 21))}

    family = Seven(n_way=5, k_shot=1, query_shots=1)
    keys = TaskKey.of(0, "test", 0, range(30))
    chosen = family.draw(keys, "test")[:, 0] // 4 - 14  # the first image of each class
    assert [list(family.sources(key, "test")) for key in keys.each()] == chosen.tolist()
    sources = torch.tensor([family.sources(key, "test") for key in keys.each()])
    assert Sampling(30, sources).described() == "over 7 sources (Student's t)"
    same = sources.sort(1).values[:1].expand(30, 5)
    assert (
        Sampling(30, same).described() == "over tasks, all of the same 5 sources: it says nothing about other sources"
    )
    assert Blobs().sources(keys.each()[0], "test") is None
