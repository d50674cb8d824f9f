"""``metadist bench …``: one subcommand per benchmark, with its own options. Only ``measure`` imports Torch.

To add a benchmark: a function here under ``@app.command("NAME", epilog="Example:  …")`` whose body is ``measure("NAME",
as_json, **options)``.
"""

from __future__ import annotations

import json
import logging
from typing import Annotated, Any

import typer

from metadist.cli.terminal import AsJson, Overrides, clean_errors, numbers, only_results_on_stdout, set_up_logging
from metadist.core.text import show as print  # no call can forget to escape control characters

app = typer.Typer(
    help="Measure speed and memory, contestants interleaved. Use a machine that runs nothing else.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)

Config = Annotated[str, typer.Argument(help="A YAML file or the name of a shipped config.")]
Steps = Annotated[int, typer.Option(help="Measured meta-steps per contestant.", min=10)]


def measure(name: str, as_json: bool, **options: Any) -> None:
    """Run the benchmark and show its report, with ``as_json`` also as JSON."""
    set_up_logging()
    with clean_errors():
        from metadist.benchmarks import bench
        from metadist.cli.display import show_benchmark

        with only_results_on_stdout():
            report = bench(name, **options)
        show_benchmark(report)
        if as_json:
            print(json.dumps(report))


def _measure_config(
    name: str, config: str, overrides: list[str] | None, steps: int, as_json: bool, **options: Any
) -> None:
    with clean_errors():
        from metadist.config.document import requested

        document = requested(config, overrides)
    measure(name, as_json, document=document, steps=steps, **options)


@app.command(
    "inner-loop",
    epilog="Examples:  metadist bench inner-loop --inner-steps 1,5 --against loop,higher,torchopt,jax   |   "
    "metadist bench inner-loop --model conv4 --n-way 20 --inner-steps 5 --against loop,higher",
)
def inner_loop(
    model: Annotated[str, typer.Option(help="mlp or conv4.")] = "mlp",
    task: Annotated[
        str | None, typer.Option(help="sinusoid, omniglot or images84 (random images); default: by the model.")
    ] = None,
    inner_steps: Annotated[str, typer.Option(metavar="N,N,…", help="Numbers of inner steps, a table each.")] = "1,5",
    n_way: Annotated[
        int | None,
        typer.Option(help="Classes per task; default of this and the next options: the shipped config.", min=2),
    ] = None,
    k_shot: Annotated[int | None, typer.Option(help="Support examples per class.", min=1)] = None,
    query_shots: Annotated[int | None, typer.Option(help="Query examples per class.", min=1)] = None,
    tasks: Annotated[int | None, typer.Option(help="Tasks per shard.", min=1)] = None,
    inner_lr: Annotated[float | None, typer.Option(help="Inner learning rate.")] = None,
    against: Annotated[
        str, typer.Option(metavar="NAME,…", help="loop, higher, torchopt, jax (from the extra bench).")
    ] = "loop",
    threads: Annotated[int, typer.Option(help="CPU threads of every contestant.", min=1)] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    seconds: Annotated[float, typer.Option(help="Measured time per table, without compilation.", min=0.0)] = 30.0,
    compiled: Annotated[
        bool, typer.Option("--compiled/--eager", help="With or without metadist's compiled engine.")
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Compare one shard's second-order meta-gradient with other libraries, after a proof that all compute the same."""
    with clean_errors():
        steps = numbers("--inner-steps", inner_steps)
    measure(
        "inner-loop",
        as_json,
        model=model,
        task=task,
        inner_steps=steps,
        n_way=n_way,
        k_shot=k_shot,
        query_shots=query_shots,
        tasks=tasks,
        inner_lr=inner_lr,
        against=against,
        threads=threads,
        device=device,
        seconds=seconds,
        compiled=compiled,
    )


@app.command(
    epilog="Examples:  metadist bench memory   |   metadist bench memory --model transformer --inner-steps 1,50"
)
def memory(
    model: Annotated[str, typer.Option(help="conv4 or transformer, on Omniglot 5-way 1-shot.")] = "conv4",
    inner_steps: Annotated[
        str, typer.Option(metavar="N,N,…", help="Numbers of inner steps, two rows each.")
    ] = "1,5,20,50",
    tasks: Annotated[int | None, typer.Option(help="Tasks per shard; default: the shipped config.", min=1)] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = 1,
    rounds: Annotated[int, typer.Option(help="Timed turns per table row.", min=1)] = 3,
    compiled: Annotated[
        bool,
        typer.Option("--compiled/--eager", help="Compile mixed. Unrolled stays eager: its compilation takes minutes."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Measure the peak memory and the time of a shard's meta-gradient, and compare the memory with the prediction."""
    with clean_errors():
        steps = numbers("--inner-steps", inner_steps)
    measure(
        "memory",
        as_json,
        model=model,
        inner_steps=steps,
        tasks=tasks,
        device=device,
        threads=threads,
        rounds=rounds,
        compiled=compiled,
    )


@app.command(
    epilog="Examples:  metadist bench tasks   |   metadist bench tasks --config omniglot_maml_5w1s --shard-sizes 8,32"
)
def tasks(
    config: Annotated[
        str | None, typer.Option(help="Measure only the tasks of this config; default: every shipped family.")
    ] = None,
    tasks: Annotated[
        int, typer.Option(help="Tasks sampled per contestant and table, at least a few shards.", min=1)
    ] = 320,
    shard_sizes: Annotated[str, typer.Option(metavar="N,N,…", help="Tasks per shard, a table each.")] = "1,8,32",
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = 1,
    as_json: AsJson = False,
) -> None:
    """Time the task samplers: whole shards against one task and one image at a time, after a proof of equal bits."""
    with clean_errors():
        sizes = numbers("--shard-sizes", shard_sizes)
    measure("tasks", as_json, config=config, tasks=tasks, shard_sizes=sizes, threads=threads)


@app.command(epilog="Example:  metadist bench tracking sinusoid_maml")
def tracking(
    config: Config = "sinusoid_maml", overrides: Overrides = None, steps: Steps = 200, as_json: AsJson = False
) -> None:
    """Measure how much time a dead and a frozen MLflow server add to a meta-step."""
    logger = logging.getLogger("metadist.tracking")
    logger.setLevel(logging.ERROR)  # no warnings about the dead server
    try:
        _measure_config("tracking", config, overrides, steps, as_json)
    finally:
        logger.setLevel(logging.NOTSET)


@app.command(
    epilog="Examples:  metadist bench transport --sizes 1,10,100,400   |   metadist bench transport --wire bfloat16"
)
def transport(
    sizes: Annotated[
        str, typer.Option(metavar="MB,MB,…", help="Megabytes of float32 parameters, a table each.")
    ] = "1,10,100,400",
    wire: Annotated[str, typer.Option(help="exact, or bfloat16 for contributions.")] = "exact",
    rounds: Annotated[int, typer.Option(help="Turns of three calls per contestant; more for short calls.", min=2)] = 5,
    as_json: AsJson = False,
) -> None:
    """Time parameters to one Ray actor and contributions back, against a plain memcpy of the same bytes."""
    with clean_errors():
        megabytes = numbers("--sizes", sizes)
    measure("transport", as_json, sizes=megabytes, wire=wire, rounds=rounds)


@app.command(epilog="Example:  metadist bench scaling --workers 1,2 --config omniglot_maml_5w1s")
def scaling(
    overrides: Overrides = None,
    workers: Annotated[str, typer.Option(metavar="N,N,…", help="Numbers of workers, a table each.")] = "1,2",
    config: Annotated[str, typer.Option(help="A YAML file or the name of a shipped config.")] = "omniglot_maml_5w1s",
    steps: Steps = 200,
    as_json: AsJson = False,
) -> None:
    """Compare Ray actors with plain processes that compute the same shards; then time the overhead of a meta-step."""
    with clean_errors():
        counts = numbers("--workers", workers)
    _measure_config("scaling", config, overrides, steps, as_json, workers=counts)


@app.command(epilog="Example:  metadist bench rl2 --environments 1024,16384")
def rl2(
    environments: Annotated[
        str, typer.Option(metavar="N,N,…", help="Numbers of simultaneous environments, two tables each.")
    ] = "1024,16384",
    hidden: Annotated[int, typer.Option(help="Units of the GRU policy.", min=1)] = 64,
    shard_size: Annotated[int, typer.Option(help="Trials per gradient.", min=1)] = 1024,
    threads: Annotated[int, typer.Option(help="CPU threads of every contestant.", min=1)] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    rounds: Annotated[int, typer.Option(help="Turns per contestant.", min=2)] = 3,
    as_json: AsJson = False,
) -> None:
    """Compare RL² in batched environments with a plain Gymnasium vector environment; needs the extra rl."""
    with clean_errors():
        counts = numbers("--environments", environments)
    measure(
        "rl2",
        as_json,
        environments=counts,
        hidden=hidden,
        shard_size=shard_size,
        threads=threads,
        device=device,
        rounds=rounds,
    )


@app.command(
    epilog="Examples:  metadist bench serve omniglot_maml_5w1s   |   "
    "metadist bench serve sinusoid_maml --requests 100000"
)
def serve(
    config: Config = "omniglot_maml_5w1s",
    overrides: Overrides = None,
    clients: Annotated[
        str, typer.Option(metavar="N,N,…", help="Numbers of simultaneous callers, a table each.")
    ] = "1,8,64",
    turns: Annotated[int, typer.Option(help="Turns per contestant and table.", min=1)] = 5,
    seconds: Annotated[float, typer.Option(help="Length of one turn in seconds.", min=0.1)] = 5.0,
    threads: Annotated[int, typer.Option(help="CPU threads of each server.", min=1)] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    requests: Annotated[
        int, typer.Option(help="Then send this number of adaptations and measure the server's memory meanwhile.", min=0)
    ] = 0,
    as_json: AsJson = False,
) -> None:
    """Compare batched adaptations over gRPC with one at a time, by callers with different support sets."""
    with clean_errors():
        from metadist.config.document import requested

        counts = numbers("--clients", clients)
        document = requested(config, overrides)
    measure(
        "serve",
        as_json,
        document=document,
        clients=counts,
        turns=turns,
        seconds=seconds,
        threads=threads,
        device=device,
        requests=requests,
    )


@app.command(epilog="Example:  metadist bench optimizers runs/optimizer-mlp tasks.image_size=8 --tasks 100")
def optimizers(
    run_dir: Annotated[str, typer.Argument(help="The run directory of a learned optimiser.")],
    overrides: Overrides = None,
    tasks: Annotated[int, typer.Option(help="Test tasks.", min=2)] = 100,
    steps: Annotated[int, typer.Option(help="Steps of training on each task.", min=1)] = 1000,
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = 1,
    as_json: AsJson = False,
) -> None:
    """Compare a learned optimiser with Adam and with SGD with momentum, at seven rates each, on its test tasks."""
    measure(
        "optimizers", as_json, run_dir=run_dir, overrides=overrides or [], tasks=tasks, steps=steps, threads=threads
    )


@app.command(epilog="Example:  metadist bench weighting tasks.noise=0 tasks.imbalance=100 --seeds 5")
def weighting(
    overrides: Overrides = None,
    config: Annotated[str, typer.Option(help="A YAML file or the name of a shipped config.")] = (
        "meta_weight_net_cifar100"
    ),
    seeds: Annotated[int, typer.Option(help="Seeds of data and model, each with every method.", min=2)] = 5,
    workers: Annotated[str, typer.Option(metavar="N", help="Number of workers; 0: this process.")] = "0",
    as_json: AsJson = False,
) -> None:
    """Compare plain training, Meta-Weight-Net and learning to reweight on wrong labels and rare classes."""
    with clean_errors():
        from metadist.config.document import requested

        document = requested(config, overrides)
    measure("weighting", as_json, document=document, seeds=seeds, workers=workers)


@app.command(epilog="Example:  metadist bench nas --config nas_omniglot_5w5s --networks 20")
def nas(
    overrides: Overrides = None,
    config: Annotated[str, typer.Option(help="A YAML file or the name of a shipped config.")] = "nas_omniglot_5w1s",
    networks: Annotated[int, typer.Option(help="Random networks of the space.", min=1)] = 20,
    train_steps: Annotated[
        int | None, typer.Option(help="Meta-steps of each network; default: as many as the search.", min=1)
    ] = None,
    workers: Annotated[str, typer.Option(metavar="N", help="Number of workers; 0: this process.")] = "0",
    as_json: AsJson = False,
) -> None:
    """Search an architecture; compare its network with random networks of its space on held-out tasks."""
    with clean_errors():
        from metadist.config.document import requested

        document = requested(config, overrides)
    measure("nas", as_json, document=document, networks=networks, train_steps=train_steps, workers=workers)


@app.command("driver-memory", epilog="Example:  metadist bench driver-memory sinusoid_maml --steps 2000")
def driver_memory(
    config: Config = "sinusoid_maml", overrides: Overrides = None, steps: Steps = 200, as_json: AsJson = False
) -> None:
    """Measure the resident memory of the driver over meta-steps, through one Ray actor."""
    _measure_config("driver-memory", config, overrides, steps, as_json)


@app.command(
    epilog="Examples:  metadist bench ragged   |   metadist bench ragged cifar_fs_ragged tasks.k_shot=[1,10] "
    "model.filters=16"
)
def ragged(
    config: Config = "cifar_fs_ragged",
    overrides: Overrides = None,
    rounds: Annotated[int, typer.Option(help="Timed turns per contestant.", min=1)] = 5,
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = 1,
    as_json: AsJson = False,
) -> None:
    """Compare tasks of drawn sizes with tasks of one size, both compiled, and count the graphs."""
    with clean_errors():
        from metadist.config.document import requested

        document = requested(config, overrides)
    measure("ragged", as_json, document=document, rounds=rounds, threads=threads)
