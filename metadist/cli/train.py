"""``metadist train``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Annotated, Any

import typer

from metadist.cli.terminal import (
    AsJson,
    Overrides,
    Trust,
    Workers,
    clean_errors,
    numbers,
    only_results_on_stdout,
    say,
    set_up_logging,
)
from metadist.core.text import show as print  # no call can forget to escape control characters

if TYPE_CHECKING:
    from metadist.config.experiment import Experiment


def train(
    config: Annotated[
        str, typer.Argument(help="A YAML file, or the name of a shipped config (metadist list configs).")
    ],
    overrides: Overrides = None,
    workers: Workers = None,
    outside: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT", help="Accept remote workers at this address (metadist worker --connect HOST:PORT)."
        ),
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(help="Several seeds, such as 0,1,2: child runs under one parent.")
    ] = None,
    run_dir: Annotated[
        str | None, typer.Option(help="Folder or fsspec URL of the run; default: a new folder under METADIST_RUNS.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the newest valid checkpoint.")] = False,
    run_id: Annotated[
        str | None, typer.Option(help="The id of a new run; default: name, time and random digits.", hidden=True)
    ] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the config with every default and stop.")
    ] = False,
    trust: Trust = None,
    as_json: AsJson = False,
) -> None:
    """Meta-train, with validation, checkpoints and tracking; test once at the end."""
    set_up_logging()
    with clean_errors():
        from metadist.config.build import build
        from metadist.config.document import requested, set_outside

        document = requested(config, overrides, workers, trust)
        if outside is not None:
            document = set_outside(document, outside)
        if print_config:
            import yaml

            print(yaml.safe_dump(build(document).document, sort_keys=False, allow_unicode=True), end="")
            return
        if seeds is not None:
            _train_seeds(document, numbers("--seeds", seeds), run_dir, resume, as_json, trust)
        else:
            _train_one(document, run_dir, resume, as_json, run_id, trust)


def _train_one(
    document: dict[str, Any],
    run_dir: str | None,
    resume: bool,
    as_json: bool,
    run_id: str | None,
    trust: list[str] | None,
) -> None:
    from metadist.cli.display import show_result
    from metadist.config.build import build
    from metadist.experiment.interruption import StopSignals
    from metadist.experiment.live import live
    from metadist.experiment.request import RunRequest
    from metadist.experiment.train import train as run_training
    from metadist.training.observers import Observers

    experiment = build(document)
    with only_results_on_stdout(), StopSignals(say) as stop, live(experiment) as display:
        request = RunRequest(run_dir=run_dir, resume=resume, run_id=run_id, trust=trust or (), stop=stop)
        result = run_training(experiment, request, Observers(display, stop))
    if result.interrupted:
        say(
            f"stopped at meta-step {result.outcome.progress.meta_step}; continue with: metadist train … "
            f"--run-dir {result.run_dir} --resume"
        )
    show_result(result)
    if as_json:
        print(json.dumps(result.as_dict()))
    if result.interrupted:
        raise typer.Exit(130)


def _train_seeds(
    document: dict[str, Any],
    seeds: list[int],
    run_dir: str | None,
    resume: bool,
    as_json: bool,
    trust: list[str] | None,
) -> None:
    from metadist.cli.display import show_group, show_result
    from metadist.experiment.interruption import StopSignals
    from metadist.experiment.live import live
    from metadist.experiment.request import RunRequest
    from metadist.experiment.seeds import train_seeds
    from metadist.training.observers import Observer, Observers

    stdout = sys.stdout

    def show(result: Any) -> None:
        with redirect_stdout(stdout):
            show_result(result)

    with only_results_on_stdout(), StopSignals(say) as stop:

        @contextmanager
        def displayed(experiment: Experiment) -> Iterator[Observer]:
            with live(experiment) as display:
                yield Observers(display, stop)

        request = RunRequest(run_dir=run_dir, resume=resume, trust=trust or (), stop=stop)
        group = train_seeds(document, seeds, request, displayed, show)
    show_group(group)
    if as_json:
        print(json.dumps(group.as_dict()))
    if group.interrupted:
        say(
            f"stopped; continue with: metadist train … --seeds {','.join(map(str, seeds))} "
            f"--run-dir {group.run_dir} --resume"
        )
        raise typer.Exit(130)
