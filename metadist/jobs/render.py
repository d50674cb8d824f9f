"""The files of ``deploy/`` and ``cluster/``, filled in for one run: its worker groups become groups of nodes."""

from __future__ import annotations

import dataclasses
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from metadist.config.build import build
from metadist.config.groups import ROLES, WorkerGroup
from metadist.core.errors import ConfigError
from metadist.jobs.charts import Chart
from metadist.storage.run_directory import new_run_id

TARGETS = ("kubernetes", "slurm", "aws", "gcp")
#: seconds for an autoscaler to start nodes, images and drivers included
PATIENCE = 1800.0
#: nodes where a target names none of its own
NODES = {"learner": (4, 1), "environment": (8, 0)}
#: beside the workers of a node of Kubernetes, for Ray itself
SPARE_CPUS, MEMORY_PER_CPU = 1, 4
HEADER = "# Made by `metadist render {target}` from {source}, which explains every line.\n"


@dataclass(frozen=True)
class Node:
    """A kind of node: its type's name (None: whatever there is), its cores and its GPUs."""

    type: str | None
    cpus: int
    gpus: int


@dataclass(frozen=True)
class NodeGroup:
    """Nodes for one group of workers: ``each`` hold ``fit`` of them, ``most`` hold them all."""

    name: str
    each: Node
    fit: int
    most: int


@dataclass(frozen=True)
class Rendering:
    """What is asked for beside the config."""

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


def render(target: str, document: dict[str, Any], wanted: Rendering, folder: Path) -> tuple[dict[str, str], list[str]]:
    """(file → text, the commands that come next) of ``target``, where the files will lie in ``folder``."""
    config = build(document)
    document = config.document
    run_id = wanted.run_id or new_run_id(config.name)
    for key, value in (
        ("--run-id", run_id),
        ("--run-dir", wanted.run_dir),
        ("--data", wanted.data),
        ("--image", wanted.image),
        ("--mlflow", wanted.mlflow),
    ):
        if re.search(r"[\s\"'`$\\;&|<>]", value):
            raise ConfigError(f"{key} '{value}': has a character that shells take for another")
    groups = [g for g in config.workers if g.max]
    if not groups:
        raise ConfigError("workers: all compute in the driver's process; a cluster needs workers, such as --workers 2")
    groups = [_decided(g, wanted.gpus) for g in groups]
    document["workers"] = [dataclasses.asdict(g) for g in groups]
    if target != "slurm":
        document["engine"] = {
            **document["engine"],
            "worker_patience": max(PATIENCE, document["engine"]["worker_patience"]),
        }
    text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True)
    if target == "kubernetes":
        return _kubernetes(text, groups, wanted, run_id, folder)
    if target == "slurm":
        return _slurm(text, groups, wanted, run_id, folder)
    return _cloud(target, text, groups, wanted, run_id, folder)


def shipped(name: str) -> Path:
    """A file or folder of ``cluster/`` or ``deploy/``: in the wheel inside of the package, in a checkout beside it."""
    here = Path(__file__).parents[1]
    return next((p for p in (here / name, here.parent / name) if p.exists()), here / name)


def _decided(group: WorkerGroup, gpus: float | None) -> WorkerGroup:
    """``auto`` shares out the GPUs that a cluster has when a run begins: of a cluster that grows on demand none, so here it's a number."""
    if group.gpus != "auto":
        return group
    chosen = (NODES["learner"][1] if gpus is None else gpus) if group.role == "learner" else 0.0
    return dataclasses.replace(group, gpus=float(chosen))


def node_groups(groups: Sequence[WorkerGroup], nodes: Mapping[str, Node], spare: int = 0) -> list[NodeGroup]:
    """For each group nodes of its role's kind; a group without GPUs takes none that has some unless it was asked to."""
    made = []
    for i, group in enumerate(groups):
        gpus = 0.0 if group.gpus == "auto" else float(group.gpus)
        node = nodes[group.role]
        fits = [math.floor((node.cpus - spare) / group.cpus)] if group.cpus else []
        fits += [math.floor(node.gpus / gpus)] if gpus else []
        fit = min([group.max, *fits])
        if fit < 1:
            raise ConfigError(
                f"workers.{i}: a {group.role} of {group.cpus:g} CPUs and {gpus:g} GPUs doesn't fit into a node of {node.cpus} CPUs"
                f"{f' (of which {spare} for Ray)' if spare else ''} and {node.gpus} GPUs; give --node {group.role}=TYPE:CPUS:GPUS"
            )
        same = sum(g.role == group.role for g in groups[:i])
        made.append(NodeGroup(f"{group.role}{f'-{same + 1}' if same else ''}", node, fit, math.ceil(group.max / fit)))
    return made


