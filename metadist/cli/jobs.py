"""``metadist submit`` and ``metadist jobs``: start runs as jobs of a Ray cluster, and manage them."""

from __future__ import annotations

import json
import os
import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from metadist.cli.terminal import AsJson, Overrides, Trust, Workers, clean_errors, say, set_up_logging
from metadist.core.text import show as print  # no call can forget to escape control characters

if TYPE_CHECKING:
    from metadist.jobs.submit import Submitted

app = typer.Typer(
    help="The jobs of a Ray cluster: list, status, logs, stop.",
    invoke_without_command=True,
    add_completion=False,
    rich_markup_mode="rich",
)

Address = Annotated[
    str | None,
    typer.Option(
        "--address", metavar="URL", help="The cluster's dashboard, http://HEAD:8265; default: RAY_API_SERVER_ADDRESS."
    ),
]
Variables = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME[=VALUE]", help="Set an environment variable. Everyone with the cluster's token can read it."
    ),
]
Name = Annotated[str | None, typer.Argument(metavar="[ID]", help="A job's id or a run's; default: the newest job.")]


def submit(
    config: Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped config.")],
    overrides: Overrides = None,
    address: Address = None,
    workers: Workers = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="Show the log until the job ends; exit code 1 where it fails.")
    ] = False,
    run_dir: Annotated[
        str | None, typer.Option(help="URL, or folder that all nodes have; default: a new folder in METADIST_RUNS.")
    ] = None,
    run_id: Annotated[str | None, typer.Option(help="Resume this run, or give a new run this id.")] = None,
    data: Annotated[
        str | None, typer.Option(help="METADIST_DATA on the nodes: URL or folder; default: its value here.")
    ] = None,
    env: Variables = None,
    module: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="Ship this module or package too, in addition to the modules that the config names."
        ),
    ] = None,
    driver_cpus: Annotated[float, typer.Option(help="CPUs for the driver; with 0 it runs on the head.", min=0)] = 0.0,
    trust: Trust = None,
    as_json: AsJson = False,
) -> None:
    """Train on a Ray cluster. Submitting a run again resumes it, on any node."""
    set_up_logging()
    with clean_errors():
        from metadist.config.document import requested
        from metadist.jobs import submit as jobs

        document = requested(config, overrides, workers, trust)
        request = jobs.Request(run_id, run_dir, data, _environment(env or []), driver_cpus, module or [], trust or ())
        cluster = _cluster(address)
        submitted = jobs.submit(cluster, document, request)
        _announce(submitted)
        status = "PENDING"
        if wait:
            status = _wait(cluster, submitted.job_id)
        else:
            say(f"follow   metadist jobs logs -f {submitted.job_id} --address {cluster.address}")
        if as_json:
            print(json.dumps({**submitted.as_dict(), "status": status}))
        elif not wait:
            print(submitted.job_id)
        if wait and status != "SUCCEEDED":
            _failed(cluster, submitted.job_id)


@app.callback(epilog="Example:  metadist jobs --address http://HEAD:8265")
def default(context: typer.Context, address: Address = None, as_json: AsJson = False) -> None:
    if context.invoked_subcommand is None:
        list_(context, address, as_json)
    else:
        context.obj = address  # jobs --address URL status is jobs status --address URL


@app.command("list", epilog="Example:  metadist jobs list --address http://HEAD:8265")
def list_(context: typer.Context, address: Address = None, as_json: AsJson = False) -> None:
    """List the jobs that were submitted to the cluster, the newest first."""
    set_up_logging()
    with clean_errors():
        jobs = _cluster(address or context.obj).all()
        width = max((len(job.id) for job in jobs), default=0)
        for job in jobs:
            run_dir = job.metadata.get("metadist.run_dir", "")
            line = f"{job.id:<{width}}  {job.status:<9}  {_when(job.started)}  {_lasted(job):>8}  {run_dir}"
            print(line.rstrip())
        if not jobs:
            say("no jobs")
        if as_json:
            print(json.dumps([_as_dict(job) for job in jobs]))


@app.command(epilog="Example:  metadist jobs status sinusoid-maml-20260101-120000-ab12 --address http://HEAD:8265")
def status(context: typer.Context, id: Name = None, address: Address = None, as_json: AsJson = False) -> None:
    """Show a job's state and the links to its pages."""
    set_up_logging()
    with clean_errors():
        from metadist.jobs.submit import find
        from metadist.storage.run_directory import RunDirectory

        cluster = _cluster(address or context.obj)
        job = find(cluster, id)
        about = _as_dict(job)
        links: dict[str, Any] = {}
        if run_dir := job.metadata.get("metadist.run_dir"):
            try:
                links = RunDirectory(run_dir).read_json("links.json") or {}
            except Exception:  # this machine may not reach a store that the cluster reaches
                pass
        about["mlflow_url"] = links.get("mlflow")
        for key, value in about.items():
            if value not in (None, ""):
                print(f"{key:<14} {value}")
        if as_json:
            print(json.dumps(about))


