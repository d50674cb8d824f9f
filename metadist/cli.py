"""The command line. Torch, Ray and MLflow are imported inside the commands, so that ``--help`` is quick."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Annotated, Any

import typer

from metadist.bench.commands import app as bench
from metadist.commands import control, jobs, predict, register, render, serve, worker
from metadist.terminal import AsJson, Overrides, Workers, clean_errors, numbers, only_results_on_stdout, say, set_up_logging

app = typer.Typer(
    help="Distributed, task-parallel meta-training: the same final parameters bit for bit, whatever the number of workers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.add_typer(bench, name="bench")
app.command(epilog="Example:  metadist submit omniglot_maml_5w1s --address http://HEAD:8265 --run-dir s3://bucket/runs/a --wait")(jobs.submit)
app.add_typer(jobs.app, name="jobs")
app.command(epilog="Example:  metadist render kubernetes omniglot_maml_5w1s --run-dir s3://bucket/runs/a --image REGISTRY/metadist:0.1.0")(render.render)
app.command(epilog="Examples:  metadist control runs/a status   |   metadist control runs/a set meta_batch_size=64 workers=3")(control.control)
app.command(epilog="Example:  metadist worker --connect driver.example:8471 --token-file token --tls-ca ca.pem")(worker.worker)
app.command(epilog="Examples:  metadist serve runs/a   |   metadist serve runs/a b=runs/b --host 0.0.0.0 --tls-cert cert.pem --tls-key key.pem --token-file token")(serve.serve)
app.command(epilog="Example:  metadist register runs/a omniglot-5w1s")(register.register)
app.command(epilog="Example:  metadist predict runs/a --support animals/few --query animals/many")(predict.predict)


class _Stop:
    """The first Ctrl-C or SIGTERM asks the loop to stop at the next meta-step; the second interrupts at once, and so does
    the first one before the loop has begun.
    """

    def __init__(self) -> None:
        self.asked = self._looping = False
        signal.signal(signal.SIGTERM, signal.default_int_handler)

    def __call__(self) -> bool:
        if not self._looping:
            self._looping = True
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, self._handle)
        return self.asked

    def _handle(self, number: int, frame: Any) -> None:
        self.asked = True
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.default_int_handler)
        say("\nstopping after this meta-step, with a checkpoint; press Ctrl-C again to stop at once")


@app.command(
    epilog="Examples:  metadist train sinusoid_maml --workers 2   |   metadist train my.yaml outer.lr=3e-4 --seeds 0,1,2   |   "
    "metadist train omniglot_maml_5w1s --run-dir runs/a --resume"
)
def train(
    config: Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped config (metadist list configs).")],
    overrides: Overrides = None,
    workers: Workers = None,
    outside: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Take workers from outside here, too (metadist worker --connect HOST:PORT).")
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Several seeds, such as 0,1,2: child runs under one parent.")] = None,
    run_dir: Annotated[str | None, typer.Option(help="Folder or fsspec URL of the run; default: a new one under METADIST_RUNS.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest valid checkpoint.")] = False,
    run_id: Annotated[str | None, typer.Option(help="The id of a new run; default: name, time and chance.", hidden=True)] = None,
    print_config: Annotated[bool, typer.Option("--print-config", help="Print the config with every default and stop.")] = False,
    as_json: AsJson = False,
) -> None:
    """Meta-train, with validation, checkpoints and tracking; test once at the end."""
    set_up_logging()
    with clean_errors():
        from metadist import config as configuration

        document = configuration.asked(config, overrides, workers)
        if outside is not None:
            document = configuration.set_outside(document, outside)
        if print_config:
            import yaml

            print(yaml.safe_dump(configuration.resolved(configuration.build(document)), sort_keys=False, allow_unicode=True), end="")
            return
        if seeds is not None:
            _train_seeds(document, numbers("--seeds", seeds), run_dir, resume, as_json)
        else:
            _train_one(document, run_dir, resume, as_json, run_id)


def _train_one(document: dict[str, Any], run_dir: str | None, resume: bool, as_json: bool, run_id: str | None = None) -> None:
    from metadist import config as configuration
    from metadist.display import live, show_result
    from metadist.experiment import Experiment
    from metadist.experiment import train as run_training

    experiment = Experiment.of(configuration.build(document))
    stop = _Stop()
    with only_results_on_stdout(), live(experiment) as display:
        result = run_training(experiment, run_dir=run_dir, resume=resume, display=display, stop=stop, run_id=run_id)
    interrupted = result.outcome.stopped == "interrupted"
    if interrupted:
        say(f"stopped at meta-step {result.outcome.progress.meta_step}; go on with: metadist train … --run-dir {result.run_dir} --resume")
    show_result(result)
    if as_json:
        print(json.dumps(result.as_dict()))
    if interrupted:
        raise typer.Exit(130)


def _train_seeds(document: dict[str, Any], seeds: list[int], run_dir: str | None, resume: bool, as_json: bool) -> None:
    from metadist.display import live, show_group, show_result
    from metadist.seeds import train_seeds

    stop, stdout = _Stop(), sys.stdout

    def show(result: Any) -> None:
        with redirect_stdout(stdout):
            show_result(result)

    with only_results_on_stdout():
        group = train_seeds(document, seeds, run_dir=run_dir, resume=resume, live=live, stop=stop, show=show)
    show_group(group)
    if as_json:
        print(json.dumps(group.as_dict()))
    if group.interrupted:
        say(f"stopped; go on with: metadist train … --seeds {','.join(map(str, seeds))} --run-dir {group.run_dir} --resume")
        raise typer.Exit(130)


@app.command(epilog="Examples:  metadist evaluate runs/a --tasks 1000   |   metadist evaluate runs/a --split validation --inner-steps 10")
def evaluate(
    run_dir: Annotated[str, typer.Argument(help="The folder that train printed.")],
    tasks: Annotated[int | None, typer.Option(help="Number of tasks; default: evaluate.test_tasks.", min=2)] = None,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    inner_steps: Annotated[int | None, typer.Option(help="Adaptation steps; default: evaluate.inner_steps.", min=0)] = None,
    normalization: Annotated[str | None, typer.Option(help="transductive or inductive; default: the run's.")] = None,
    beside: Annotated[
        str | None, typer.Option(metavar="NAME,…", help="Known methods on the same trials of a meta-environment, such as gittins,ucb1; all.")
    ] = None,
    workers: Workers = "0",
    as_json: AsJson = False,
) -> None:
    """Judge a run's best parameters, after 0, 1, … adaptation steps; of a meta-environment, by episode."""
    set_up_logging()
    with clean_errors():
        from metadist.core.errors import ConfigError, nearest
        from metadist.display import show_evaluation
        from metadist.experiment import evaluate_run

        for option, value, allowed in (
            ("--split", split, ("train", "validation", "test")),
            ("--normalization", normalization, ("transductive", "inductive")),
        ):
            if value is not None and value not in allowed:
                raise ConfigError(f"{option}: '{value}' is not one of {', '.join(allowed)}{nearest(value, allowed)}")
        with only_results_on_stdout():
            result = evaluate_run(
                run_dir, tasks=tasks, split=split, inner_steps=inner_steps, workers=workers, normalization=normalization,
                beside=[name.strip() for name in beside.split(",")] if beside else (),
            )  # fmt: skip
        show_evaluation(result.evaluations[0])
        if as_json:
            print(json.dumps(result.as_dict()))


