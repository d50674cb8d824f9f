"""Print results to stdout."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from metadist.config.experiment import Experiment
from metadist.core.text import show as print  # no call can forget to escape control characters
from metadist.engine.plan import size
from metadist.experiment.console import PlainConsole
from metadist.experiment.result import Result
from metadist.experiment.seeds import Group
from metadist.jobs import links as run_page
from metadist.learners.evaluation import Evaluation, TrialEvaluation
from metadist.rl.algorithm import EPISODES_SHOWN

#: The query MSE of MAML on sinusoids, K = 10, α = .01, after 70,000 meta-steps, from an independent re-run of the
#: reference code.
PUBLISHED_SINUSOID = {0: 3.01, 1: 0.351, 5: 0.123, 10: 0.100}


def show_result(result: Result) -> None:
    """Print the scores and the facts of a run."""
    for evaluation in result.evaluations:
        show_evaluation(evaluation, published=_published(result.experiment))
    outcome = result.outcome
    print(f"meta-steps      {outcome.progress.meta_step}" + (f" ({outcome.stopped})" if outcome.stopped else ""))
    print(f"best at         {outcome.best_step}")
    print(f"tasks/s         {outcome.tasks_per_second:.1f}")
    print(f"parameters      sha256 {result.params_sha256}")
    if result.averaged_sha256:
        print(f"averages        sha256 {result.averaged_sha256} (scores, export and service are of the averages)")
    print(f"run             {result.run_dir}")
    if sum(result.retried.values()):
        print(f"shards retried  {', '.join(f'{n} {cause}' for cause, n in result.retried.items())}")
    if url := run_page.job_url():
        print(f"Ray job         {url}")
    if result.tracking_url:
        print(f"MLflow          {result.tracking_url}")
    if result.undelivered:
        print(
            f"MLflow          {result.undelivered} records wait in {result.run_dir} for the server; "
            "metadist ui delivers them"
        )


def _shown_steps(last: int) -> list[int]:
    """Return the steps from 0 to ``last`` that a table shows: all, or of a long training a few, ever further apart."""
    marks = [m * 10**power for power in range(len(str(last))) for m in (1, 2, 5)]
    return list(range(last + 1)) if last <= 30 else [0, *(m for m in marks if m < last), last]


def show_evaluation(evaluation: Evaluation, published: Mapping[int, float] | None = None) -> None:
    """Print a table of the scores after each number of adaptation steps, and the protocol of the scores."""
    if isinstance(evaluation, TrialEvaluation):
        _show_trials(evaluation)
        return
    print(_title(evaluation, "tasks"))
    table = Table()
    for heading in ("adaptation steps", "mean", "95 % CI", "median", *(("published",) if published else ())):
        table.add_column(heading, justify="right")
    for step in _shown_steps(len(evaluation.mean) - 1):
        row = [
            str(step),
            f"{evaluation.mean[step]:.4f}",
            f"± {evaluation.ci95[step]:.4f}",
            f"{evaluation.median[step]:.4f}",
        ]
        if published:
            row.append(f"{published[step]:.3f}" if step in published else "")
        table.add_row(*row)
    PlainConsole(file=sys.stdout, width=100, highlight=False).print(table)
    _show_task_metrics(evaluation)
    print(
        f"divergence rate {evaluation.divergence_rate:.4f} (query loss higher after {len(evaluation.mean) - 1} "
        f"adaptation steps than before: {evaluation.loss_rose} tasks)"
    )
    if evaluation.ci95_tasks is not None:
        alone = evaluation.ci95_tasks[-1]
        print(f"95 % CI         {evaluation.protocol['interval']}; with all tasks taken as independent ± {alone:.4f}")
    if evaluation.beside:
        _show_methods(
            f"the same {evaluation.tasks} tasks", evaluation.beside, "learner is better by", evaluation.metric
        )
    print("protocol        " + ", ".join(f"{k}={v}" for k, v in evaluation.protocol.items() if v is not None))
    if published:
        print("published       K=10, α=.01 after 70,000 meta-steps: an independent re-run of the reference code")


def _title(evaluation: Evaluation, what: str) -> str:
    note = f" ({evaluation.left_out_note})" if evaluation.left_out else ""
    # Not the title of a table, which is broken to the table's width.
    return f"{evaluation.split}: {evaluation.metric} on {evaluation.drawn} {what}{note}"


def _show_task_metrics(evaluation: Evaluation) -> None:
    """Print the scores by metrics of whole tasks and by number of classes, and the sums of tables."""
    last = len(evaluation.mean) - 1
    if evaluation.task_metrics:
        table = Table(title=f"whole tasks, after {last} adaptation steps", title_justify="left")
        table.add_column("metric")
        for heading in ("before", "mean", "95 % CI", "median", "left out"):
            table.add_column(heading, justify="right")
        for name, score in evaluation.task_metrics.items():
            numbers = (f"{score.mean[0]:.4f}", f"{score.mean[-1]:.4f}", f"± {score.ci95[-1]:.4f}")
            left_out = f"{score.left_out} of {evaluation.drawn}"
            table.add_row(escape(name), *numbers, f"{score.median[-1]:.4f}", left_out)
        PlainConsole(file=sys.stdout, width=100, highlight=False).print(table)
    if evaluation.by_ways:
        ways = Table(title=f"by number of classes, after {last} adaptation steps", title_justify="left")
        for heading in ("classes", "tasks", "chance", "mean"):
            ways.add_column(heading, justify="right")
        for by in evaluation.by_ways:
            ways.add_row(f"{by['ways']:.0f}", f"{by['tasks']:.0f}", f"{by['chance']:.4f}", f"{by['mean']:.4f}")
        PlainConsole(file=sys.stdout, width=100, highlight=False).print(ways)
    for name, counts in evaluation.tables.items():
        print(f"{name}: rows are classes, columns predicted classes, after {last} adaptation steps")
        for row in counts:
            print(" ".join(f"{count:7.0f}" for count in row))


def _show_trials(evaluation: TrialEvaluation) -> None:
    """Print the returns by episode, which show adaptation; then the returns of whole trials."""
    print(f"{_title(evaluation, 'trials')}, {evaluation.policy}")
    table = Table()
    first = 0 if evaluation.by_gradient_steps else 1
    gained = evaluation.gained
    for heading in (
        "episode" if first else "gradient steps",
        "mean",
        "95 % CI",
        "median",
        *(("gained, paired", "SE") if gained else ()),
    ):
        table.add_column(heading, justify="right")
    last = len(evaluation.mean)
    for episode in range(1, last + 1):
        if last <= 10 or episode in EPISODES_SHOWN or episode == last:
            k = episode - 1
            row = [
                str(k + first),
                f"{evaluation.mean[k]:.4f}",
                f"± {evaluation.ci95[k]:.4f}",
                f"{evaluation.median[k]:.4f}",
            ]
            table.add_row(*row, *((f"{gained[k][0]:+.4f}", f"{gained[k][1]:.4f}") if gained else ()))
    PlainConsole(file=sys.stdout, width=100, highlight=False).print(table)
    what = "trial" if first else "adapted"
    for policy, total in evaluation.totals.items():
        print(f"{what}, {policy:<8} {total['mean']:.4f} ± {total['standard_error']:.4f} (standard error)")
    print("protocol        " + ", ".join(f"{k}={v}" for k, v in evaluation.protocol.items() if v is not None))
    if evaluation.beside:
        _show_methods(f"the same {evaluation.tasks} trials", evaluation.beside, "policy is ahead by")


def _show_methods(title: str, rows: Sequence[Mapping[str, Any]], difference: str, metric: str = "return") -> None:
    table = Table(title=title, title_justify="left")
    table.add_column("method")
    scored = ["% of oracle − random"] if "percent" in rows[0] else []
    for heading in (metric, "SE", *scored, difference, "SE"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row["name"],
            f"{row['mean']:.4f}",
            f"{row['error']:.4f}",
            *(f"{row['percent']:.2f}" for _ in scored),
            f"{row['difference']:+.4f}",
            f"{row['difference_error']:.4f}",
        )
    PlainConsole(file=sys.stdout, width=110, highlight=False).print(table)


def show_comparison(report: Mapping[str, Any]) -> None:
    """Print the returns of oracles and classical methods on the same trials."""
    protocol = ", ".join(f"{k}={v}" for k, v in report["protocol"].items())
    title = f"{report['environment']}: {report['trials']} trials ({report['split']}, seed {report['seed']}; {protocol})"
    _show_methods(title, report["rows"], "more than the oracle")


def show_predictions(report: Mapping[str, Any]) -> None:
    """Print one row per image, or per row of an array."""
    classes = f" of {len(report['classes'])} classes" if "classes" in report else ""
    what = "image" if all("image" in row for row in report["predictions"]) else "row"
    support = f"{report['support']} {what}s{classes}"
    title = f"{report['model']} ({report['algorithm']}), adapted to {support}"
    table = Table(title=escape(title), title_justify="left")
    known = any("class" in row for row in report["predictions"])
    for heading in (what, "predicted", *(("class",) if known else ())):
        table.add_column(heading)
    table.add_column("probability", justify="right")
    for row in report["predictions"]:
        table.add_row(
            escape(str(row[what])),
            escape(str(row["predicted"])),
            *([escape(row.get("class", ""))] if known else []),
            f"{row['probability']:.4f}" if "probability" in row else "",
        )
    PlainConsole(file=sys.stdout, width=120, highlight=False).print(table)
    if report["accuracy"] is not None:
        print(f"accuracy        {report['accuracy']:.4f}")
    for error in ("mse", "mae"):
        if error in report:
            print(f"{error}             {report[error]:.6g}")


def show_group(group: Group) -> None:
    """Print mean and SD of the scores of several seeds."""
    table = Table(title=f"{len(group.results)} seeds, mean ± SD", title_justify="left")
    table.add_column("metric")
    table.add_column("mean", justify="right")
    table.add_column("SD", justify="right")
    for key, value in group.summary.items():
        if key.endswith("/mean"):
            deviation = group.summary.get(key.removesuffix("mean") + "sd")
            table.add_row(key.removesuffix("/mean"), f"{value:.4f}", "" if deviation is None else f"{deviation:.4f}")
    PlainConsole(file=sys.stdout, width=100, highlight=False).print(table)
    print(f"runs            {group.run_dir}")


def show_verification(report: Mapping[str, Any]) -> None:
    """Print the hash of the parameters for every number of workers."""
    for row in report["rows"]:
        killed = ""
        if row["killed"]:
            killed = f"  killed {', '.join(row['killed'])}; {row['retried']} shards given out again"
        print(f"workers {row['workers']:>3}  sha256 {row['params_sha256']}  {row['seconds']:.1f} s{killed}")
        if row["averaged_sha256"]:
            print(f"{'averages':>11}  sha256 {row['averaged_sha256']}")
        if not row["enough_kills"]:
            print(f"workers {row['workers']:>3}  too few shards were lost for a proof; use more meta-steps")
    print("identical parameters" if report["same"] else "DIFFERENT parameters")


def show_plan(report: Mapping[str, Any]) -> None:
    """Print the choices of the engine with their reasons, and the predicted and the usable memory."""
    table = Table(title=f"on {report['device']['name']}", title_justify="left")
    for column in ("engine", "", "because"):
        table.add_column(column)
    reasons = report["reasons"]
    for key, value in report["engine"].items():
        if key in reasons:
            shown = (
                "whole shard"
                if value is None
                else ("yes" if value else "no")
                if isinstance(value, bool)
                else str(value)
            )
            table.add_row(key, shown, reasons[key])
    PlainConsole(file=sys.stdout, width=120, highlight=False).print(table)
    if "predicted_peak_bytes" not in report:
        return
    table = Table(
        title=f"memory of one worker, {report['tasks_at_once']} of a shard's {report['shard_size']} tasks in parallel",
        title_justify="left",
    )
    table.add_column("differentiation")
    for column in ("predicted peak", "one task, eager"):
        table.add_column(column, justify="right")
    table.add_column("bias", ratio=1)
    for way in report["estimators"]:
        peak = report["predicted_peak_bytes"][way["name"]]
        seconds = "" if way["seconds"] is None else f"{way['seconds'] * 1e3:.3g} ms"
        table.add_row(way["name"], size(peak), seconds, way["bias"])
    table.add_row("usable", size(report["usable_bytes"]), "", "")
    PlainConsole(file=sys.stdout, width=120, highlight=False).print(table)


def show_benchmark(report: Mapping[str, Any]) -> None:
    """Print a table per case with a row per contestant, the other facts of the case, the versions and the machine."""
    print(f"{report['benchmark']}: {_facts(report['settings'])}")
    console = PlainConsole(file=sys.stdout, width=180, highlight=False)
    for title, case in report["cases"].items():
        table = Table(title=escape(f"{title} [{case['unit']}]"), title_justify="left")
        table.add_column("")
        rows = case["contestants"]
        columns = list(dict.fromkeys(column for row in rows.values() for column in row))
        for column in columns:
            table.add_column(column.replace("_", " "), justify="right")
        for name, row in rows.items():
            table.add_row(escape(name), *(escape(_cell(row.get(column))) for column in columns))
        console.print(table)
        for name, value in case.items():
            if name not in ("unit", "contestants"):
                print(f"{name.replace('_', ' '):<15} {_facts(value) if isinstance(value, Mapping) else _cell(value)}")
    for name in ("versions", "machine"):
        if name in report:
            print(f"{name:<15} {_facts(report[name])}")


def _facts(facts: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={_cell(value)}" for name, value in facts.items())


def _cell(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"({_facts(value)})"
    if isinstance(value, (list, tuple)):
        return " … ".join(map(_cell, value))
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.4g}"
    return str(value)


def _published(experiment: Experiment) -> Mapping[int, float] | None:
    tasks = experiment.document.get("tasks", {})
    algorithm = experiment.document.get("algorithm", {})
    same = tasks.get("name") == "sinusoid" and tasks.get("k_shot") == 10 and algorithm.get("name") == "maml"
    return (
        PUBLISHED_SINUSOID if same and algorithm.get("inner_lr") == 0.01 and not algorithm.get("first_order") else None
    )
