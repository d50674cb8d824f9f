"""Ray cluster definitions, shipped and rendered, pass Ray's own schema and checks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

from metadist.config.build import build
from metadist.config.document import read_document, set_workers
from metadist.config.groups import ROLES, WorkerGroup
from metadist.core.errors import ConfigError
from metadist.jobs.render import Node, Rendering, node_groups, render

CLOUDS = ("aws", "gcp")


@pytest.fixture(scope="module")
def schema():
    import importlib.util

    package = Path(importlib.util.find_spec("ray").origin).parent
    return jsonschema.Draft7Validator(json.loads((package / "autoscaler" / "ray-schema.json").read_text()))


def rendered(target, config, folder, **wanted):
    document = read_document(config) if isinstance(config, str) else config
    return render(target, document, Rendering(**{"run_dir": "s3://b/a", "run_id": "a", **wanted}), folder)


@pytest.mark.parametrize("name", ["aws", "gcp", "ssh"])
def test_the_shipped_ones_are_valid(schema, root, name):
    assert [
        e.message for e in schema.iter_errors(yaml.safe_load((root / "cluster" / f"{name}.yaml").read_text()))
    ] == []


@pytest.mark.parametrize("target", CLOUDS)
@pytest.mark.parametrize("config", ["omniglot_maml_5w1s", "bandit_rl2"])
def test_the_rendered_ones_are_valid(schema, tmp_path, target, config):
    files, _ = rendered(target, config, tmp_path)
    assert [e.message for e in schema.iter_errors(yaml.safe_load(files["cluster.yaml"]))] == []


@pytest.mark.long
def test_ray_itself_accepts_them(root, tmp_path):
    """Ray's autoscaler prepares and checks them, as ``ray up`` does first."""
    paths = [root / "cluster" / f"{name}.yaml" for name in (*CLOUDS, "ssh")]
    for target in CLOUDS:
        paths.append(tmp_path / f"{target}.yaml")
        paths[-1].write_text(rendered(target, "bandit_rl2", tmp_path)[0]["cluster.yaml"])
    code = (
        "import sys, yaml\nfrom ray.autoscaler._private.util import prepare_config, validate_config\n"
        "for path in sys.argv[1:]: validate_config(prepare_config(yaml.safe_load(open(path))))"
    )
    done = subprocess.run([sys.executable, "-c", code, *map(str, paths)], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("target", CLOUDS)
def test_what_is_promised(root, target):
    cluster = yaml.safe_load((root / "cluster" / f"{target}.yaml").read_text())
    kinds = cluster["available_node_types"]
    assert kinds.keys() == {"head", *ROLES}
    assert kinds["head"]["resources"] == {"CPU": 0} and "max_workers" not in kinds["head"]
    assert kinds["learner"]["resources"]["GPU"] >= 1 and "GPU" not in kinds["environment"]["resources"]
    assert "spot" in json.dumps([kinds[role]["node_config"] for role in ROLES]).lower()
    assert cluster["max_workers"] == sum(kinds[role]["max_workers"] for role in ROLES)
    for commands in (cluster["head_start_ray_commands"], cluster["worker_start_ray_commands"]):
        assert "RAY_AUTH_MODE=token" in commands[-1]
    assert (
        "--num-cpus=0" in cluster["head_start_ray_commands"][-1]
        and "--dashboard-host=127.0.0.1" in cluster["head_start_ray_commands"][-1]
    )


@pytest.mark.parametrize("target", CLOUDS)
def test_groups_become_nodes(tmp_path, target):
    document = set_workers(read_document("bandit_rl2"), "learners=3,environments=20")
    files, commands = rendered(
        target, document, tmp_path, image="r/metadist:3", data="s3://b/d", mlflow="http://m:5000"
    )
    cluster, config = yaml.safe_load(files["cluster.yaml"]), build(yaml.safe_load(files["config.yaml"]))
    kinds = cluster["available_node_types"]
    assert [(kinds[r]["min_workers"], kinds[r]["max_workers"]) for r in ROLES] == [
        (0, 3),
        (0, 3),
    ]  # a GPU each; 8 to a node
    assert cluster["max_workers"] == 6 and cluster["docker"]["image"] == "r/metadist:3"
    assert [g.gpus for g in config.workers] == [1.0, 0.0] and config.engine.worker_patience >= 1800
    submit = next(c for c in commands if c.startswith("metadist submit"))
    assert "--run-id a" in submit and "--data s3://b/d" in submit and "MLFLOW_TRACKING_URI=http://m:5000" in submit


def test_learners_without_gpus_take_cheap_nodes(tmp_path):
    files, _ = rendered("aws", "sinusoid_maml", tmp_path, gpus=0.0)
    kinds = yaml.safe_load(files["cluster.yaml"])["available_node_types"]
    assert kinds.keys() == {"head", "learner"}
    assert (
        kinds["learner"]["resources"] == {"CPU": 8} and kinds["learner"]["node_config"]["InstanceType"] == "c5.2xlarge"
    )


def test_named_nodes(tmp_path):
    files, _ = rendered(
        "aws", set_workers(read_document("sinusoid_maml"), "9"), tmp_path, nodes={"learner": Node("g5.12xlarge", 48, 4)}
    )
    learner = yaml.safe_load(files["cluster.yaml"])["available_node_types"]["learner"]
    assert (learner["resources"], learner["node_config"]["InstanceType"], learner["max_workers"]) == (
        {"CPU": 48, "GPU": 4},
        "g5.12xlarge",
        3,
    )


def test_fractions_and_groups_of_one_role():
    groups = [WorkerGroup(max=5, cpus=0.5, gpus=0.5), WorkerGroup(max=3, cpus=2, gpus=0)]
    first, second = node_groups(groups, {"learner": Node(None, 4, 1)})
    assert (first.name, first.fit, first.most) == ("learner", 2, 3)
    assert (second.name, second.fit, second.most) == ("learner-2", 2, 2)


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        (
            {"nodes": {"learner": Node(None, 4, 0)}},
            "a learner of 1 CPUs and 1 GPUs doesn't fit into a node of 4 CPUs and 0 GPUs; give --node",
        ),
        ({"run_dir": "s3://b/$(id)"}, "the character '$' has a meaning in shells"),
        ({"data": 'x"y'}, "--data 'x\"y': the character '\"' has"),
    ],
)
def test_what_cannot_be_is_one_line(tmp_path, wanted, says):
    with pytest.raises(ConfigError) as error:
        rendered("aws", "sinusoid_maml", tmp_path, **wanted)
    assert says in str(error.value)


def test_a_run_without_workers_needs_no_cluster(tmp_path):
    with pytest.raises(ConfigError, match="a cluster needs workers"):
        rendered("aws", set_workers(read_document("sinusoid_maml"), "0"), tmp_path)
