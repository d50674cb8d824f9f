"""Render the files of ``deploy/`` and ``cluster/`` for one run: its worker groups become groups of nodes.

Kubernetes: values for the Helm chart. Slurm: a batch script from a Jinja2 template. AWS and Google Cloud: a Ray cluster
definition. Each target also gets the run's config, with every value decided that depends on the cluster.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import yaml

from metadist.config.build import build
from metadist.config.groups import ROLES, WorkerGroup
from metadist.core.errors import ConfigError
from metadist.core.text import has_password
from metadist.jobs.modules import own_names
from metadist.storage.run_directory import new_run_id, refuse_password

log = logging.getLogger(__name__)

TARGETS = ("kubernetes", "slurm", "aws", "gcp")
#: seconds for an autoscaler to start nodes, including images and drivers
PATIENCE = 1800.0
#: (CPUs, GPUs) of a node where neither the target nor the user names a node type
NODES = {"learner": (4, 1), "environment": (8, 0)}
#: CPUs of a pod that Ray itself needs; GiB of memory for each CPU
SPARE_CPUS, MEMORY_PER_CPU = 1, 4
HEADER = "# Made by `metadist render {target}` from {source}, which explains every line.\n"
#: where the rendered folder holds the copy of the chart
CHART = "chart"


@dataclass(frozen=True)
class Node:
    """A type of node: the type's name (None: any), its CPUs and its GPUs."""

    type: str | None
    cpus: int
    gpus: int


@dataclass(frozen=True)
class NodeGroup:
    """Nodes for one group of workers: each node holds ``fit`` workers, ``most`` nodes hold all of them."""

    name: str
    each: Node
    fit: int
    most: int


@dataclass(frozen=True)
class Rendering:
    """The options of ``metadist render``, without the config."""

    run_dir: str
    run_id: str | None = None
    data: str = ""
    image: str = ""
    mlflow: str = ""
    nodes: Mapping[str, Node] = field(default_factory=dict)
    gpus: float | None = None
    namespace: str = "default"
    auth_secret: str = ""
    credentials_secret: str = ""


@dataclass(frozen=True)
class _Run:
    """The input of each target: the config as YAML, its groups with workers, the options, the output folder."""

    run_id: str
    config: str
    groups: Sequence[WorkerGroup]
    wanted: Rendering
    folder: Path


def render(target: str, document: dict[str, Any], wanted: Rendering, folder: Path) -> tuple[dict[str, str], list[str]]:
    """Return (file → text, the next commands) for ``target``; file names are relative to ``folder``.

    Raises ``ConfigError`` for options that the target cannot use and for workers that fit no node.
    """
    config = build(document)
    document = dict(config.document)
    run_id = wanted.run_id or new_run_id(config.name)
    for key, value in (
        ("--run-id", run_id),
        ("--run-dir", wanted.run_dir),
        ("--data", wanted.data),
        ("--image", wanted.image),
        ("--mlflow", wanted.mlflow),
    ):
        if found := re.search(r"[\s\"'`$\\;&|<>]", value):
            raise ConfigError(f"{key} '{value}': the character {found[0]!r} has a meaning in shells; leave it out")
    refuse_password(wanted.run_dir)
    if has_password(wanted.mlflow):
        raise ConfigError(
            "--mlflow: a password would stand in the files; put MLFLOW_TRACKING_URI into the Secret of "
            "--credentials-secret, or into the environment of the nodes"
        )
    groups = [_decided(g, wanted.gpus) for g in config.workers if g.max]
    if not groups:
        raise ConfigError(
            "workers: every group has 0 workers, so the driver's process computes everything; a cluster needs workers, "
            "such as --workers 2"
        )
    document["workers"] = [dataclasses.asdict(g) for g in groups]
    if target != "slurm":
        patience = max(PATIENCE, document["engine"]["worker_patience"])
        document["engine"] = {**document["engine"], "worker_patience": patience}
    text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True)
    run = _Run(run_id, text, groups, wanted, folder)
    if target == "kubernetes":
        if names := own_names(document):
            log.warning("the config names %s, which are not in the files: add them to the image", ", ".join(names))
        return _kubernetes(run)
    return _slurm(run) if target == "slurm" else _cloud(target, run)


def shipped(name: str) -> Path:
    """Return a path in ``cluster/`` or ``deploy/``: inside the package in a wheel, next to it in a checkout."""
    package = Path(__file__).parents[1]
    return next((p for p in (package / name, package.parent / name) if p.exists()), package / name)


def _decided(group: WorkerGroup, gpus: float | None) -> WorkerGroup:
    """Replace ``gpus: auto`` by a number: ``auto`` divides the GPUs that a cluster has when the run starts, and a
    cluster that grows on demand has none then."""
    if group.gpus != "auto":
        return group
    chosen = (NODES["learner"][1] if gpus is None else gpus) if group.role == "learner" else 0.0
    return dataclasses.replace(group, gpus=float(chosen))


