"""The Helm chart and ``metadist render kubernetes``: values against the chart's schema, manifests against KubeRay's.

Helm renders the manifests. Without Helm the tests of the values still run; the others skip.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import kuberay
import pytest
import yaml
from kubernetes_api import empty_cluster

from metadist.config.build import build
from metadist.config.document import read_document, set_workers
from metadist.jobs.render import Node, Rendering, render
from metadist.jobs.submit import entrypoint

#: a value for everything that the templates read
EVERYTHING = {
    "image": {"repository": "registry/metadist", "tag": "1", "pullSecrets": ["pull", "other"]},
    "auth": {"secretName": "token"},
    "credentials": {"secretName": "store"},
    "data": "s3://b/data",
    "mlflow": {"trackingUri": "http://mlflow:5000"},
    "run": {"id": "a", "dir": "s3://b/a", "config": 'name: a\ntext: "é & <b> \\"c\\""\nlist:\n- 1\n'},
    "cluster": {"enabled": True},
    "service": {"enabled": True, "models": ["s3://b/a", "m=models:/n@champion"], "tokenSecretName": "callers"},
    "head": {"nodeSelector": {"pool": "head"}, "tolerations": [{"key": "head", "operator": "Exists"}]},
    "workers": [
        {
            "name": "learner",
            "minReplicas": 1,
            "maxReplicas": 2,
            "cpu": 4,
            "memory": "16Gi",
            "gpu": 1,
            "nodeSelector": {"pool": "gpu"},
            "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
        },
        {
            "name": "environment",
            "minReplicas": 0,
            "maxReplicas": 9,
            "cpu": 8,
            "memory": "32Gi",
            "gpu": 0,
            "nodeSelector": {},
            "tolerations": [],
        },
    ],
    "networkPolicy": {
        "dashboardFrom": [{"podSelector": {"matchLabels": {"role": "submitter"}}}],
        "serviceFrom": [{"podSelector": {}}],
    },
}
CHART = "deploy/helm/metadist"
LEAST = {"image": {"repository": "metadist"}, "run": {"id": "a", "dir": "s3://b/a", "config": "name: a\n"}}


@pytest.fixture(scope="session")
def helm():
    """Helm's program: METADIST_HELM, or in this Python's folder (by ``make helm``), or on PATH."""
    places = [os.environ.get("METADIST_HELM"), str(Path(sys.executable).parent / "helm"), "helm"]
    found = next((program for place in places if place and (program := shutil.which(place))), None)
    if found is None:
        pytest.skip("needs Helm: make helm, or METADIST_HELM, or PATH")
    return found


@pytest.fixture(scope="session")
def template(helm, root, tmp_path_factory):
    """``template(values)``: kind → manifest, rendered by Helm; ``CalledProcessError`` if Helm refuses the values."""

    @functools.cache
    def rendered(values):
        path = tmp_path_factory.mktemp("values") / "values.json"
        path.write_text(values)
        command = [helm, "template", "run", root / CHART, "--namespace", "ns", "--values", path]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout

    return lambda values: by_kind(rendered(json.dumps(values)))


def by_kind(text):
    return {d["kind"]: d for d in yaml.safe_load_all(text) if d}


@pytest.fixture(scope="session")
def schema(root):
    return jsonschema.Draft7Validator(json.loads((root / CHART / "values.schema.json").read_text()))


@pytest.mark.parametrize("values", [EVERYTHING, LEAST], ids=["everything", "least"])
def test_the_chart_is_valid(template, data, values):
    found = template(values)
    assert found.keys() == {"RayJob", "ConfigMap", "NetworkPolicy"} | (
        {"RayCluster", "RayService"} if values is EVERYTHING else set()
    )
    for kind in kuberay.PLURALS.keys() & found.keys():
        assert kuberay.errors(data, found[kind]) == []


def test_unknown_fields_are_refused(template, data):
    """The check itself finds an unknown field of a container and a value of the wrong type."""
    job = template(LEAST)["RayJob"]
    job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["volumeMount"] = []
    job["spec"]["backoffLimit"] = "3"
    wrong = kuberay.errors(data, job)
    assert len(wrong) == 2 and "volumeMount" in "".join(wrong) and "backoffLimit" in "".join(wrong)


def test_what_is_promised_of_a_job(template):
    found = template(EVERYTHING)
    job = found["RayJob"]["spec"]
    assert (job["backoffLimit"], job["shutdownAfterJobFinishes"], job["ttlSecondsAfterFinished"]) == (3, True, 600)
    # The command of a submitted job, with another path of the config: a retry resumes the run.
    assert shlex.split(job["entrypoint"]) == [
        w.replace("config.yaml", "/etc/metadist/config.yaml") for w in shlex.split(entrypoint("a", "s3://b/a"))
    ]
    cluster = job["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token", "secretName": "token"}
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert cluster == found["RayCluster"]["spec"] == found["RayService"]["spec"]["rayClusterConfig"]
    learner, environment = cluster["workerGroupSpecs"]
    limits = [g["template"]["spec"]["containers"][0]["resources"]["limits"] for g in (learner, environment)]
    assert limits == [{"cpu": "4", "memory": "16Gi", "nvidia.com/gpu": "1"}, {"cpu": "8", "memory": "32Gi"}]
    pods = [g["template"] for g in (cluster["headGroupSpec"], learner, environment)] + [job["submitterPodTemplate"]]
    selector = found["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"]
    for pod in pods:
        assert pod["metadata"]["labels"] == selector
        assert pod["spec"]["securityContext"]["runAsNonRoot"]
        [container] = pod["spec"]["containers"]
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["image"] == "registry/metadist:1"
        assert container["envFrom"] == [{"secretRef": {"name": "store"}}]
    assert found["ConfigMap"]["data"]["config.yaml"].strip() == EVERYTHING["run"]["config"].strip()


@pytest.mark.long
def test_the_service_is_what_ray_serve_and_our_application_take(template):
    serve = pytest.importorskip("ray.serve.schema")
    from metadist.serving.load import Serving
    from metadist.serving.ray import DEPLOYMENT_ARGS, application, bounds

    found = template(EVERYTHING)
    config = serve.ServeDeploySchema.parse_obj(yaml.safe_load(found["RayService"]["spec"]["serveConfigV2"]))
    [deployed] = config.applications
    module, _, name = deployed.import_path.partition(":")
    assert (module, name) == (application.__module__, application.__name__)
    assert deployed.args.keys() <= {*DEPLOYMENT_ARGS, *(field.name for field in dataclasses.fields(Serving))}
    assert deployed.args["sources"] == EVERYTHING["service"]["models"] and bounds(deployed.args["replicas"]) == (1, 4)


def test_no_secret_has_a_value(root):
    """The chart refers to Secrets by name: no manifest is a Secret or has a place for its content."""
    for path in (root / "deploy" / "helm").rglob("*.*"):
        text = path.read_text()
        assert "kind: Secret" not in text and "stringData" not in text, path


def test_the_network_policy_names_known_fields_only(template):
    """NetworkPolicy has no CRD, so this test compares its few fields with the API's by name."""
    policy = template(EVERYTHING)["NetworkPolicy"]
    assert policy["apiVersion"] == "networking.k8s.io/v1"
    assert policy["spec"].keys() == {"podSelector", "policyTypes", "ingress"}
    peers = [peer for rule in policy["spec"]["ingress"] for peer in rule["from"]]
    assert all(rule.keys() <= {"from", "ports"} for rule in policy["spec"]["ingress"])
    assert all(peer.keys() <= {"podSelector", "namespaceSelector"} for peer in peers)
    ports = [port for rule in policy["spec"]["ingress"] for port in rule.get("ports", [])]
    assert all(port.keys() == {"protocol", "port"} and isinstance(port["port"], int) for port in ports)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({**LEAST, "image": {}}, "image.repository is missing"),
        ({**LEAST, "run": {"id": "a", "config": "x"}}, "run.dir is missing"),
        ({**LEAST, "service": {"enabled": True}}, "service.(models|tokenSecretName) is missing"),
        ({**LEAST, "imge": {}}, "imge"),
        ({**LEAST, "job": {"backofLimit": 1}}, "job.*backofLimit"),
    ],
)
def test_helm_names_missing_and_unknown_values(template, values, says):
    with pytest.raises(subprocess.CalledProcessError) as refused:
        template(values)
    assert re.search(says, refused.value.stderr, re.DOTALL), refused.value.stderr


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"imge": {}}, "'imge' was unexpected"),
        ({"job": {"backofLimit": 1}}, "'backofLimit' was unexpected"),
        ({"workers": [{**EVERYTHING["workers"][0], "cpus": 1}]}, "'cpus' was unexpected"),
        ({"job": {"backoffLimit": "3"}}, "'3' is not of type 'integer'"),
    ],
)
def test_the_schema_refuses_unknown_values(schema, values, says):
    assert says in "".join(error.message for error in schema.iter_errors({**LEAST, **values}))


