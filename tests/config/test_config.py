"""Configs: read strictly, refused in one line that names the key, completed with every default, and trained."""

from __future__ import annotations

import copy
import json
import os
import re
import textwrap

import pytest
import tiny
import torch
import yaml
from tiny import train

from metadist.config import schema
from metadist.config.build import build
from metadist.config.document import override, read_document, set_workers, shipped_configs
from metadist.core.errors import ConfigError


def refused(*overrides: str, document=None) -> str:
    """What building with these overrides says."""
    with pytest.raises(ConfigError) as caught:
        build(override(tiny.document() if document is None else document, overrides)).learner  # noqa: B018
    return str(caught.value)


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module into the working directory; each has its own name, since Python keeps what it has imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    written = []

    def write(source):
        name = f"mine_{os.path.basename(tmp_path).replace('-', '_')}_{len(written)}"
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(source))
        written.append(name)
        return name

    return write


# Keys and types -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("assignment", "key", "nearest"),
    [
        ("task={}", "task", "tasks"),
        ("checkpoints={}", "checkpoints", "checkpoint"),
        ("tasks.k_shots=3", "tasks.k_shots", "k_shot"),
        ("model.hiden=[3]", "model.hiden", "hidden"),
        ("algorithm.inner_step=3", "algorithm.inner_step", "inner_steps"),
        ("outer.metabatch_size=3", "outer.metabatch_size", "meta_batch_size"),
        ("evaluate.innersteps=3", "evaluate.innersteps", "inner_steps"),
        ("workers.0.cpu=3", "workers.0.cpu", "cpus"),
        ("engine.shard_time_out=3", "engine.shard_time_out", "shard_timeout"),
        ("checkpoint.keeps=3", "checkpoint.keeps", "keep"),
        ("tracking.url=x", "tracking.url", "uri"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_spelling(assignment, key, nearest):
    message = refused(assignment)
    assert f"unknown key '{key}'" in message
    assert f"did you mean '{nearest}'?" in message
    assert "allowed: " in message


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("seed=1.5", "seed: 1.5 is not allowed; expected a whole number"),
        ("seed=true", "seed: True is not allowed; expected a whole number"),
        ("seed=one", "seed: 'one' is not allowed; expected a whole number"),
        ("name=3", "name: 3 is not allowed; expected a text"),
        ("outer.lr=fast", "outer.lr: 'fast' is not allowed; expected a number"),
        ("outer.lr='1e-3'", "outer.lr: '1e-3' is not allowed; expected a number"),
        ("outer.meta_steps=2.5", "outer.meta_steps: 2.5 is not allowed; expected a whole number"),
        ("outer.betas=[0.9]", r"outer.betas: [0.9] is not allowed; expected [a number, a number]"),
        ("outer.betas=0.9", "outer.betas: 0.9 is not allowed"),
        (
            "outer.optimizer=adm",
            "'adm' is not allowed; expected one of sgd, adam, adamw, schedule_free, muon; did you mean 'adam'?",
        ),
        ("outer.clip_norm=none", "outer.clip_norm: 'none' is not allowed; expected a number or null"),
        ("evaluate.normalization=inductiv", "did you mean 'inductive'?"),
        ("workers.0.gpus=all", "workers.0.gpus: 'all' is not allowed; expected a number or auto"),
        ("workers.0.max=two", "workers.0.max: 'two' is not allowed"),
        ("engine.exact=1", "engine.exact: 1 is not allowed; expected true or false"),
        ("model.hidden=8", "model.hidden: 8 is not allowed; expected a list of a whole number"),
        ("model.freeze=head", "model.freeze: 'head' is not allowed; expected a list of a text"),
        ("algorithm.first_order=1", "algorithm.first_order: 1 is not allowed"),
        ("tasks=3", "tasks: expected {name: …}, got 3"),
        ("outer=adam", "outer: expected keys and values (optimizer"),
        ("workers=3", "workers: expected a list of groups"),
        ("workers={max: 2}", "workers: expected a list of groups"),
        ("workers=[3]", "workers.0: expected keys and values"),
        (
            "tasks.name=sinusoids",
            "'sinusoids' is not one of cifar_fs, image_folder, noisy_labels, omniglot, sinusoid, small_images",
        ),
        ("algorithm.name=mmal", "did you mean 'maml'?"),
        ("model.name=conv", "did you mean 'conv4'?"),
        ("model.name=null", "model.name is missing"),
        ("init_from=3", "init_from: 3 is not allowed"),
    ],
)
def test_a_wrong_type_names_key_value_and_what_is_allowed(assignment, expected):
    assert expected in refused(assignment)