def node_groups(groups: Sequence[WorkerGroup], nodes: Mapping[str, Node], spare: int = 0) -> list[NodeGroup]:
    """Return one group of nodes for each group of workers, of the node type of the workers' role.

    ``spare``: CPUs of each node that take no workers. Raises ``ConfigError`` if a worker does not fit into its node.
    """
    made = []
    for i, group in enumerate(groups):
        gpus = 0.0 if group.gpus == "auto" else float(group.gpus)
        node = nodes[group.role]
        fits = [math.floor((node.cpus - spare) / group.cpus)] if group.cpus else []
        fits += [math.floor(node.gpus / gpus)] if gpus else []
        fit = min([group.max, *fits])
        if fit < 1:
            raise ConfigError(
                f"workers.{i}: a {group.role} of {group.cpus:g} CPUs and {gpus:g} GPUs doesn't fit into a node of "
                f"{node.cpus} CPUs{f' (of which {spare} for Ray)' if spare else ''} and {node.gpus} GPUs; give "
                f"--node {group.role}=TYPE:CPUS:GPUS"
            )
        same = sum(g.role == group.role for g in groups[:i])
        made.append(NodeGroup(f"{group.role}{f'-{same + 1}' if same else ''}", node, fit, math.ceil(group.max / fit)))
    return made


# Kubernetes -----------------------------------------------------------------------------------------------------------


def _kubernetes(run: _Run) -> tuple[dict[str, str], list[str]]:
    wanted = run.wanted
    name = wanted.image.rpartition("/")[2]
    repository, _, tag = wanted.image.rpartition(":") if ":" in name else (wanted.image, "", "latest")
    if not repository:
        raise ConfigError(
            "--image is missing; expected the image of deploy/Dockerfile in a registry that the cluster reaches, "
            "REGISTRY/metadist:TAG"
        )
    if "://" not in wanted.run_dir:
        raise ConfigError(
            f"--run-dir '{wanted.run_dir}': no pod has a lasting disk; expected a URL, such as s3://bucket/runs/a"
        )
    needs_gpus = any(g.gpus for g in run.groups if g.role == "learner")
    defaults = {role: Node(None, cpus, gpus if needs_gpus else 0) for role, (cpus, gpus) in NODES.items()}
    values = {
        "image": {"repository": repository, "tag": tag},
        "auth": {"secretName": wanted.auth_secret},
        "credentials": {"secretName": wanted.credentials_secret},
        "data": wanted.data,
        "mlflow": {"trackingUri": wanted.mlflow},
        "run": {"id": run.run_id, "dir": wanted.run_dir.rstrip("/"), "config": run.config},
        "workers": [_pods(g) for g in node_groups(run.groups, {**defaults, **wanted.nodes}, SPARE_CPUS)],
    }
    chart = shipped("deploy/helm/metadist")
    source = f"{CHART}/values.yaml"
    files = {"values.yaml": HEADER.format(target="kubernetes", source=source) + _yaml(values)}
    for path in sorted(p for p in chart.rglob("*") if p.is_file()):
        files[f"{CHART}/{path.relative_to(chart).as_posix()}"] = path.read_text(encoding="utf-8")
    release = _name(run.run_id)
    where = ["--namespace", wanted.namespace]
    helm = ["helm", "install", release, f"{run.folder}/{CHART}", "--values", f"{run.folder}/values.yaml", *where]
    return files, [shlex.join(helm), shlex.join(["kubectl", "get", "rayjob", release, *where, "--watch"])]


def _name(run_id: str) -> str:
    """Return the run id as a name in Kubernetes and clouds: at most 40 characters, since KubeRay adds up to 23."""
    return re.sub(r"[^a-z0-9-]+", "-", run_id.lower()).strip("-")[:40].rstrip("-")


def _pods(group: NodeGroup) -> dict[str, Any]:
    node = group.each
    return {
        "name": group.name,
        "minReplicas": 0,
        "maxReplicas": group.most,
        "cpu": node.cpus,
        "memory": f"{node.cpus * MEMORY_PER_CPU}Gi",
        "gpu": node.gpus,
        "nodeSelector": {"node.kubernetes.io/instance-type": node.type} if node.type else {},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}] if node.gpus else [],
    }


# Clouds ---------------------------------------------------------------------------------------------------------------