def test_every_value_is_explained_used_and_in_the_schema(root, schema):
    lines = (root / CHART / "values.yaml").read_text().splitlines()
    templates = "".join(p.read_text() for p in (root / CHART / "templates").iterdir())
    defaults = yaml.safe_load("\n".join(lines))

    def leaves(value, path=""):
        if isinstance(value, dict) and value:
            return [leaf for key, inner in value.items() for leaf in leaves(inner, f"{path}.{key}")]
        return [path]

    for leaf in leaves({k: v for k, v in defaults.items() if k != "workers"}):
        assert f".Values{leaf}" in templates, leaf
    for key in defaults["workers"][0]:
        assert f" .{key} " in templates or f" .{key} |" in templates, key
    blocks = "\n".join(lines).split("\n\n")
    assert [block for block in blocks if not block.startswith("#")] == []
    assert list(schema.iter_errors(defaults)) == []

    def listed(described, path=""):
        inner = described.get("properties") or described.get("items", {}).get("properties")
        return [leaf for key, value in inner.items() for leaf in listed(value, f"{path}.{key}")] if inner else [path]

    expected = leaves({**defaults, "workers": defaults["workers"][0]})
    assert sorted(listed(schema.schema)) == sorted([*expected, ".global"])


@pytest.mark.parametrize("values", [EVERYTHING, LEAST], ids=["everything", "least"])
def test_the_schema_accepts(schema, values):
    assert list(schema.iter_errors(values)) == []


