"""``metadist render``: write the files that run a config on a cluster."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from metadist.cli.terminal import AsJson, Overrides, Trust, Workers, clean_errors, say, set_up_logging
from metadist.core.text import show as print  # no call can forget to escape control characters

RunDir = Annotated[str, typer.Option(help="The run's directory: an fsspec URL, or a folder that all nodes have.")]
RunId = Annotated[str | None, typer.Option(help="The run's id; default: name, time and four random digits.")]
Data = Annotated[str, typer.Option(help="METADIST_DATA on the nodes: URL or folder.")]
Image = Annotated[str, typer.Option(help="The image of deploy/Dockerfile: REGISTRY/metadist:TAG.")]
MLflow = Annotated[str, typer.Option(metavar="URI", help="MLFLOW_TRACKING_URI on the nodes.")]
Gpus = Annotated[float | None, typer.Option(help="GPUs of a learner where the config says auto; default: 1.", min=0)]
NodesOfRoles = Annotated[
    list[str] | None, typer.Option(metavar="ROLE=[TYPE:]CPUS[:GPUS]", help="A role's nodes: learner=g5.12xlarge:48:4.")
]
Namespace = Annotated[str, typer.Option(help="Kubernetes: the namespace.")]
AuthSecret = Annotated[
    str, typer.Option(help="Kubernetes: a Secret with Ray's token under auth_token; default: KubeRay creates one.")
]
CredentialsSecret = Annotated[str, typer.Option(help="Kubernetes: a Secret whose keys become environment variables.")]
Output = Annotated[Path | None, typer.Option(help="Folder for the files; default: rendered/RUN.")]


def render(
    target: Annotated[str, typer.Argument(help="kubernetes, slurm, aws or gcp.")],
    config: Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped config.")],
    overrides: Overrides = None,
    run_dir: RunDir = "",
    run_id: RunId = None,
    workers: Workers = None,
    data: Data = "",
    image: Image = "",
    mlflow: MLflow = "",
    gpus: Gpus = None,
    node: NodesOfRoles = None,
    namespace: Namespace = "default",
    auth_secret: AuthSecret = "",
    credentials_secret: CredentialsSecret = "",
    output: Output = None,
    trust: Trust = None,
    as_json: AsJson = False,
) -> None:
    """Write the files that run a config on a cluster: its worker groups become groups of nodes."""
    set_up_logging()
    with clean_errors():
        from metadist.config.build import build
        from metadist.config.document import requested
        from metadist.core.errors import ConfigError, one_of
        from metadist.jobs import render as rendering
        from metadist.storage.run_directory import new_run_id

        one_of("render", target, rendering.TARGETS)
        if not run_dir:
            raise ConfigError(
                "--run-dir is missing; expected the place of checkpoints and results: a URL such as "
                "s3://bucket/runs/a, or a folder that all nodes have"
            )
        document = requested(config, overrides, workers, trust)
        run_id = run_id or new_run_id(build(document).name)
        folder = output or Path("rendered") / run_id
        wanted = rendering.Rendering(
            run_dir, run_id, data, image, mlflow, _nodes(node or []), gpus, namespace, auth_secret, credentials_secret
        )
        files, commands = rendering.render(target, document, wanted, folder)
        _write(folder, files)
        for name in files:
            print(folder / name)
        say("next:" + "".join(f"\n  {command}" for command in commands))
        if as_json:
            print(json.dumps({"run_id": run_id, "files": [str(folder / name) for name in files], "next": commands}))


def _write(folder: Path, files: dict[str, str]) -> None:
    from metadist.core.errors import ConfigError

    try:
        for name, text in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--output {folder}: {error}") from error


def _nodes(given: list[str]) -> dict[str, Any]:
    from metadist.config.groups import ROLES
    from metadist.core.errors import ConfigError
    from metadist.jobs.render import Node

    nodes = {}
    for text in given:
        role, _, kind = text.partition("=")
        parts = kind.split(":")
        name = parts.pop(0) if not parts[0].isdecimal() else None
        if role not in ROLES or len(parts) not in (1, 2) or not all(p.isdecimal() for p in parts) or int(parts[0]) < 1:
            raise ConfigError(
                f"--node {text}: expected ROLE=[TYPE:]CPUS[:GPUS] with a role of {', '.join(ROLES)}, such as "
                "learner=g5.12xlarge:48:4"
            )
        nodes[role] = Node(name or None, int(parts[0]), int(parts[1]) if len(parts) == 2 else 0)
    return nodes