@pytest.mark.parametrize("key", ["tasks", "model", "algorithm"])
def test_a_missing_part_is_named(key):
    document = tiny.document()
    del document[key]
    assert f"key '{key}' is missing" in refused(document=document)


@pytest.mark.parametrize(
    ("assignments", "expected"),
    [
        (["outer.momentum=0.9"], "outer.momentum: 0.9 goes with optimizer: sgd"),
        (["outer.meta_batch_size=0"], "outer.meta_batch_size: 0 is below 1"),
        (["outer.shard_size=-1"], "outer.shard_size: -1 is below 1"),
        (["outer.clip_norm=0"], "outer.clip_norm"),
        (["workers.0.min=3", "workers.0.max=2"], "min 3 and max 2"),
        (["workers.0.threads=0"], "workers.threads: 0 is below 1"),
        (["workers.0.cpus=-1"], "workers.cpus: -1"),
        (["workers.0.gpus=-0.5"], "workers.gpus: -0.5"),
        (["workers.0.role=lerner"], "workers.role: 'lerner'"),
        (["evaluate.every=0"], "evaluate.every: 0 is below 1"),
        (["evaluate.tasks=0"], "evaluate.tasks: 0 is below 1"),
        (["evaluate.test_tasks=-2"], "evaluate.test_tasks: -2 is below 1"),
        (["evaluate.inner_steps=-1"], "evaluate.inner_steps: -1 is below 0"),
        (["evaluate.patience=0"], "evaluate.patience: 0 is below 1"),
        (["checkpoint.every=0"], "checkpoint.every: 0 is below 1"),
        (["checkpoint.keep=0"], "checkpoint.keep: 0 is below 1"),
        (["tracking.log_every=0"], "tracking.log_every: 0 is below 1"),
        (["engine.shard_timeout=0"], "engine.shard_timeout: 0"),
        (["engine.worker_patience=-3"], "engine.worker_patience: -3"),
        (["name=a/b"], "name: 'a/b' must be"),
        (["name=''"], "name: '' must be"),
        (["tasks.k_shot=0"], "tasks.k_shot = 0"),
        (["tasks.amplitude=[3, 1]"], "tasks.amplitude"),
        (["algorithm.name=protonet", "algorithm.inner_lr=null"], "unknown key 'algorithm.inner_lr'"),
        (["model.freeze=[nothing*]"], "'nothing*' matches no parameter"),
        (["model.freeze=['*']"], "freezes every parameter"),
    ],
)
def test_an_impossible_value_or_combination_is_refused(assignments, expected):
    assert expected in refused(*assignments)


def test_an_algorithm_that_does_not_suit_the_tasks_is_refused():
    document = {**tiny.document(), "algorithm": {"name": "protonet"}}
    assert re.search(r"ProtoNet.*does not suit tasks 'Sinusoid'", refused(document=document))


# YAML -----------------------------------------------------------------------------------------------------------------