# Kubernetes -----------------------------------------------------------------------------------------------------------


def _kubernetes(
    text: str, groups: Sequence[WorkerGroup], wanted: Rendering, run_id: str, folder: Path
) -> tuple[dict[str, str], list[str]]:
    needs = any(g.gpus for g in groups if g.role == "learner")
    defaults = {role: Node(None, cpus, gpus if needs else 0) for role, (cpus, gpus) in NODES.items()}
    repository, _, tag = (
        wanted.image.rpartition(":") if ":" in wanted.image.rpartition("/")[2] else (wanted.image, "", "latest")
    )
    if not repository:
        raise ConfigError(
            "--image is missing; expected the image of deploy/Dockerfile in a registry that the cluster reaches, REGISTRY/metadist:TAG"
        )
    if "://" not in wanted.run_dir:
        raise ConfigError(
            f"--run-dir '{wanted.run_dir}': no pod has a lasting disk; expected a URL, such as s3://bucket/runs/a"
        )
    values = {
        "image": {"repository": repository, "tag": tag},
        "auth": {"secretName": wanted.auth_secret},
        "credentials": {"secretName": wanted.credentials_secret},
        "data": wanted.data,
        "mlflow": {"trackingUri": wanted.mlflow},
        "run": {"id": run_id, "dir": wanted.run_dir.rstrip("/"), "config": text},
        "workers": [_pods(g) for g in node_groups(groups, {**defaults, **wanted.nodes}, SPARE_CPUS)],
    }
    release = (
        re.sub(r"[^a-z0-9-]+", "-", run_id.lower()).strip("-")[:40].rstrip("-")
    )  # KubeRay appends to it, and 63 is the limit
    rendered = Chart(shipped("deploy/helm/metadist")).render(values, release=release, namespace=wanted.namespace)
    manifests = HEADER.format(target="kubernetes", source="deploy/helm/metadist") + "".join(
        f"---\n{manifest}" for manifest in rendered.values()
    )
    return (
        {
            "manifests.yaml": manifests,
            "values.yaml": HEADER.format(target="kubernetes", source="deploy/helm/metadist/values.yaml")
            + _yaml(values),
        },
        [
            f"kubectl apply -f {folder}/manifests.yaml",
            f"kubectl get rayjob {release} --namespace {wanted.namespace} --watch",
        ],
    )


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


def _cloud(
    target: str, text: str, groups: Sequence[WorkerGroup], wanted: Rendering, run_id: str, folder: Path
) -> tuple[dict[str, str], list[str]]:
    cluster = yaml.safe_load(shipped(f"cluster/{target}.yaml").read_text(encoding="utf-8"))
    key = "InstanceType" if target == "aws" else "machineType"
    kinds = cluster["available_node_types"]
    for role in ROLES:  # learners without GPUs need none of their dear nodes
        gpus = max((float(g.gpus) for g in groups if g.role == role and g.gpus != "auto"), default=0.0)
        if role not in wanted.nodes and not gpus:
            kinds[role] = {**kinds["environment"]}
    known = {
        role: Node(None, kinds[role]["resources"]["CPU"], kinds[role]["resources"].get("GPU", 0)) for role in ROLES
    }
    made = {"head": kinds["head"]}
    for group, asked in zip(node_groups(groups, {**known, **wanted.nodes}), groups):
        kind = dict(kinds[asked.role])
        resources = {"CPU": group.each.cpus, **({"GPU": group.each.gpus} if group.each.gpus else {})}
        config = {**kind["node_config"], **({key: group.each.type} if group.each.type else {})}
        made[group.name] = {
            **kind,
            "min_workers": 0,
            "max_workers": group.most,
            "resources": resources,
            "node_config": config,
        }
    cluster["available_node_types"] = made
    cluster["max_workers"] = sum(kind.get("max_workers", 0) for kind in made.values())
    cluster["cluster_name"] = re.sub(r"[^a-z0-9-]+", "-", run_id.lower())[:40].strip("-")
    if wanted.image:
        cluster["docker"]["image"] = wanted.image
    submit = [
        "metadist",
        "submit",
        f"{folder}/config.yaml",
        "--address",
        "http://localhost:8265",
        "--run-dir",
        wanted.run_dir,
        "--run-id",
        run_id,
    ]
    submit += (["--data", wanted.data] if wanted.data else []) + (
        ["--env", f"MLFLOW_TRACKING_URI={wanted.mlflow}"] if wanted.mlflow else []
    )
    return (
        {
            "cluster.yaml": HEADER.format(target=target, source=f"cluster/{target}.yaml") + _yaml(cluster),
            "config.yaml": text,
        },
        [
            f"ray up {folder}/cluster.yaml",
            f"ray dashboard {folder}/cluster.yaml",
            shlex.join(submit),
            f"ray down {folder}/cluster.yaml",
        ],
    )


