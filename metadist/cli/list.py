"""``metadist list``, ``metadist export`` and ``metadist ui``."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from metadist.cli.terminal import (
    Trust,
    Weights,
    clean_errors,
    only_results_on_stdout,
    say,
    set_up_logging,
)
from metadist.core.text import show as print  # no call can forget to escape control characters

KINDS = ("algorithms", "tasks", "environments", "models", "trackers", "configs", "keys")


def list_(
    what: Annotated[str | None, typer.Argument(help=f"One of {', '.join(KINDS)}; default: all but keys.")] = None,
) -> None:
    """List the names that a config can use, with descriptions; for a plug-in also its package.

    ``keys`` prints a reference of every key of a config, as Markdown.
    """
    with clean_errors():
        from metadist.core.errors import one_of

        if what == "keys":
            from metadist.config.reference import reference

            print(reference(), end="")
            return
        if what is not None:
            one_of("list", what, KINDS)
        for kind in KINDS[:-1] if what is None else (what,):
            if what is None:
                print(f"{kind}:" if kind == KINDS[0] else f"\n{kind}:")
            _print(kind)


def _print(kind: str) -> None:
    with only_results_on_stdout():  # a plug-in may print while it is imported
        entries, problems = (_configs(), list[str]()) if kind == "configs" else _components(kind)
    width = max(map(len, entries))
    for name, description in sorted(entries.items()):
        print(f"{name:<{width}}  {description}")
    for problem in problems:
        say(f"warning: {problem}")


def _configs() -> dict[str, str]:
    from metadist.config.document import shipped_configs

    return {name: path.read_text().splitlines()[0].lstrip("# ") for name, path in shipped_configs().items()}


def _components(plural: str) -> tuple[dict[str, str], list[str]]:
    """Return name → description, and one line for each unusable plug-in."""
    from metadist.config.plugins import Kind, described, plugins
    from metadist.core.errors import ConfigError

    kind: Kind[object]
    if plural == "trackers":
        from metadist.tracking import TRACKER

        kind = TRACKER
    else:
        from metadist.config.catalog import ALGORITHM, ENVIRONMENT, MODEL, TASK_FAMILY

        kind = next(k for k in (ALGORITHM, TASK_FAMILY, ENVIRONMENT, MODEL) if k.plural == plural)
    entries = {name: own if isinstance(own, str) else described(own) for name, own in kind.own.items()}
    found = plugins(kind)
    problems = found.problems
    for plugin in found.usable.values():
        try:
            entries[plugin.name] = f"{described(plugin.load(kind))} ({plugin.distribution})"
        except ConfigError as error:
            problems.append(str(error))
    return entries, problems


def export(
    run_dir: Annotated[str, typer.Argument(help="The folder that train printed.")],
    path: Annotated[str, typer.Argument(help="The safetensors file to write.")],
    weights: Weights = None,
    trust: Trust = None,
) -> None:
    """Write a run's best model parameters to a file, under the model's own names."""
    set_up_logging()
    with clean_errors():
        from metadist.experiment.load import load_run

        load_run(run_dir, trust=trust or ()).export(path, weights)
        print(path)


def ui(port: Annotated[int, typer.Option(help="Port on 127.0.0.1.", min=1, max=65535)] = 5000) -> None:
    """Deliver the waiting records of earlier runs, and serve the MLflow UI on the store of the runs."""
    set_up_logging()
    with clean_errors():
        from pathlib import Path

        from metadist.storage.run_directory import runs_root
        from metadist.tracking import replay, undelivered
        from metadist.tracking.ui import serve_ui

        for spool in sorted(Path(runs_root()).glob("**/tracking/spool.jsonl")):
            if undelivered(spool.parent):
                say(f"delivered records of {spool.parent.parent}; {replay(spool.parent)} records still wait")

        serve_ui(os.environ.get("MLFLOW_TRACKING_URI"), port, runs_root())