def written(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("text", ["1e-3", "1.0e-3", "1E-3", ".1e-2", "1.e-3", "0.001", "+1e-3"])
def test_floats_are_numbers(tmp_path, text):
    assert read_document(written(tmp_path, f"outer: {{lr: {text}}}"))["outer"]["lr"] == pytest.approx(1e-3)


@pytest.mark.parametrize("text", ["seed: 1\nname: a\nseed: 2", "outer: {lr: 1, lr: 1}", "workers: [{max: 1, max: 2}]"])
def test_a_key_given_twice_is_an_error(tmp_path, text):
    with pytest.raises(ConfigError, match=r"key '\w+' is given twice"):
        read_document(written(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: [1, 2", "config.yaml, line 1, column 9: not valid YAML"),
        ("a: b: c", "line 1"),
        ("\tname: x", "not valid YAML"),
        ("name: \x00", "not valid YAML"),
        ("name: !!python/object:os.system x", "not valid YAML"),
        ("a: &a [*a]", "not valid YAML"),
        ("a: 1\n---\nb: 2", "not valid YAML"),
        ("- a\n- b", "expected keys and values, found list"),
        ("", "expected keys and values, found NoneType"),
        ("just text", "expected keys and values, found str"),
        ("outer: {lr: .nan}", "outer.lr: nan is not a finite number"),
        ("outer: {lr: -.inf}", "outer.lr: -inf is not a finite number"),
        ("1: x", "key 1 is not a text"),
        ("on: x", "key True is not a text"),
        ("name: !!binary aGVsbG8=", "name: b'hello' is not a plain value"),
        ("name: !!set {a, b}", "name: {"),
        ("name: !!timestamp 2020-13-45", "not valid YAML"),
        ("[" * 3000, "not valid YAML"),
    ],
)
def test_what_is_no_config_is_refused_in_one_line(tmp_path, text, expected):
    with pytest.raises(ConfigError) as caught:
        read_document(written(tmp_path, text))
    assert expected in str(caught.value)


def test_a_date_is_a_text(tmp_path):
    document = {**tiny.document(), **read_document(written(tmp_path, "name: 2026-11-21"))}
    assert build(document).name == "2026-11-21"


def test_unreadable_files_are_refused(tmp_path):
    (tmp_path / "binary.yaml").write_bytes(b"\x93NUMPY\x01\x00\xff\xfe")
    for path, expected in (
        (tmp_path, "is a folder"),
        (tmp_path / "binary.yaml", "can't be read"),
        (tmp_path / "no.yaml", "neither a file"),
    ):
        with pytest.raises(ConfigError, match=expected):
            read_document(str(path))
    with pytest.raises(ConfigError, match="did you mean 'sinusoid_maml'"):
        read_document("sinusoid_mmal")


# Overrides and --workers ----------------------------------------------------------------------------------------------


def test_overrides_reach_nested_keys_and_list_items():
    document = tiny.document(
        "outer.lr=1e-4", "workers.0.cpus=2", "engine.dtype=float64", "model={name: mlp, hidden: [3, 3]}", "seed=-5"
    )
    built = build(document)
    assert built.outer.lr == 1e-4
    assert built.workers[0].cpus == 2
    assert built.engine.dtype == "float64"
    assert [tuple(p.shape) for p in built.model.made().parameters()] == [(3, 1), (3,), (3, 3), (3,), (1, 3), (1,)]
    assert built.seed == -5


def test_overrides_leave_the_original_alone():
    document = tiny.document()
    before = copy.deepcopy(document)
    override(document, ["outer.lr=7", "workers.0.cpus=3"])
    assert document == before


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("outer.lr", "expected KEY=VALUE"),
        ("=3", "expected KEY=VALUE"),
        ("outer.lr.x=3", "has no key 'x'"),
        ("outer.lr.x.y=3", "has no key 'x'"),
        ("workers.1.cpus=2", "'1' is not an index below 1"),
        ("workers.x.cpus=2", "'x' is not an index below 1"),
        ("workers.²=2", "'²' is not an index below 1"),
        ("outer.lr=[1", "not valid YAML"),
        ("outer.lr=.nan", "not a finite number"),
        ("outer.lr={a: 1, a: 2}", "given twice"),
        ("outer..lr=1", "unknown key 'outer.'"),
    ],
)
def test_a_bad_override_is_refused(assignment, expected):
    assert expected in refused(assignment)


