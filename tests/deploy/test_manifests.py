"""The chart and what ``metadist render kubernetes`` makes of it, held against KubeRay's schemas."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import kuberay
import pytest
import yaml

from metadist.config.build import build
from metadist.config.document import read_document, set_workers
from metadist.core.errors import ConfigError
from metadist.jobs.charts import Chart, TemplateError
from metadist.jobs.render import Node, Rendering, render
from metadist.jobs.submit import entrypoint

#: every value that the templates look at, set
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
LEAST = {"image": {"repository": "metadist"}, "run": {"id": "a", "dir": "s3://b/a", "config": "name: a\n"}}


@pytest.fixture(scope="module")
def chart(root):
    return Chart(root / "deploy" / "helm" / "metadist")


def documents(rendered):
    return {d["kind"]: d for text in rendered.values() for d in yaml.safe_load_all(text) if d}


@pytest.mark.parametrize("values", [EVERYTHING, LEAST], ids=["everything", "least"])
def test_the_chart_is_valid(chart, data, values):
    found = documents(chart.render(values, release="run", namespace="ns"))
    assert found.keys() == {"RayJob", "ConfigMap", "NetworkPolicy"} | (
        {"RayCluster", "RayService"} if values is EVERYTHING else set()
    )
    for kind in kuberay.PLURALS.keys() & found.keys():
        assert kuberay.errors(data, found[kind]) == []


def test_unknown_fields_are_refused(chart, data):
    """The check itself: deep inside of a pod, and of the wrong type."""
    job = documents(chart.render(LEAST, release="run", namespace="ns"))["RayJob"]
    job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["volumeMount"] = []
    job["spec"]["backoffLimit"] = "3"
    wrong = kuberay.errors(data, job)
    assert len(wrong) == 2 and "volumeMount" in "".join(wrong) and "backoffLimit" in "".join(wrong)


def test_what_is_promised_of_a_job(chart):
    found = documents(chart.render(EVERYTHING, release="run", namespace="ns"))
    job = found["RayJob"]["spec"]
    assert (job["backoffLimit"], job["shutdownAfterJobFinishes"], job["ttlSecondsAfterFinished"]) == (3, True, 600)
    # The very command that a submitted job has, but for where the config lies: a retry goes on.
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
def test_the_service_is_what_ray_serve_and_our_application_take(chart):
    serve = pytest.importorskip("ray.serve.schema")
    from metadist.serving.load import Serving
    from metadist.serving.ray import _OWN, application, bounds

    found = documents(chart.render(EVERYTHING, release="run", namespace="ns"))
    config = serve.ServeDeploySchema.parse_obj(yaml.safe_load(found["RayService"]["spec"]["serveConfigV2"]))
    [deployed] = config.applications
    module, _, name = deployed.import_path.partition(":")
    assert (module, name) == (application.__module__, application.__name__)
    assert deployed.args.keys() <= {*_OWN, *(field.name for field in dataclasses.fields(Serving))}
    assert deployed.args["sources"] == EVERYTHING["service"]["models"] and bounds(deployed.args["replicas"]) == (1, 4)


def test_no_secret_has_a_value(root):
    """By reference alone: no manifest is a Secret or has a place for one's content."""
    for path in (root / "deploy" / "helm").rglob("*.*"):
        text = path.read_text()
        assert "kind: Secret" not in text and "stringData" not in text, path


def test_the_network_policy_names_known_fields_only(chart):
    """NetworkPolicy has no CRD; its few fields are held against the API's by name."""
    policy = documents(chart.render(EVERYTHING, release="run", namespace="ns"))["NetworkPolicy"]
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
        ({**LEAST, "imge": {}}, "chart value 'imge' is unknown"),
        ({**LEAST, "job": {"backofLimit": 1}}, "chart value 'job.backofLimit' is unknown"),
        ({**LEAST, "service": {"enabled": True}}, "service.models is missing|service.tokenSecretName is missing"),
    ],
)
def test_what_is_missing_or_unknown_is_named(chart, values, says):
    with pytest.raises(ConfigError, match=says):
        chart.render(values, release="run", namespace="ns")


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ .Values.nothing }}", "there is no 'nothing'"),
        ("{{ lookup .Values }}", "'lookup' is no function"),
        ("{{ if .Values }}x", "has no end"),
        ("{{ end }}", "an end too many"),
        ("{{ .Values .Release }}", "expected one value or a function"),
    ],
)
def test_what_the_renderer_does_not_know_is_an_error(tmp_path, template, says):
    (tmp_path / "templates").mkdir()
    (tmp_path / "Chart.yaml").write_text("name: x\n")
    (tmp_path / "values.yaml").write_text("a: 1\n")
    (tmp_path / "templates" / "x.yaml").write_text(template)
    with pytest.raises(TemplateError, match=says):
        Chart(tmp_path).render({}, release="r", namespace="n")


