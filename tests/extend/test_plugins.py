"""Plug-ins of installed packages: found by name, listed with their package, harmless to configs without them."""

from __future__ import annotations

from importlib import metadata

import installed
import pytest
import tiny

from metadist.config.build import build
from metadist.config.catalog import ALGORITHM, ENVIRONMENT, MODEL, TASK_FAMILY
from metadist.config.plugins import plugins as found_plugins
from metadist.core.errors import ConfigError
from metadist.tasks import TASKS
from metadist.tracking import TRACKER, NullTracker, Tracker, check_uri, make_tracker

KINDS = {"algorithms": ALGORITHM, "tasks": TASK_FAMILY, "environments": ENVIRONMENT, "models": MODEL}


def refused(document) -> str:
    """The one line that ``document`` is refused with."""
    with pytest.raises(ConfigError) as error:
        build(document)
    assert "\n" not in str(error.value)
    return str(error.value)


def made(uri, tmp_path) -> Tracker:
    return make_tracker(uri, spool=tmp_path / "spool", experiment="e", runs_root=tmp_path)


# Names of plug-ins in a config ----------------------------------------------------------------------------------------


@pytest.mark.lane("services")  # tasks of a plug-in are sampled in another process too
def test_a_config_of_plug_ins_alone_is_trained(plugins, tmp_path):
    document = tiny.document("outer.meta_steps=2", "tasks.name=waves", "tracking.uri=lines://points.txt")
    document["algorithm"], document["model"] = {"name": "slow"}, {"name": "narrow", "width": 5}
    run = tiny.train(build(document), run_dir=str(tmp_path / "runs/run"), plots=False)
    assert type(run.experiment.learner.algorithm).__module__ == "good_plugins"
    assert run.experiment.learner.algorithm.inner_lr == 0.001
    first, *points, last = (tmp_path / "runs/points.txt").read_text().splitlines()
    assert first == "lines://points.txt metadist tracking"
    assert "2 meta/loss" in points
    assert last == "FINISHED"
    assert build(document).document["tasks"]["name"] == "waves"


def test_environments_and_functions_that_build_a_model(plugins):
    trials = tiny.document("algorithm={name: rl2, minibatches: 1}", "model={name: gru, hidden: 4}")
    del trials["tasks"]
    assert build({**trials, "environment": {"name": "arms", "arms": 3}}).tasks.made.arms == 3
    module = tiny.learner("model={name: line, width: 1}").model.module
    assert module.in_features == 1