@pytest.mark.parametrize(
    ("workers", "expected"),
    [
        ("0", (0, 0)),
        ("3", (3, 3)),
        ("learners=2", (2, 2)),
        ("learner=1", (1, 1)),
        (" 2 ", (2, 2)),
        ("learners = 4", (4, 4)),
    ],
)
def test_the_forms_of_workers(workers, expected):
    group = build(set_workers(tiny.document(), workers)).workers[0]
    assert (group.min, group.max) == expected


@pytest.mark.parametrize("workers", ["two", "-1", "1.5", "", "learners=", "learners=x", "actors=2", "2,,", "²"])
def test_other_forms_of_workers_are_refused(workers):
    with pytest.raises(ConfigError, match="--workers"):
        set_workers(tiny.document(), workers)


def trials(*overrides):
    """A document whose tasks are those of a meta-environment."""
    document = override(read_document("bandit_rl2"), overrides)
    return {**document, "workers": document["workers"][:1]}


ROLES = "workers=[{role: learner, min: 1, max: 1}, {role: environment, min: 4, max: 16, cpus: 2, gpus: 0}]"


@pytest.mark.parametrize(
    ("config", "workers", "expected"),
    [
        (trials(), "3", [("learner", 3, 3)]),
        (trials(), "learners=1,environments=2", [("learner", 1, 1), ("environment", 2, 2)]),
        (trials(), "environment=2", [("learner", 2, 2), ("environment", 2, 2)]),
        (override(trials(), [ROLES]), "3", [("learner", 3, 3), ("environment", 4, 16)]),
        (override(trials(), [ROLES]), "environments=0", [("learner", 1, 1), ("environment", 0, 0)]),
        (override(trials(), [ROLES]), " learners = 2 , environments = 6 ", [("learner", 2, 2), ("environment", 6, 6)]),
        (override(trials(), [ROLES]), "0", [("learner", 0, 0), ("environment", 0, 0)]),
    ],
)
def test_workers_of_more_than_one_role(config, workers, expected):
    groups = build(set_workers(config, workers)).workers
    assert [(g.role, g.min, g.max) for g in groups] == expected
    assert [g.gpus for g in groups] == ["auto", 0][: len(groups)]
    if len(groups) > 1 and "cpus" in str(config["workers"][-1]) and config["workers"][-1]["role"] == "environment":
        assert groups[1].cpus == 2, "the rest of a group stays"


@pytest.mark.parametrize(
    ("workers", "expected"),
    [
        ("envs=2", "'env' is not one of learner, environment"),
        ("environmints=2", "did you mean 'environment'?"),
        ("learners=0,environments=2", "environments alone learn nothing"),
        ("2,learners=3", "learners are given twice"),
        ("learners=1;environments=2", "expected a number, such as 2, or role=number"),
    ],
)
def test_wrong_roles_are_refused(workers, expected):
    with pytest.raises(ConfigError, match=re.escape(expected)):
        set_workers(trials(), workers)


def test_supervised_tasks_have_no_environments():
    with pytest.raises(ConfigError, match="--workers learners=1,environments=1: supervised tasks have no environments"):
        set_workers(tiny.document(), "learners=1,environments=1")


@pytest.mark.parametrize("groups", [3, {"max": 2}, [3], "learner"])
def test_workers_on_a_malformed_config_is_refused(groups):
    with pytest.raises(ConfigError, match="workers: expected a list of groups"):
        set_workers({**tiny.document(), "workers": groups}, "2")


# The user's own -------------------------------------------------------------------------------------------------------

