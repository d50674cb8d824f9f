"""Assemble the command line. The commands import Torch, Ray and MLflow when they run, so that ``--help`` is quick."""

from __future__ import annotations

from typing import Annotated

import typer

import metadist
from metadist.cli import cache, control, evaluate, jobs, list, predict, register, render, serve, train, verify, worker
from metadist.cli.bench import app as bench
from metadist.cli.terminal import provide_streams
from metadist.core.text import show as print  # no call can forget to escape control characters
from metadist.storage.places import provide_home


def print_version(wanted: bool) -> None:
    """Print the version and exit."""
    if wanted:
        print(f"metadist {metadist.__version__}")
        raise typer.Exit


app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=print_version)
    ] = False,
) -> None:
    """Distributed, task-parallel meta-training: any number of workers gives the same final parameters bit for bit."""


app.command(
    epilog="Examples:  metadist train sinusoid_maml --workers 2   |   "
    "metadist train my.yaml outer.lr=3e-4 --seeds 0,1,2   |   "
    "metadist train omniglot_maml_5w1s --run-dir runs/a --resume"
)(train.train)
app.command(
    epilog="Examples:  metadist evaluate runs/a --tasks 1000   |   "
    "metadist evaluate runs/a tasks.k_shot=5 --inner-steps 10"
)(evaluate.evaluate)
app.command(
    epilog="Examples:  metadist oracle bandit arms=5 episodes=10   |   "
    "metadist oracle bandit_rl2 --trials 10000 --methods gittins,ucb1"
)(evaluate.oracle)
app.command(epilog="Example:  metadist verify omniglot_maml_5w1s --workers 0,1,2,4 --meta-steps 20 --kill 3")(
    verify.verify
)
app.command(epilog="Example:  metadist plan omniglot_maml_5w1s algorithm.inner_steps=20")(verify.plan)
app.command("list", epilog="Examples:  metadist list   |   metadist list algorithms   |   metadist list keys")(
    list.list_
)
app.command(epilog="Examples:  metadist cache   |   metadist cache clean --days 30")(cache.cache)
app.command(epilog="Example:  metadist export runs/a model.safetensors")(list.export)
app.command(epilog="Example:  metadist ui --port 5000")(list.ui)
app.add_typer(bench, name="bench")
app.command(
    epilog="Example:  metadist submit omniglot_maml_5w1s --address http://HEAD:8265 --run-dir s3://bucket/runs/a --wait"
)(jobs.submit)
app.add_typer(jobs.app, name="jobs")
app.command(
    epilog="Example:  metadist render kubernetes omniglot_maml_5w1s --run-dir s3://bucket/runs/a "
    "--image REGISTRY/metadist:0.1.0"
)(render.render)
app.command(
    epilog="Examples:  metadist control runs/a status   |   metadist control runs/a set meta_batch_size=64 workers=3"
)(control.control)
app.command(epilog="Example:  metadist worker --connect driver.example:8471 --token-file token --tls-ca ca.pem")(
    worker.worker
)
app.command(
    epilog="Examples:  metadist serve runs/a   |   metadist serve runs/a b=runs/b --host 0.0.0.0 --tls-cert cert.pem "
    "--tls-key key.pem --token-file token"
)(serve.serve)
app.command(epilog="Example:  metadist register runs/a omniglot-5w1s")(register.register)
app.command(epilog="Example:  metadist predict runs/a --support animals/few --query animals/many")(predict.predict)


def main() -> None:
    """Run the command line."""
    provide_streams()
    provide_home()
    app()