@app.command(epilog="Example:  metadist verify omniglot_maml_5w1s --workers 0,1,2,4 --meta-steps 20 --kill 3")
def verify(
    config: Annotated[str, typer.Argument(help="A YAML file or the name of a shipped config.")],
    overrides: Overrides = None,
    workers: Annotated[
        str, typer.Option(metavar="N,N,…", help="Numbers of workers to compare; of several roles as learners=1/environments=2.")
    ] = "0,1,2",
    kill: Annotated[int, typer.Option(help="Kill so many workers in every run, each with a shard in flight.", min=0)] = 0,
    meta_steps: Annotated[int | None, typer.Option(help="Shorter runs.", min=1)] = None,
    as_json: AsJson = False,
) -> None:
    """Are the final parameters the same bits for every number of workers? Exit code 1 if not."""
    set_up_logging()
    with clean_errors():
        from metadist import config as configuration
        from metadist.display import plain, show_verification
        from metadist.verify import counts
        from metadist.verify import verify as compare

        document = configuration.asked(config, overrides)
        with only_results_on_stdout():
            report = compare(document, counts(workers), kill=kill, meta_steps=meta_steps, display=plain())
        show_verification(report)
        if as_json:
            print(json.dumps(report))
        if not report["ok"]:
            raise typer.Exit(1)