MINE = """
    from __future__ import annotations
    from dataclasses import dataclass
    import torch
    from torch import nn
    from metadist import Algorithm, Examples, Task, TaskFamily, MAML

    @dataclass(frozen=True)
    class Lines(TaskFamily):
        slope: float = 2.0
        input_shape = (1,)

        def sample_task(self, key, split):
            a = key.stream("a").normal(1) * self.slope
            x = key.stream("x").normal(8, 1)
            return Task(Examples(x[:4], a * x[:4]), Examples(x[4:], a * x[4:]))

    class Plain(TaskFamily):
        def __init__(self, rows=3):
            self.rows, self.input_shape = rows, (1,)

        def sample_task(self, key, split):
            x = key.stream("x").normal(self.rows, 1)
            return Task(Examples(x, x), Examples(x, x))

    class Net(nn.Module):
        def __init__(self, width: int = 4):
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(1, width), nn.Tanh(), nn.Linear(width, 1))

        def forward(self, x):
            return self.layers(x)

    @dataclass(frozen=True)
    class Mine(MAML):
        twist: float = 0.0

    def absolute(prediction, target):
        return (prediction - target).abs().flatten(1).mean(1)

    def build_net():
        return Net(5)

    ready = Net(6)
    family = Plain(4)
    number = 3.14

    class Picky(nn.Module):
        def __init__(self, width=1):
            super().__init__()
            raise RuntimeError(f"width {width}\\nis not to my liking")

    class PickyTasks(TaskFamily):
        def __init__(self):
            raise KeyError("no tasks today")
"""


@pytest.mark.lane("services")  # one's own tasks are sampled in another process too
@pytest.mark.parametrize(
    ("changes", "width"),
    [
        ({"tasks": {"name": "{m}:Lines", "slope": 3}}, 8),
        ({"tasks": "{m}:Plain"}, 8),
        ({"tasks": {"name": "{m}:Plain", "rows": 5}, "model": {"name": "{m}:Net", "width": 7}}, 7),
        ({"tasks": "{m}:family", "model": "{m}:build_net"}, 5),
        ({"model": "{m}:ready"}, 6),
        ({"algorithm": {"name": "{m}:Mine", "inner_lr": 0.1, "twist": 2}}, 8),
        ({"loss": "{m}:absolute"}, 8),
        ({"metric": "{m}:absolute"}, 8),
        ({"metric": {"name": "{m}:absolute", "higher_is_better": True}}, 8),
    ],
)
def test_ones_own_parts_are_trained_resolved_and_built_again(module, tmp_path, changes, width):
    name = module(MINE)
    filled = yaml.safe_load(yaml.safe_dump(changes).replace("{m}", name))
    document = {**tiny.document("outer.meta_steps=2"), **filled}
    result = train(build(document), run_dir=str(tmp_path / "run"), plots=False)
    assert result.outcome.progress.meta_step == 2
    assert sum(t.shape[0] == width for t in result.experiment.learner.parameters(result.state).values()) == 2
    again = build(build(document).document)
    assert again.document == build(document).document
    if "metric" in filled:
        assert result.evaluations[0].metric == "absolute"
        assert again.tasks.made.higher_is_better == isinstance(filled["metric"], dict)
    if "loss" in filled:
        assert result.evaluations[0].metric == "mse"
        assert result.evaluations[0].loss != result.evaluations[0].mean


WORST = """
    def worst(prediction, target, mask):
        return (prediction - target).abs()[mask].max()
"""


def test_metrics_of_whole_tasks_are_named_in_the_config(module, tmp_path):
    name = module(WORST)
    run = build(tiny.document("outer.meta_steps=2", f"task_metrics=[r2, '{name}:worst']"))
    result = train(run, run_dir=str(tmp_path / "run"), plots=False)
    [judged] = result.evaluations
    assert list(judged.task_metrics) == ["r2", "worst"]
    assert judged.task_metrics["worst"].mean[-1] ** 2 > judged.mean[-1]
    assert build(run.document).document["task_metrics"] == ["r2", f"{name}:worst"]
    written = json.loads((tmp_path / "run/evaluation.json").read_text())[0]["task_metrics"]
    assert written["r2"]["mean"] == judged.task_metrics["r2"].mean and written["r2"]["left_out"] == 0