@pytest.mark.parametrize("config", ["omniglot_maml_5w1s", "bandit_rl2"])
def test_the_values_of_a_run(schema, config, tmp_path):
    files, commands = rendered_run(config, tmp_path)
    values = yaml.safe_load(files["values.yaml"])
    assert list(schema.iter_errors(values)) == []
    assert values["image"] == {"repository": "registry:5000/metadist", "tag": "2"}
    learner = values["workers"][0]
    assert (learner["minReplicas"], learner["maxReplicas"]) == (0, 5)  # one GPU each, where the config says auto
    # The config trains as it is: every key is known, and no value waits for the cluster.
    shipped = build(yaml.safe_load(values["run"]["config"]))
    assert shipped.workers[0].gpus == 1.0 and shipped.engine.worker_patience >= 1800
    install, watch = map(shlex.split, commands)
    assert install[:4] == ["helm", "install", "run-1", f"{tmp_path}/chart"] and watch[:4] == [
        "kubectl",
        "get",
        "rayjob",
        "run-1",
    ]


def rendered_run(config, folder):
    wanted = Rendering(
        "s3://b/a", "Run.1", "s3://b/d", "registry:5000/metadist:2", nodes={"learner": Node("g5.xlarge", 4, 1)}
    )
    return render("kubernetes", set_workers(read_document(config), "5"), wanted, folder)


def test_the_rendered_chart_is_the_shipped_one(root, tmp_path):
    files, _ = rendered_run("bandit_rl2", tmp_path)
    shipped = {p.relative_to(root / CHART).as_posix(): p.read_text() for p in (root / CHART).rglob("*") if p.is_file()}
    assert {name.removeprefix("chart/"): text for name, text in files.items() if name.startswith("chart/")} == shipped
    assert {"Chart.yaml", "values.schema.json", "templates/rayjob.yaml", "templates/_helpers.tpl"} <= shipped.keys()


@pytest.mark.parametrize("config", ["omniglot_maml_5w1s", "bandit_rl2"])
def test_the_printed_command_installs_the_run(helm, data, config, tmp_path):
    """Run the command that ``metadist render`` prints against a stand-in for the Kubernetes API (without OpenAPI)."""
    files, commands = rendered_run(config, tmp_path)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    _, *words = shlex.split(commands[0])
    with empty_cluster(tmp_path) as (kubeconfig, created):
        done = subprocess.run(
            [helm, *words, "--disable-openapi-validation"],
            env={**os.environ, "KUBECONFIG": str(kubeconfig)},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
    found = {document["kind"]: document for document in created}
    assert found.keys() == {"ConfigMap", "NetworkPolicy", "RayJob"}
    for document in found.values():  # Helm adds these
        document["metadata"].pop("annotations")
        assert document["metadata"]["labels"].pop("app.kubernetes.io/managed-by") == "Helm"
    assert kuberay.errors(data, found["RayJob"]) == []
    assert found["RayJob"]["metadata"]["name"] == "run-1"
    learner = found["RayJob"]["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    assert learner["template"]["spec"]["nodeSelector"] == {"node.kubernetes.io/instance-type": "g5.xlarge"}
    assert yaml.safe_load(found["ConfigMap"]["data"]["config.yaml"]) == yaml.safe_load(
        yaml.safe_load(files["values.yaml"])["run"]["config"]
    )


@pytest.mark.parametrize("values", [EVERYTHING, LEAST], ids=["everything", "least"])
def test_helm_lint(helm, root, tmp_path, values):
    (tmp_path / "values.json").write_text(json.dumps(values))
    command = [helm, "lint", "--strict", root / CHART, "--values", tmp_path / "values.json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "missing required" not in done.stdout + done.stderr, done.stdout + done.stderr
