"""Tables of tasks: against rows that are counted and standardised here, by hand."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
import torch

from metadist.core.errors import ConfigError, DataError
from metadist.core.random import TaskKey
from metadist.tasks.table import TableClassification, TableRegression

TASKS, SPLITS = 12, ["train"] * 6 + ["val"] * 3 + ["Test"] * 3


def rows():
    """Task i has 4 + i rows: y = a_i + b x, with a text column and a column of true and false."""
    rng = np.random.default_rng(1)
    found = []
    for i in range(TASKS):
        for _ in range(4 + i):
            x = float(rng.normal(3, 2))
            found.append(
                {
                    "patient": f"p{i}",
                    "dose": x,
                    "sex": "f" if rng.random() < 0.5 else "m",
                    "old": bool(rng.random() < 0.5),
                    "part": SPLITS[i],
                    "level": 10 * i + 2 * x,
                    "ill": int(x > 3),
                }
            )
    order = rng.permutation(len(found))
    return [found[i] for i in order]


ROWS = rows()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    file = tmp_path_factory.mktemp("table") / "patients.csv"
    names = list(ROWS[0])
    file.write_text("\n".join([",".join(names), *(",".join(str(r[n]) for n in names) for r in ROWS)]) + "\n")
    return file


def regression(path, **options):
    given = {"features": ("dose", "sex", "old"), "split_column": "part", "k_shot": 3, **options}
    return TableRegression(path=str(path), task="patient", target="level", **given)


def keys(count, split="test", start=0, step=0):
    return TaskKey.of(5, split, step, range(start, start + count))


def standardised(column, rows_):
    training = np.array([float(r[column]) for r in ROWS if r["part"] == "train"])
    return (np.array([float(r[column]) for r in rows_]) - training.mean()) / training.std()


def test_rows_are_standardised_on_the_training_tasks_alone(path):
    family = regression(path)
    task = family.sample(keys(3), "test")
    assert set(family.task_names("test")) == {"p9", "p10", "p11"}
    for i, name in enumerate(family.task_names("test")):
        of_task = [r for r in ROWS if r["patient"] == name]
        real = torch.cat([torch.ones(3, dtype=torch.bool), task.query.mask[i]])
        x = torch.cat([task.support.x[i], task.query.x[i]])[real].double().numpy()
        y = torch.cat([task.support.y[i], task.query.y[i]])[real].double().numpy()
        sex = [[float(r["sex"] == "f"), float(r["sex"] == "m")] for r in of_task]
        expected = np.column_stack([standardised("dose", of_task), sex, standardised("old", of_task)])
        assert len(x) == len(of_task)
        by_dose = np.argsort(x[:, 0]), np.argsort(expected[:, 0])
        np.testing.assert_allclose(x[by_dose[0]], expected[by_dose[1]], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(y[by_dose[0], 0], standardised("level", of_task)[by_dose[1]], rtol=1e-5, atol=1e-6)


def test_each_row_is_in_support_or_query_once(path):
    family = regression(path)
    for step in range(3):
        task = family.sample(keys(20, "train", step=step), "train")
        for i in range(20):
            x = torch.cat([task.support.x[i], task.query.x[i][task.query.mask[i]]])
            assert len({tuple(row.tolist()) for row in x}) == len(x)


def test_a_task_is_the_same_in_any_shard(path):
    family = regression(path)
    whole = family.sample(keys(8, "train"), "train")
    for i in range(8):
        alone = family.sample(keys(1, "train", start=i), "train")
        assert torch.equal(alone.query.x[0], whole.query.x[i])
        assert torch.equal(alone.query.mask[0], whole.query.mask[i])
        assert torch.equal(alone.support.y[0], whole.support.y[i])


def test_evaluation_takes_every_task_before_it_takes_one_again(path):
    family = regression(path)
    first, again = (family.sample(keys(3, start=s), "test").support.y.sort(1)[0] for s in (0, 3))
    assert len({tuple(t.flatten().tolist()) for t in first}) == 3
    assert family.protocol("test")["distinct_tasks"] == 3
    assert not torch.equal(first, again)  # other rows of the same tasks


def test_the_first_rows_in_the_order_of_the_file(path):
    family = regression(path, support="first")
    of_task = [r for r in ROWS if r["patient"] == family.task_names("test")[1]]
    support = family.sample(keys(3), "test").support
    np.testing.assert_allclose(support.y[1, :, 0].numpy(), standardised("level", of_task[:3]), rtol=1e-5, atol=1e-6)


def test_small_tasks_are_left_out_and_counted(path, caplog):
    family = regression(path, k_shot=6)
    assert family.protocol("train")["left_out_tasks"] == 3  # 4, 5 and 6 rows
    assert "3 of 6 train tasks have fewer than 7 rows" in caplog.text
    with pytest.raises(DataError, match="the test split has no task with 41 rows or more; lower tasks.k_shot"):
        regression(path, k_shot=40).sample(keys(1), "test")


def test_tasks_of_one_size_have_no_mask(path):
    family = regression(path, query_rows=1)
    assert family.sizes("train") == (3, 1) and family.sample(keys(2, "train"), "train").query.mask is None
    assert regression(path).sizes("train") is None


def test_the_metric_is_in_the_units_of_the_table(path):
    family = regression(path)
    levels = np.array([r["level"] for r in ROWS if r["part"] == "train"])
    found = family.metric(torch.tensor([[1.0]]), torch.tensor([[0.5]]))
    assert float(found) == pytest.approx(0.5 * levels.std(), rel=1e-6)
    back = family.encoded.in_units(np.array([[1.0]]))
    assert float(back[0, 0]) == pytest.approx(levels.mean() + levels.std(), rel=1e-9)


def test_classes_have_the_same_number_in_every_task(path):
    family = TableClassification(path=str(path), task="patient", target="ill", features=("dose",), k_shot=2)
    assert family.outputs == 2 and family.encoded.classes == ("0", "1")
    task = family.sample(keys(4, "train"), "train")
    mean, deviation = family.encoded.mean[0], family.encoded.deviation[0]
    assert task.support.y.dtype == torch.int64
    assert torch.equal(task.support.y, (task.support.x[..., 0] * deviation + mean > 3).long())


def test_parquet_arrow_and_folders_give_the_same_tasks(path, tmp_path):
    table = pa.Table.from_pylist(ROWS)
    (tmp_path / "sharded").mkdir()
    pq.write_table(table.slice(0, 40), tmp_path / "sharded" / "part-0.parquet")
    pq.write_table(table.slice(40), tmp_path / "sharded" / "part-1.parquet")
    (tmp_path / "sharded" / "_SUCCESS").write_text("")
    pq.write_table(table, tmp_path / "whole.parquet")
    pyarrow.feather.write_feather(table, tmp_path / "whole.feather")
    expected = regression(path).data_sha256
    for file in ("whole.parquet", "whole.feather", "sharded"):
        assert regression(tmp_path / file).data_sha256 == expected, file
    assert regression(f"file://{tmp_path}/whole.parquet").data_sha256 == expected


def test_without_a_split_column_names_alone_decide(path):
    family = regression(path, split_column=None, features=("dose",), k_shot=1)
    names = [family.task_names(s) for s in ("train", "validation", "test")]
    assert [len(n) for n in names] == [8, 2, 2] and len({n for part in names for n in part}) == 12


def test_an_encoding_stands_for_the_table(path):
    family = regression(path)
    options = family.exported()
    without = regression(path.with_name("gone.csv"), **options)
    assert without.input_shape == family.input_shape == (4,)
    assert without.encoded == family.encoded
    with pytest.raises(ConfigError, match="tasks.encoding: not the encoding of a table"):
        _ = regression(path, encoding='{"a": 1}').input_shape


def broken(tmp_path, change, **options):
    found = [dict(r) for r in ROWS]
    change(found)
    pq.write_table(pa.Table.from_pylist(found), tmp_path / "broken.parquet")
    return regression(tmp_path / "broken.parquet", **options)


def test_missing_inputs_are_an_error_or_the_training_mean(path, tmp_path):
    def forget(found):
        found[7]["dose"] = None

    with pytest.raises(
        DataError, match=r"column 'dose' has no value in 1 of \d+ rows \(first: row 7\); use tasks.missing"
    ):
        broken(tmp_path, forget).sample(keys(1), "test")
    family = broken(tmp_path, forget, missing="mean")
    assert (family._ready().x[:, 0] == 0).sum() == 1


@pytest.mark.parametrize(
    ("change", "options", "says"),
    [
        (lambda f: None, {"features": ("dosis",)}, r"no column 'dosis' \(tasks.features\).*did you mean 'dose'"),
        (lambda f: None, {"features": ("level",)}, "'level' is the task, the target or the split of a row already"),
        (lambda f: f[3].update(level=None), {}, "row 3: column 'level' has no value"),
        (lambda f: f[3].update(patient=None), {}, "row 3: column 'patient' has no value"),
        (lambda f: f[3].update(dose=float("inf")), {}, "row 3: column 'dose' is infinite"),
        (lambda f: f[3].update(part="exam"), {}, "row 3: column 'part' is 'exam'; expected train, validation, test"),
        (lambda f: f[0].update(part="train" if f[0]["part"] != "train" else "val"), {}, "is in the .* split and again"),
        (
            lambda f: [r.update(dose=[1.0]) for r in f],
            {},
            "column 'dose' is list.*expected numbers, true/false or text",
        ),
    ],
)
def test_mistakes_name_row_and_column(tmp_path, change, options, says):
    with pytest.raises((DataError, ConfigError), match=says):
        broken(tmp_path, change, **options).sample(keys(1), "test")


def test_what_is_no_table(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"\x00\xff\xfe")
    (tmp_path / "b.parquet").write_text("no")
    (tmp_path / "empty").mkdir()
    for file, says in (("b.parquet", "cannot read"), ("empty", "has no table"), ("c.csv", "no such folder or file")):
        with pytest.raises(DataError, match=says):
            _ = regression(tmp_path / file).input_shape
    with pytest.raises((DataError, ConfigError)):
        _ = regression(tmp_path / "a.csv").input_shape


def test_text_of_a_category_that_training_does_not_have_is_all_zeros(tmp_path):
    def other(found):
        next(r for r in found if r["part"] == "Test")["sex"] = "x"

    family = broken(tmp_path, other)
    x = family._ready().x
    assert ((x[:, 1] + x[:, 2]) == 0).sum() == 1


def test_the_encoding_is_plain_data(path):
    family = regression(path)
    assert json.loads(family.exported()["encoding"])["categories"] == {"sex": ["f", "m"]}


def test_test_tasks_are_listed_or_name_their_source(path):
    """Task i of an evaluation is task i mod 3: each once where its rows never change; else 3 sources."""
    drawn, fixed = regression(path), regression(path, support="first")
    assert (drawn.listed_tasks("test"), fixed.listed_tasks("test")) == (None, 3)
    assert [drawn.sources(key, "test") for key in keys(5).each()] == [0, 1, 2, 0, 1]
    task, numbers = (
        drawn.sample(keys(20, "train"), "train"),
        [drawn.sources(k, "train") for k in keys(20, "train").each()],
    )
    rows_of = [sum(r["patient"] == name for r in ROWS) for name in drawn.task_names("train")]
    found = (task.query.mask.sum(1) + 3).tolist() if task.query.mask is not None else [3 + task.query.y.shape[1]] * 20
    assert found == [rows_of[number] for number in numbers]


def test_a_folder_of_strangers(tmp_path):
    """Hidden copies are no rows, and files that are named after splits are not pooled in silence."""
    data = pa.Table.from_pylist(ROWS)
    pq.write_table(data, tmp_path / "part-0.parquet")
    (tmp_path / ".ipynb_checkpoints").mkdir()
    pq.write_table(data, tmp_path / ".ipynb_checkpoints" / "part-0-checkpoint.parquet")
    settings = {"path": str(tmp_path), "task": "patient", "target": "level", "k_shot": 2}
    family = TableRegression(**settings)
    assert sum(int(c.sum()) for c in family._ready().counts.values()) == len(ROWS)
    assert {s: len(names) for s, names in family.splits().items()} == {"train": 8, "validation": 2, "test": 2}
    (tmp_path / "part-0.parquet").rename(tmp_path / "train.parquet")
    pq.write_table(data, tmp_path / "Test-1.parquet")
    with pytest.raises(
        DataError, match="Test-1.parquet and train.parquet are named after splits, .* tasks.split_column"
    ):
        TableRegression(**settings).prepare(torch.device("cpu"))
    assert set(TableRegression(**settings, split_column="part").splits()["test"]) == {"p9", "p10", "p11"}


def test_rows_and_features_are_drawn_for_each_group(path):
    """Support rows and seen features are within their bounds, shared by a group, and other inputs are 0."""
    family = regression(path, k_shot=(1, 3), query_rows=(1, 4), seen_features=(1, 2), same_size=2)
    whole = regression(path, k_shot=3)
    assert family.sizes("train") is None and family.group_size("train") == 2
    seen, widths = set(), family.encoded.widths
    for group in range(40):
        pair = TaskKey.of(5, "train", 1, [2 * group, 2 * group + 1])
        task = family.sample(pair, "train")
        k, q = task.support.x.shape[1], task.query.x.shape[1]
        assert (k, q) in family.possible_sizes("train")
        used = torch.cat([task.support.x, task.query.x], 1).ne(0).any(1)  # [2, width]
        features = torch.stack([part.any(1) for part in used.split(widths, 1)], 1).sum(1)
        seen.add((k, q, int(features.max())))
        alone = family.sample_task(pair.each()[1], "train")
        assert torch.equal(alone.support.x, task.support.x[1]) and torch.equal(alone.query.y, task.query.y[1])
    assert {k for k, *_ in seen} == {1, 2, 3} and {q for _, q, _ in seen} == {1, 2, 3, 4}
    assert {features for *_, features in seen} == {1, 2}
    # The rows are those of the table: where a task sees all features, nothing else differs.
    every = regression(path, k_shot=3, seen_features=3)
    for part in ("support", "query"):
        assert torch.equal(
            getattr(every.sample(keys(3), "test"), part).x, getattr(whole.sample(keys(3), "test"), part).x
        )
    assert family.protocol("test")["k_shot"] == [1, 3] and family.protocol("test")["seen_features"] == [1, 2]
    with pytest.raises(ConfigError, match=r"tasks.seen_features = \[2, 4\]: .* has 3 features"):
        regression(path, seen_features=(2, 4)).prepare(torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"tasks.query_rows = \[4, 2\]: begins above its end"):
        regression(path, query_rows=(4, 2))


@pytest.mark.lane("numerics")
def test_drawn_rows_are_a_proper_family(path):
    from metadist.testing import check_tasks

    check_tasks(regression(path, k_shot=(1, 3), seen_features=(1, 3)), another_process=False)
