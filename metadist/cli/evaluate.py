"""``metadist evaluate`` and ``metadist oracle``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from metadist.cli.terminal import (
    AsJson,
    Overrides,
    Trust,
    Weights,
    Workers,
    clean_errors,
    only_results_on_stdout,
    set_up_logging,
)
from metadist.core.text import show as print  # no call can forget to escape control characters

if TYPE_CHECKING:
    from metadist.experiment.result import Result
    from metadist.experiment.seeds import Group

Compared = Annotated[
    str | None,
    typer.Option(
        "--compare",
        "--beside",
        metavar="NAME,…",
        help="Compare on the same tasks: known methods (gittins,ucb1), baselines (nearest_mean,ridge), or all.",
    ),
]
EvaluationOverrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]…", help="Override keys of tasks and evaluation: tasks.k_shot=5"),
]


def evaluate(
    run_dir: Annotated[str, typer.Argument(help="The folder that train printed: a run, or a group of seeds.")],
    overrides: EvaluationOverrides = None,
    tasks: Annotated[int | None, typer.Option(help="Number of tasks; default: evaluate.test_tasks.", min=2)] = None,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    inner_steps: Annotated[
        int | None, typer.Option(help="Adaptation steps; default: evaluate.inner_steps.", min=0)
    ] = None,
    normalization: Annotated[
        str | None, typer.Option(help="transductive or inductive; default: as in the run.")
    ] = None,
    weights: Weights = None,
    compare: Compared = None,
    record: Annotated[
        bool, typer.Option("--record/--no-record", help="Record the scores in the run directory and in MLflow.")
    ] = True,
    workers: Workers = "0",
    trust: Trust = None,
    as_json: AsJson = False,
) -> None:
    """Evaluate a run's best parameters after 0, 1, … adaptation steps, or by episode in a meta-environment.

    The scores are recorded in RUN_DIR/evaluations and in MLflow, with a row per task. Of a group of seeds every seed is
    judged on the same tasks.
    """
    set_up_logging()
    with clean_errors():
        from metadist.experiment.evaluate import evaluate_group, evaluate_run, is_group
        from metadist.experiment.judging import EvaluationOptions

        options = EvaluationOptions(
            tasks=tasks,
            split=split,
            inner_steps=inner_steps,
            workers=workers,
            normalization=normalization,
            beside=[name.strip() for name in compare.split(",")] if compare else [],
            overrides=overrides or [],
            record=record,
            trust=trust or (),
            weights=weights,
        )
        with only_results_on_stdout():
            result = evaluate_group(run_dir, options) if is_group(run_dir) else evaluate_run(run_dir, options)
        _show(result)
        if as_json:
            print(json.dumps(result.as_dict()))


def _show(result: Result | Group) -> None:
    from metadist.cli.display import show_evaluation, show_group
    from metadist.experiment.seeds import Group

    for single in result.results if isinstance(result, Group) else [result]:
        show_evaluation(single.evaluations[0])
        if single.evaluation_dir:
            print(f"recorded        {single.evaluation_dir}")
    if isinstance(result, Group):
        show_group(result)


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