def test_entry_points_are_not_read_for_names_of_our_own(plugins, monkeypatch, tmp_path):
    def refuse(*arguments, **options):
        raise AssertionError("entry points were read")

    monkeypatch.setattr(metadata, "distributions", refuse)
    build(tiny.document())
    for uri in ("none", "auto", "sqlite:////a/b.db", "http://127.0.0.1:9", "uc:http://127.0.0.1:9", "a/folder"):
        made(uri, tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_our_own_names_cannot_be_shadowed(site, kind, cli):
    name = next(iter(KINDS[kind].own))
    site("metadist-thief", installed.entry_points("nowhere", {kind: {name: "Anything"}}))
    if kind in ("algorithms", "tasks"):
        own = {"algorithms": "algorithm", "tasks": "tasks"}[kind]
        assert type(getattr(build(tiny.document()), own).made).__module__.startswith("metadist.")
    result = cli("list", kind)
    assert result.exit_code == 0
    assert f"plug-in '{name}' of metadist-thief 1.0 (nowhere:Anything) is ignored" in result.stderr
    assert "metadist-thief" not in result.stdout


def test_unknown_names_are_compared_with_those_of_plug_ins(plugins):
    message = refused(tiny.document("tasks={name: wave}"))
    known = ", ".join(sorted([*TASKS, "waves"]))
    assert f"tasks.name: 'wave' is not one of {known}; did you mean 'waves'?" in message


# Plug-ins that can't be used ------------------------------------------------------------------------------------------

BROKEN = {
    "import": ("raise ImportError('no\\nmodule named wings')", "can't be imported: ImportError: no"),
    "syntax": ("class Broken(:", "can't be imported: SyntaxError"),
    "exit": ("import sys; sys.exit(3)", "can't be imported: it ends the process"),
    "missing": ("", "can't be imported: AttributeError"),
    "object": ("Broken = 3", "is 3; expected a class derived from metadist."),
    "class": ("class Broken: pass", "is <class 'broken_plugins.Broken'>; expected a class derived from metadist."),
}


@pytest.mark.parametrize("how", BROKEN)
@pytest.mark.parametrize("kind", ["algorithms", "tasks", "environments"])
def test_a_broken_plug_in_is_one_line_that_names_the_distribution(site, plugins, kind, how, cli):
    code, message = BROKEN[how]
    site("metadist-broken", installed.entry_points("broken_plugins", {kind: {"broken": "Broken"}}), broken_plugins=code)
    section = {"algorithms": "algorithm", "tasks": "tasks", "environments": "environment"}[kind]
    document = {k: v for k, v in tiny.document().items() if (k, kind) != ("tasks", "environments")}
    line = refused({**document, section: {"name": "broken"}})
    assert line.startswith(f"{section}.name: plug-in 'broken' of metadist-broken 1.0 (broken_plugins:Broken) {message}")
    assert line.endswith("update or uninstall metadist-broken")
    build(tiny.document("tasks={name: waves}"))  # no concern of other configs
    listed = cli("list", kind)
    assert listed.exit_code == 0
    assert [line for line in listed.stdout.splitlines() if "metadist-good 1.0" in line]
    assert f"warning: {line.partition(': ')[2]}" in listed.stderr.splitlines()
    assert "Traceback" not in listed.stderr + listed.stdout
    assert "broken" not in listed.stdout


@pytest.mark.parametrize("kind", [*KINDS, "trackers"])
def test_two_plug_ins_of_one_name(site, kind, cli, tmp_path):
    for project in ("metadist-one", "metadist-two"):
        site(project, installed.entry_points("good_plugins", {kind: {"same": "Slow"}}), good_plugins=installed.GOOD)
    expected = (
        f"plug-in 'same' (metadist.{kind}) is declared by metadist-one 1.0 and metadist-two 1.0; uninstall one of them"
    )
    listed = cli("list", kind)
    assert listed.exit_code == 0
    assert f"warning: {expected}" in listed.stderr.splitlines()
    if kind == "trackers":
        with pytest.raises(ConfigError, match="tracking.uri: plug-in 'same'"):
            made("same://x", tmp_path)
    if kind == "tasks":
        assert refused(tiny.document("tasks={name: same}")) == f"tasks.name: {expected}"


def test_an_older_copy_further_down_the_path_is_hidden(site, plugins, tmp_path, monkeypatch):
    points = installed.entry_points("good_plugins", {"tasks": {"waves": "Waves"}})
    monkeypatch.syspath_prepend(str(installed.install(tmp_path / "newer", "Metadist_Good", points, version="2.0")))
    assert str(found_plugins(TASK_FAMILY).usable["waves"]).startswith("plug-in 'waves' of Metadist_Good 2.0")


def test_entry_points_that_cannot_be_read(site, plugins, cli):
    """One malformed line of another package: a warning of ``list``, and part of the message for an unknown name."""
    site("other-package", "[metadist.tasks]\nthis is no entry point")
    listed = cli("list", "tasks")
    assert listed.exit_code == 0
    assert "waves" in listed.stdout
    assert "warning: the entry points of other-package can't be read" in listed.stderr
    assert "the entry points of other-package can't be read" in refused(tiny.document("tasks={name: wavy}"))
    build(tiny.document("tasks={name: waves}"))


# Lists ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "lines"),
    [
        ("algorithms", ["slow MAML at a low rate. (metadist-good 1.0)"]),
        ("tasks", ["waves Sinusoids of short waves. (metadist-good 1.0)"]),
        ("environments", ["arms Arms(*, "]),
        ("models", ["line A linear function. (metadist-good 1.0)", "narrow A network of one hidden layer."]),
        ("trackers", ["lines Points as lines of a text file. (metadist-good 1.0)", "none No tracking"]),
    ],
)
def test_lists_show_plug_ins_with_their_distribution(plugins, cli, kind, lines):
    result = cli("list", kind)
    assert (result.exit_code, result.stderr) == (0, "")
    shown = [" ".join(line.split()) for line in result.stdout.splitlines()]
    for line in lines:
        assert any(s.startswith(line) for s in shown), shown
    assert shown == sorted(shown)


def test_what_a_plug_in_prints_does_not_get_into_the_list(site, cli):
    site(
        "metadist-loud",
        installed.entry_points("loud_plugins", {"tasks": {"loud": "Waves"}}),
        loud_plugins="print('hello')\n" + installed.GOOD.replace('"""Sinusoids of short waves."""', "pass"),
    )
    result = cli("list", "tasks")
    assert "hello" not in result.stdout
    assert any(line.split()[0] == "loud" for line in result.stdout.splitlines())


# Trackers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("picky://x", "plug-in 'picky' of metadist-good 1.0 (good_plugins:picky) can't make a tracker: ValueError"),
        ("wrong://x", "makes a dict; expected an object of a class derived from metadist.tracking.Tracker"),
        ("line://x", "tracking.uri: 'line://' is neither one of auto, databricks"),
        ("line://x", "did you mean 'lines'?"),
    ],
)
def test_trackers_that_cannot_be_used(plugins, tmp_path, uri, message):
    with pytest.raises(ConfigError) as error:
        made(uri, tmp_path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unknown_tracker_leaves_no_run_behind(plugins, cli, config, tmp_path):
    result = cli("train", config("tracking.uri=line://x"), "--run-dir", tmp_path / "run")
    assert result.exit_code == 2
    assert "did you mean 'lines'?" in result.stderr
    assert not (tmp_path / "run").exists()


def test_stores_that_mlflow_knows_by_a_plug_in_of_its_own(site, tmp_path):
    site("mlflow-elsewhere", "[mlflow.tracking_store]\nelsewhere = nowhere:Store")
    check_uri("elsewhere://project")
    assert made("elsewhere://project", tmp_path).tracking_uri == "elsewhere://project"


def test_a_tracker_that_overrides_nothing_records_nothing(tmp_path):
    tracker = Tracker()
    tracker.start(run_id="r", name="n", params={}, tags={})
    tracker.metrics(1, {"a": 1.0})
    tracker.tags({})
    tracker.artifact(tmp_path)
    tracker.model("m", [], {})
    tracker.flush()
    assert (tracker.finish("FINISHED", 1.0), tracker.mlflow_run_id, tracker.url()) == (0, None, None)
    assert isinstance(NullTracker(), Tracker)
    assert TRACKER.accepts(Tracker)