# Slurm ----------------------------------------------------------------------------------------------------------------


def _slurm(
    text: str, groups: Sequence[WorkerGroup], wanted: Rendering, run_id: str, folder: Path
) -> tuple[dict[str, str], list[str]]:
    """Nodes of an allocation are alike: each takes its part of every group, and a core for Ray and the driver."""
    if wanted.nodes.keys() - {"learner"}:
        raise ConfigError("--node: the nodes of a Slurm job are alike; expected one, such as --node learner=8:2")
    needs = max((float(g.gpus) for g in groups if g.gpus != "auto"), default=0.0)
    node = wanted.nodes.get("learner", Node(None, 8, max(1, math.ceil(needs)) if needs else 0))
    nodes = 1
    while True:
        share = [(math.ceil(g.max / nodes), g) for g in groups]
        cpus, gpus = (
            1 + math.ceil(sum(n * g.cpus for n, g in share)),
            math.ceil(sum(n * float(g.gpus) for n, g in share)),
        )
        if cpus <= node.cpus and gpus <= node.gpus:
            break
        if all(n == 1 for n, _ in share):
            raise ConfigError(
                f"workers: one of each group takes {cpus} CPUs (one for Ray) and {gpus} GPUs, a node has {node.cpus} and {node.gpus}; give --node learner=CPUS:GPUS"
            )
        nodes += 1
    script = shipped("cluster/slurm.sh").read_text(encoding="utf-8")
    lines = {
        r"#SBATCH --job-name=.*": f"#SBATCH --job-name={run_id}",
        r"#SBATCH --nodes=.*": f"#SBATCH --nodes={nodes}"
        + (f"\n#SBATCH --constraint={node.type}" if node.type else ""),
        r"#SBATCH --cpus-per-task=.*": f"#SBATCH --cpus-per-task={cpus}",
        r"#SBATCH --gpus-per-node=.*": f"#SBATCH --gpus-per-node={gpus}",
        r'CONFIG="\$\{CONFIG:\?.*': f'CONFIG="${{CONFIG:-{folder.resolve()}/config.yaml}}"',
        r'RUN_DIR="\$\{RUN_DIR:\?.*': f'RUN_DIR="${{RUN_DIR:-{wanted.run_dir}}}"'
        + "".join(
            f'\nexport {n}="${{{n}:-{v}}}"'
            for n, v in (("METADIST_DATA", wanted.data), ("MLFLOW_TRACKING_URI", wanted.mlflow))
            if v
        ),
    }
    for pattern, line in lines.items():
        script, found = re.subn(rf"^{pattern}$", lambda _, line=line: line, script, flags=re.MULTILINE)  # type: ignore[misc]
        assert found == 1, pattern
    return {"job.sh": script, "config.yaml": text}, [f"sbatch {folder}/job.sh"]


def _yaml(document: Any) -> str:
    return yaml.dump(document, Dumper=_Readable, sort_keys=False, allow_unicode=True, width=140)


class _Readable(yaml.SafeDumper):
    """Texts of several lines as such, and no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Readable.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None),
)
