"""``metadist list``, ``metadist export`` and ``metadist ui``."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Annotated, Any

import typer

from metadist.cli.terminal import (
    clean_errors,
    say,
    set_up_logging,
)


def list_(what: Annotated[str, typer.Argument(help="algorithms, tasks, environments, models or configs.")]) -> None:
    """What there is to choose from, one per line."""
    with clean_errors():
        from metadist.core.errors import ConfigError, nearest

        def configs() -> dict[str, str]:
            from metadist.config.document import shipped_configs

            return {name: path.read_text().splitlines()[0].lstrip("# ") for name, path in shipped_configs().items()}

        def described(classes: Callable[[], dict[str, type]]) -> Callable[[], dict[str, str]]:
            return lambda: {
                name: (cls.__doc__ or "").strip().splitlines()[0] for name, cls in sorted(classes().items())
            }

        def algorithms() -> Any:
            from metadist.algorithms import ALGORITHMS

            return ALGORITHMS

        def tasks() -> Any:
            from metadist.tasks import TASKS

            return TASKS

        def models() -> Any:
            from metadist.models import MODELS

            return MODELS

        def environments() -> Any:
            from metadist.environments import ENVIRONMENTS

            return ENVIRONMENTS

        kinds = {
            "algorithms": described(algorithms),
            "tasks": described(tasks),
            "environments": described(environments),
            "models": described(models),
            "configs": configs,
        }
        if what not in kinds:
            raise ConfigError(f"list: '{what}' is not one of {', '.join(kinds)}{nearest(what, kinds)}")
        entries = kinds[what]()
        width = max(map(len, entries))
        for name, description in sorted(entries.items()):
            print(f"{name:<{width}}  {description}")


def export(
    run_dir: Annotated[str, typer.Argument(help="The folder that train printed.")],
    path: Annotated[str, typer.Argument(help="The safetensors file to write.")],
) -> None:
    """Write a run's best model parameters, under the model's own names."""
    set_up_logging()
    with clean_errors():
        from metadist.experiment.load import load_run

        load_run(run_dir).export(path)
        print(path)


def ui(port: Annotated[int, typer.Option(help="Port on 127.0.0.1.", min=1, max=65535)] = 5000) -> None:
    """The MLflow UI on the store that runs are recorded in, after delivering what earlier runs could not."""
    set_up_logging()
    with clean_errors():
        from pathlib import Path

        from metadist.storage.run_directory import runs_root
        from metadist.tracking import replay, undelivered
        from metadist.tracking.ui import serve_ui

        for spool in sorted(Path(runs_root()).glob("**/tracking/spool.jsonl")):
            if undelivered(spool.parent):
                say(f"delivering what {spool.parent.parent} could not: {replay(spool.parent)} records still wait")

        serve_ui(os.environ.get("MLFLOW_TRACKING_URI"), port, runs_root())