def test_judges_of_the_config_hold_from_python_too(module):
    """Earlier, ``compose`` wrote them into the config of the run and judged by the family's own."""
    import metadist

    name = module(MINE)
    family = metadist.Sinusoid()
    parts = {"tasks": family, "model": metadist.MLP(), "algorithm": metadist.MAML(), "outer": metadist.OuterLoop()}
    judged = metadist.compose(**parts, metric=f"{name}:absolute", task_metrics=("mae",)).learner
    assert (judged.tasks.metric_name, [m.name for m in judged.task_metrics]) == ("absolute", ["mae"])
    one = torch.ones(3, 1)
    assert judged.tasks.metric(2 * one, -one).tolist() == [3.0] * 3
    assert (family.metric_name, family.metric(2 * one, -one).tolist()) == ("mse", [9.0] * 3)


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("task_metrics=[r3]", "task_metrics: 'r3' is unknown; 'Sinusoid' is regression: expected one of r2, mae"),
        ("task_metrics=[macro_f1]", "'macro_f1' is for classification"),
        ("task_metrics=r2", "task_metrics: 'r2' is not allowed; expected a list"),
        (
            "task_metrics=['os:sep']",
            "task_metrics: 'os:sep' can't be imported: 'os' is a module of Python itself; expected a module",
        ),
        (
            "metric=r2",
            "metric: 'r2' is a metric of whole tasks, and metric is one of examples; give it as task_metrics",
        ),
    ],
)
def test_mistakes_in_task_metrics(assignment, expected):
    assert expected in refused(assignment)


def test_a_meta_environment_has_no_judges():
    document = read_document("bandit_rl2")
    assert refused("task_metrics=[r2]", document=document).startswith("task_metrics: for supervised tasks; ")


def test_ones_own_loss_changes_what_is_learned(module, tmp_path):
    name = module(MINE)
    plain, mine = (
        train(tiny.experiment(*o), run_dir=str(tmp_path / str(len(o))), plots=False)
        for o in ((), (f"loss={name}:absolute",))
    )
    assert plain.params_sha256 != mine.params_sha256