@app.command(epilog="Example:  metadist plan omniglot_maml_5w1s algorithm.inner_steps=20")
def plan(
    config: Annotated[str, typer.Argument(help="A YAML file or the name of a shipped config.")],
    overrides: Overrides = None,
    workers: Workers = None,
    as_json: AsJson = False,
) -> None:
    """How a new run would compute its shards on workers like this machine, why, and the memory that it would take."""
    set_up_logging()
    with clean_errors():
        from metadist import config as configuration
        from metadist.display import show_plan
        from metadist.experiment import Experiment
        from metadist.fleet import local_plan

        document = configuration.asked(config, overrides, workers)
        with only_results_on_stdout():
            report = local_plan(Experiment.of(configuration.build(document))).as_dict()
        show_plan(report)
        if as_json:
            print(json.dumps(report))


@app.command(epilog="Examples:  metadist oracle bandit arms=5 episodes=10   |   metadist oracle bandit_rl2 --trials 10000 --methods gittins,ucb1")
def oracle(
    environment: Annotated[str, typer.Argument(help="A meta-environment's name, or a config that has one.")],
    overrides: Overrides = None,
    methods: Annotated[str, typer.Option(metavar="NAME,…", help="Which methods; all is all that suit it.")] = "all",
    trials: Annotated[int, typer.Option(help="Trials, the same for every method.", min=2)] = 10000,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    seed: Annotated[int, typer.Option(help="Of the tasks.", min=0)] = 0,
    as_json: AsJson = False,
) -> None:
    """What oracles and classical methods get in a meta-environment, on the same trials."""
    set_up_logging()
    with clean_errors():
        from metadist.comparison import oracles
        from metadist.display import show_comparison

        with only_results_on_stdout():
            report = oracles(
                environment, overrides or [], [name.strip() for name in methods.split(",")], trials=trials, split=split, seed=seed
            )
        show_comparison(report)
        if as_json:
            print(json.dumps(report))


@app.command("list", epilog="Example:  metadist list algorithms")
def list_(what: Annotated[str, typer.Argument(help="algorithms, tasks, environments, models or configs.")]) -> None:
    """What there is to choose from, one per line."""
    with clean_errors():
        from metadist.core.errors import ConfigError, nearest

        def configs() -> dict[str, str]:
            from metadist.config import shipped_configs

            return {name: path.read_text().splitlines()[0].lstrip("# ") for name, path in shipped_configs().items()}

        def described(classes: Callable[[], dict[str, type]]) -> Callable[[], dict[str, str]]:
            return lambda: {name: (cls.__doc__ or "").strip().splitlines()[0] for name, cls in sorted(classes().items())}

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
            from metadist.envs import ENVIRONMENTS

            return ENVIRONMENTS

        kinds = {"algorithms": described(algorithms), "tasks": described(tasks), "environments": described(environments), "models": described(models), "configs": configs}
        if what not in kinds:
            raise ConfigError(f"list: '{what}' is not one of {', '.join(kinds)}{nearest(what, kinds)}")
        entries = kinds[what]()
        width = max(map(len, entries))
        for name, description in sorted(entries.items()):
            print(f"{name:<{width}}  {description}")


@app.command(epilog="Example:  metadist export runs/a model.safetensors")
def export(
    run_dir: Annotated[str, typer.Argument(help="The folder that train printed.")],
    path: Annotated[str, typer.Argument(help="The safetensors file to write.")],
) -> None:
    """Write a run's best model parameters, under the model's own names."""
    set_up_logging()
    with clean_errors():
        from metadist.experiment import load_run

        load_run(run_dir).export(path)
        print(path)


@app.command(epilog="Example:  metadist ui --port 5000")
def ui(port: Annotated[int, typer.Option(help="Port on 127.0.0.1.", min=1, max=65535)] = 5000) -> None:
    """The MLflow UI on the store that runs are recorded in, after delivering what earlier runs could not."""
    set_up_logging()
    with clean_errors():
        from pathlib import Path

        from metadist.run_folder import runs_root
        from metadist.tracking import replay, undelivered
        from metadist.tracking.ui import serve_ui

        for spool in sorted(Path(runs_root()).glob("**/tracking/spool.jsonl")):
            if undelivered(spool.parent):
                say(f"delivering what {spool.parent.parent} could not: {replay(spool.parent)} records still wait")

        serve_ui(os.environ.get("MLFLOW_TRACKING_URI"), port, runs_root())


def main() -> None:
    app()
