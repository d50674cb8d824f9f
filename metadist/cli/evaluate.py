"""``metadist evaluate`` and ``metadist oracle``."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from metadist.cli.terminal import (
    AsJson,
    Overrides,
    Trust,
    Workers,
    clean_errors,
    only_results_on_stdout,
    set_up_logging,
)
from metadist.core.text import show as print  # no call can forget to escape control characters


def evaluate(
    run_dir: Annotated[str, typer.Argument(help="The folder that train printed.")],
    tasks: Annotated[int | None, typer.Option(help="Number of tasks; default: evaluate.test_tasks.", min=2)] = None,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    inner_steps: Annotated[
        int | None, typer.Option(help="Adaptation steps; default: evaluate.inner_steps.", min=0)
    ] = None,
    normalization: Annotated[
        str | None, typer.Option(help="transductive or inductive; default: as in the run.")
    ] = None,
    beside: Annotated[
        str | None,
        typer.Option(
            "--compare",
            "--beside",
            metavar="NAME,…",
            help="Compare with known methods on the same trials of a meta-environment: gittins,ucb1, or all.",
        ),
    ] = None,
    workers: Workers = "0",
    trust: Trust = None,
    as_json: AsJson = False,
) -> None:
    """Evaluate a run's best parameters after 0, 1, … adaptation steps, or by episode in a meta-environment."""
    set_up_logging()
    with clean_errors():
        from metadist.cli.display import show_evaluation
        from metadist.core.errors import ConfigError, nearest
        from metadist.experiment.evaluate import EvaluationOptions, evaluate_run

        for option, value, allowed in (
            ("--split", split, ("train", "validation", "test")),
            ("--normalization", normalization, ("transductive", "inductive")),
        ):
            if value is not None and value not in allowed:
                raise ConfigError(f"{option}: '{value}' is not one of {', '.join(allowed)}{nearest(value, allowed)}")
        with only_results_on_stdout():
            methods = [name.strip() for name in beside.split(",")] if beside else []
            options = EvaluationOptions(tasks, split, inner_steps, workers, normalization, methods, trust or ())
            result = evaluate_run(run_dir, options)
        show_evaluation(result.evaluations[0])
        if as_json:
            print(json.dumps(result.as_dict()))


def oracle(
    environment: Annotated[str, typer.Argument(help="A meta-environment's name, or a config that has one.")],
    overrides: Overrides = None,
    methods: Annotated[
        str, typer.Option(metavar="NAME,…", help="The methods; all means every method that suits the environment.")
    ] = "all",
    trials: Annotated[int, typer.Option(help="Trials, the same for every method.", min=2)] = 10000,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    seed: Annotated[int, typer.Option(help="The seed of the tasks.", min=0)] = 0,
    as_json: AsJson = False,
) -> None:
    """Compute the returns of oracles and classical methods in a meta-environment, on the same trials."""
    set_up_logging()
    with clean_errors():
        from metadist.cli.display import show_comparison
        from metadist.experiment.oracle_comparison import oracles

        with only_results_on_stdout():
            report = oracles(
                environment,
                overrides or [],
                [name.strip() for name in methods.split(",")],
                trials=trials,
                split=split,
                seed=seed,
            )
        show_comparison(report)
        if as_json:
            print(json.dumps(report))