def test_every_value_is_explained_and_used(root):
    lines = (root / "deploy/helm/metadist/values.yaml").read_text().splitlines()
    templates = "".join(p.read_text() for p in (root / "deploy/helm/metadist/templates").iterdir())
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


@pytest.mark.parametrize("config", ["omniglot_maml_5w1s", "bandit_rl2"])
def test_a_rendered_run(data, config, tmp_path):
    document = read_document(config)
    wanted = Rendering(
        "s3://b/a", "Run.1", "s3://b/d", "registry:5000/metadist:2", nodes={"learner": Node("g5.xlarge", 4, 1)}
    )
    files, commands = render("kubernetes", set_workers(document, "5"), wanted, tmp_path)
    found = {d["kind"]: d for d in yaml.safe_load_all(files["manifests.yaml"]) if d}
    assert kuberay.errors(data, found["RayJob"]) == []
    job = found["RayJob"]
    assert job["metadata"]["name"] == "run-1"
    learner = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    assert (learner["minReplicas"], learner["maxReplicas"]) == (0, 5)  # a GPU each, where the config says auto
    assert learner["template"]["spec"]["nodeSelector"] == {"node.kubernetes.io/instance-type": "g5.xlarge"}
    # The config in the manifest is one that trains: every key is known, and what auto would come to late is decided.
    shipped = build(yaml.safe_load(found["ConfigMap"]["data"]["config.yaml"]))
    assert shipped.workers[0].gpus == 1.0 and shipped.engine.worker_patience >= 1800
    assert f"kubectl apply -f {tmp_path}/manifests.yaml" in commands


def test_helms_values_make_the_same_manifests(chart, tmp_path):
    wanted = Rendering("s3://b/a", "a", "", "metadist:1", auth_secret="t", credentials_secret="c")
    files, _ = render("kubernetes", read_document("sinusoid_maml"), wanted, tmp_path)
    again = chart.render(yaml.safe_load(files["values.yaml"]), release="a", namespace="default")
    assert documents(again) == {d["kind"]: d for d in yaml.safe_load_all(files["manifests.yaml"]) if d}


def python_with_helm():
    """A Python that has helm-sdkpy, which needs 3.12: this one, or the one that METADIST_HELM_PYTHON names."""
    for python in (os.environ.get("METADIST_HELM_PYTHON"), sys.executable):
        if python and subprocess.run([python, "-c", "import helm_sdkpy"], capture_output=True).returncode == 0:
            return python
    return None


@pytest.mark.long
@pytest.mark.parametrize("values", [EVERYTHING, LEAST], ids=["everything", "least"])
def test_helm_renders_the_same(chart, root, tmp_path, values):
    """Helm itself, linting and installing into an API that has nothing in it, sends what our renderer writes."""
    python = python_with_helm()
    if python is None:
        pytest.skip("needs helm-sdkpy in a Python ≥ 3.12: METADIST_HELM_PYTHON")
    (tmp_path / "values.json").write_text(json.dumps(values))
    command = [
        python,
        Path(__file__).parent / "helm_install.py",
        root / "deploy/helm/metadist",
        tmp_path / "values.json",
        "run",
        "ns",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    sent = {d["kind"]: d for d in json.loads(done.stdout)}
    for document in sent.values():  # Helm's marks
        del document["metadata"]["annotations"], document["metadata"]["labels"]["app.kubernetes.io/managed-by"]
    assert sent == documents(chart.render(values, release="run", namespace="ns"))