@app.command(epilog="Example:  metadist jobs logs -f --address http://HEAD:8265")
def logs(
    context: typer.Context,
    id: Name = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Continue until the job ends.")] = False,
    address: Address = None,
) -> None:
    """Show the log of a job's driver."""
    set_up_logging()
    with clean_errors():
        from metadist.jobs.submit import find

        cluster = _cluster(address or context.obj)
        job = find(cluster, id)
        for text in cluster.follow(job.id) if follow else [cluster.logs(job.id)]:
            print(text, end="", flush=True)


@app.command(epilog="Example:  metadist jobs stop sinusoid-maml-20260101-120000-ab12 --address http://HEAD:8265")
def stop(
    context: typer.Context,
    id: Annotated[str, typer.Argument(help="A job's id or a run's.")],
    address: Address = None,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for the job's end.", min=0)] = 150.0,
) -> None:
    """Stop a job after its meta-step, with a checkpoint; submit resumes the run."""
    set_up_logging()
    with clean_errors():
        from metadist.core.errors import ConfigError, WorkerError
        from metadist.jobs.submit import RUN_ID, find

        cluster = _cluster(address or context.obj)
        job = find(cluster, id)
        if job.over:
            raise ConfigError(f"job {job.id} has ended already ({job.status.lower()})")
        cluster.stop(job.id)
        deadline = time.monotonic() + timeout
        while not (job := cluster.job(job.id)).over:
            if time.monotonic() > deadline:
                raise WorkerError(
                    f"job {job.id} is still {job.status.lower()} {timeout:.0f} s after the request to stop; see "
                    f"metadist jobs status {job.id}"
                )
            time.sleep(0.5)
        print(f"{job.id}  {job.status}")
        if job.status == "STOPPED" and RUN_ID in job.metadata:
            say(f"resume: metadist submit … --run-id {job.metadata[RUN_ID]} --address {cluster.address}")


def _announce(submitted: Submitted) -> None:
    say(f"run      {submitted.run_id}" + (f" (attempt {submitted.attempt})" if submitted.attempt > 1 else ""))
    say(f"run dir  {submitted.run_dir}")
    say(f"Ray job  {submitted.job_url}")


def _cluster(address: str | None) -> Any:
    from metadist.core.errors import ConfigError

    address = address or os.environ.get("RAY_API_SERVER_ADDRESS")
    if not address:
        raise ConfigError(
            "--address is missing; expected the URL of the cluster's dashboard, such as http://HEAD:8265 (or "
            "RAY_API_SERVER_ADDRESS)"
        )
    try:
        from metadist.jobs.ray_jobs import RayJobs
    except ModuleNotFoundError as error:
        raise ConfigError(f"jobs need {error.name}, which is not installed; pip install 'ray[default]'") from error
    return RayJobs(address)


def _environment(given: list[str]) -> dict[str, str]:
    from metadist.core.errors import ConfigError

    found = {}
    for item in given:
        name, equals, value = item.partition("=")
        if not name.isidentifier():
            raise ConfigError(f"--env {item}: expected NAME=VALUE, or the NAME of a variable that is set here")
        if not equals and name not in os.environ:
            raise ConfigError(f"--env {name}: the variable is not set here; expected {name}=VALUE")
        found[name] = value if equals else os.environ[name]
    return found


def _wait(cluster: Any, job_id: str) -> str:
    """Show the log and return the job's last status. Ctrl-C does not stop the job."""
    try:
        for text in cluster.follow(job_id):
            print(text, end="", file=sys.stderr, flush=True)
        return cluster.job(job_id).status
    except KeyboardInterrupt:
        say(
            f"\nthe job continues; metadist jobs logs -f {job_id} --address {cluster.address} shows its log, metadist "
            f"jobs stop {job_id} stops it"
        )
        raise typer.Exit(130) from None


def _failed(cluster: Any, job_id: str) -> None:
    from metadist.jobs.submit import why_it_failed

    say(f"error: {why_it_failed(cluster.job(job_id))}")
    raise typer.Exit(1)


def _as_dict(job: Any) -> dict[str, Any]:
    from metadist.jobs.links import JOB_URL
    from metadist.jobs.submit import ATTEMPT, CONFIG, RUN_DIR, RUN_ID, reason

    return {
        "job_id": job.id,
        "status": job.status,
        "run_id": job.metadata.get(RUN_ID),
        "attempt": job.metadata.get(ATTEMPT),
        "run_dir": job.metadata.get(RUN_DIR),
        "config_sha256": job.metadata.get(CONFIG),
        "started": _when(job.started),
        "lasted": _lasted(job),
        "exit_code": job.exit_code,
        "message": reason(job),
        "job_url": job.environment.get(JOB_URL),
    }


def _when(seconds: float | None) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds)) if seconds else ""


def _lasted(job: Any) -> str:
    if not job.started:
        return ""
    seconds = int((job.ended or time.time()) - job.started)
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