def _cloud(target: str, run: _Run) -> tuple[dict[str, str], list[str]]:
    cluster = yaml.safe_load(shipped(f"cluster/{target}.yaml").read_text(encoding="utf-8"))
    kinds = _node_types(target, cluster["available_node_types"], run)
    cluster["available_node_types"] = kinds
    cluster["max_workers"] = sum(kind.get("max_workers", 0) for kind in kinds.values())
    cluster["cluster_name"] = _name(run.run_id)
    if run.wanted.image:
        cluster["docker"]["image"] = run.wanted.image
    definition = f"{run.folder}/cluster.yaml"
    header = HEADER.format(target=target, source=f"cluster/{target}.yaml")
    return (
        {"cluster.yaml": header + _yaml(cluster), "config.yaml": run.config},
        [
            shlex.join(["ray", "up", definition]),
            shlex.join(["ray", "dashboard", definition]),
            shlex.join(_submit(run)),
            shlex.join(["ray", "down", definition]),
        ],
    )


def _node_types(target: str, kinds: dict[str, Any], run: _Run) -> dict[str, Any]:
    """Return Ray's node types: the head, and one type for each group of workers."""
    key = "InstanceType" if target == "aws" else "machineType"
    nodes = run.wanted.nodes
    for role in ROLES:  # learners without GPUs need no nodes with GPUs, which cost more
        gpus = max((float(g.gpus) for g in run.groups if g.role == role and g.gpus != "auto"), default=0.0)
        if role not in nodes and not gpus:
            kinds[role] = {**kinds["environment"]}
    resources = {role: kinds[role]["resources"] for role in ROLES}
    known = {role: Node(None, has["CPU"], has.get("GPU", 0)) for role, has in resources.items()}
    made = {"head": kinds["head"]}
    for group, asked in zip(node_groups(run.groups, {**known, **nodes}), run.groups):
        kind, node = kinds[asked.role], group.each
        made[group.name] = {
            **kind,
            "min_workers": 0,
            "max_workers": group.most,
            "resources": {"CPU": node.cpus, **({"GPU": node.gpus} if node.gpus else {})},
            "node_config": {**kind["node_config"], **({key: node.type} if node.type else {})},
        }
    return made


def _submit(run: _Run) -> list[str]:
    words = ["metadist", "submit", f"{run.folder}/config.yaml", "--address", "http://localhost:8265"]
    words += ["--run-dir", run.wanted.run_dir, "--run-id", run.run_id]
    words += ["--data", run.wanted.data] if run.wanted.data else []
    return words + (["--env", f"MLFLOW_TRACKING_URI={run.wanted.mlflow}"] if run.wanted.mlflow else [])


# Slurm ----------------------------------------------------------------------------------------------------------------


def _slurm(run: _Run) -> tuple[dict[str, str], list[str]]:
    """Render a batch script. The nodes of an allocation are equal: each takes its part of every group, and one core for
    Ray and the driver."""
    wanted = run.wanted
    config = f"{run.folder.resolve()}/config.yaml"
    if found := re.search(r"[\"`$\\]", config):
        raise ConfigError(f"--output {run.folder}: the character {found[0]!r} has a meaning in shells; leave it out")
    if wanted.nodes.keys() - {"learner"}:
        raise ConfigError("--node: the nodes of a Slurm job are equal; expected one, such as --node learner=8:2")
    needs = max((float(g.gpus) for g in run.groups if g.gpus != "auto"), default=0.0)
    node = wanted.nodes.get("learner", Node(None, 8, max(1, math.ceil(needs)) if needs else 0))
    nodes, cpus, gpus = _allocation(run.groups, node)
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    script = environment.from_string(shipped("cluster/slurm.sh.j2").read_text(encoding="utf-8")).render(
        job_name=run.run_id,
        nodes=nodes,
        constraint=node.type,
        cpus=cpus,
        gpus=gpus,
        config=config,
        run_dir=wanted.run_dir,
        data=wanted.data,
        mlflow=wanted.mlflow,
    )
    return {"job.sh": script, "config.yaml": run.config}, [shlex.join(["sbatch", f"{run.folder}/job.sh"])]


def _allocation(groups: Sequence[WorkerGroup], node: Node) -> tuple[int, int, int]:
    """Return (nodes, CPUs of each, GPUs of each) for all workers, with the fewest nodes."""
    nodes = 1
    while True:
        share = [(math.ceil(g.max / nodes), g) for g in groups]
        cpus = 1 + math.ceil(sum(n * g.cpus for n, g in share))
        gpus = math.ceil(sum(n * float(g.gpus) for n, g in share))
        if cpus <= node.cpus and gpus <= node.gpus:
            return nodes, cpus, gpus
        if all(n == 1 for n, _ in share):
            raise ConfigError(
                f"workers: one worker of each group takes {cpus} CPUs (one for Ray) and {gpus} GPUs, a node has "
                f"{node.cpus} and {node.gpus}; give --node learner=CPUS:GPUS"
            )
        nodes += 1


def _yaml(document: Any) -> str:
    return yaml.dump(document, Dumper=_Readable, sort_keys=False, allow_unicode=True, width=140)


class _Readable(yaml.SafeDumper):
    """Write texts of several lines as blocks, and repeated values without anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Readable.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None),
)