@pytest.mark.parametrize(
    ("assignments", "expected"),
    [
        (["tasks={name: '{m}:Line'}"], "module '{m}' has no 'Line'; did you mean 'Lines'?"),
        (
            ["tasks={name: '{m}x:Lines'}"],
            "No module named '{m}x'; modules are looked for in the working directory and on PYTHONPATH",
        ),
        (["tasks={name: ':Lines'}"], "tasks.name: ':Lines' can't be imported"),
        (["tasks={name: '.{m}:Lines'}"], "can't be imported"),
        (["tasks={name: '{m}:'}"], "can't be imported: expected package.module:Name"),
        (["tasks={name: '{m}:Lines', slop: 2}"], "unknown key 'tasks.slop'; did you mean 'slope'?"),
        (["tasks={name: '{m}:Lines', slope: steep}"], "tasks.slope: 'steep' is not allowed; expected a number"),
        (["tasks={name: '{m}:Plain', row: 2}"], "tasks: Plain(rows=3): got an unexpected keyword argument 'row'"),
        (["tasks={name: '{m}:Net'}"], "is the class Net; expected a class derived from metadist.TaskFamily"),
        (["tasks={name: '{m}:number'}"], "tasks.name: '{m}:number' is 3.14; expected a class or a function"),
        (["tasks={name: '{m}:family', rows: 9}"], "tasks: '{m}:family' is an object already and takes no rows"),
        (["tasks={name: '{m}:PickyTasks'}"], "tasks: PickyTasks raised KeyError: 'no tasks today'"),
        (["algorithm={name: '{m}:Lines'}"], "is the class Lines; expected a class derived from metadist.Algorithm"),
        (["model={name: '{m}:Net', widht: 3}"], "unexpected keyword argument 'widht'"),
        (["model={name: '{m}:Picky', width: 3}"], "model: Picky raised RuntimeError: width 3\nis not to my liking"),
        (
            ["model={name: '{m}:Lines'}"],
            "is the class Lines; expected a dataclass with build() or build_policy(), or a class or function that",
        ),
        (["loss={m}:number"], "loss: '{m}:number' is 3.14; expected a function"),
        (["loss={m}:nothing"], "module '{m}' has no 'nothing'"),
        (["loss={a: 1}"], "loss: {'a': 1} is not allowed; expected a text"),
        (["metric={m}:number"], "metric: '{m}:number' is 3.14"),
        (
            ["metric={name: '{m}:absolute', higher: true}"],
            "unknown key 'metric.higher'; allowed: name, higher_is_better",
        ),
    ],
)
def test_ones_own_mistakes_are_named(module, assignments, expected):
    name = module(MINE)
    assert expected.replace("{m}", name) in refused(*(a.replace("{m}", name) for a in assignments))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("def broken(:\n", "SyntaxError"),
        ("import nothing_of_this_name\n", "No module named 'nothing_of_this_name'"),
        ("\n\n1 / 0\n", "ZeroDivisionError: division by zero .*line 3"),
        ("import math\nmath.sinus\n", "AttributeError: .*sinus"),
    ],
)
def test_a_module_that_cannot_be_imported_is_named(module, source, expected):
    name = module(source)
    assert re.search(expected, refused(f"tasks={{name: '{name}:X'}}"))


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("return (prediction - target).square().mean()", "must return one value per example"),
        ("return (prediction - target).square()", "must return one value per example"),
    ],
)
def test_a_loss_of_the_wrong_shape_is_refused(module, tmp_path, body, expected):
    name = module(f"def loss(prediction, target):\n    {body}\n")
    with pytest.raises(ConfigError, match=expected):
        train(tiny.experiment(f"loss={name}:loss"), run_dir=str(tmp_path / "run"))


# The shipped ones -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(shipped_configs()))
def test_every_shipped_config_resolves_to_itself(name):
    document = read_document(name)
    once = build(document).document
    assert build(once).document == once
    assert schema.parse_yaml(yaml.safe_dump(once), "dumped") == once
    assert build(once).learner.slots.keys() == build(document).learner.slots.keys()
    assert {k: v for k, v in schema.flatten(document).items() if not k.startswith("workers")}.items() <= schema.flatten(
        once
    ).items()


@pytest.mark.lane("numerics")
@pytest.mark.parametrize("name", sorted(shipped_configs()))
def test_every_shipped_config_trains(name, tmp_path, request):
    document = read_document(name)
    if document.get("tasks", {"name": "sinusoid"})["name"] != "sinusoid":
        request.getfixturevalue("data")
    batch = document["algorithm"].get("minibatches", 2) if "environment" in document else 2
    resolved = build(document).document
    small = [
        "outer.meta_steps=2",
        f"outer.meta_batch_size={batch}",
        "outer.shard_size=1",
        "evaluate.tasks=2",
        "evaluate.test_tasks=2",
        "tracking.uri=none",
        *(["environment.horizon=4"] if "horizon" in resolved.get("environment", {}) else []),
        *(["evaluate.inner_steps=3"] if (resolved["evaluate"]["inner_steps"] or 0) > 10 else []),
        *(["model.filters=8"] if "filters" in resolved["model"] else []),
    ]
    result = train(build(set_workers(override(document, small), "0")), run_dir=str(tmp_path / "run"), plots=False)
    assert result.outcome.progress.meta_step == 2
    assert result.evaluations[0].tasks == 2
    assert all(torch.isfinite(t).all() for t in result.experiment.learner.parameters(result.state).values())
