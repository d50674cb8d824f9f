"""Submit a training run as a job of a Ray cluster, resume an earlier run, find a job and explain its failure."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shlex
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

import metadist
from metadist.config.build import build
from metadist.core.errors import ConfigError, MetadistError, WorkerError
from metadist.core.text import has_password
from metadist.jobs.links import JOB_ID, JOB_URL
from metadist.jobs.modules import shipment
from metadist.jobs.ray_jobs import WORKING_DIRECTORY_LIMIT, Job, JobRequest, RayJobs
from metadist.storage.run_directory import RunDirectory, new_run_id, refuse_password, runs_root

#: keys of a job's metadata
RUN_ID, RUN_DIR, CONFIG, ATTEMPT = "metadist.run_id", "metadist.run_dir", "metadist.config_sha256", "metadist.attempt"
#: environment variables that the job gets where they are set here; --env gives it others
FORWARDED = ("METADIST_DATA", "MLFLOW_TRACKING_URI")
#: seconds for a stopped driver to finish its meta-step and write a checkpoint; Ray's default of 3 is too short
STOPPING = 120

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Submitted:
    """A run that was submitted as a job."""

    run_id: str
    run_dir: str
    job_id: str
    attempt: int
    job_url: str
    config_sha256: str

    def as_dict(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass(frozen=True)
class Request:
    """The options of ``metadist submit``, without the config. ``modules``: modules to ship besides the config's.

    ``trust``: modules that the config of the run in ``init_from`` may name.
    """

    run_id: str | None = None
    run_dir: str | None = None
    data: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    driver_cpus: float = 0.0
    modules: Sequence[str] = ()
    trust: Sequence[str] = ()


# Submitting -----------------------------------------------------------------------------------------------------------


def submit(cluster: RayJobs, document: dict[str, Any], request: Request) -> Submitted:
    """Start a run as a job, or resume one: the driver resumes from the newest checkpoint in the run's directory.

    Raises ``ConfigError`` for a run that is running already, and for a config that cannot run on other machines.
    """
    config = build(document)
    document = config.document
    jobs = cluster.all()
    run_id, run_dir = _which_run(request, config.name, jobs)
    earlier = [job for job in jobs if job.metadata.get(RUN_ID) == run_id]
    for job in earlier:
        if not job.over:
            raise ConfigError(
                f"run {run_id} is {job.status.lower()} as job {job.id}; two drivers would write into one run: stop the "
                f"job first (metadist jobs stop {job.id})"
            )
    attempt = 1 + max((int(job.metadata.get(ATTEMPT, 0)) for job in earlier), default=0)
    job_id = f"{run_id}-{attempt}"
    url = f"{cluster.address}/#/jobs/{job_id}"
    digest = config_sha256(document)
    metadata = {
        RUN_ID: run_id,
        RUN_DIR: run_dir,
        CONFIG: digest,
        ATTEMPT: str(attempt),
        "metadist.name": config.name,
        "metadist.version": metadist.__version__,
    }
    environment = {**_environment(request, run_dir), JOB_ID: job_id, JOB_URL: url}
    with working_directory(document, request.modules) as folder:
        cluster.submit(
            JobRequest(
                job_id, entrypoint(run_id, run_dir, request.trust), folder, environment, metadata, request.driver_cpus
            )
        )
    return Submitted(run_id, run_dir, job_id, attempt, url, digest)


def entrypoint(run_id: str, run_dir: str, trust: Sequence[str] = ()) -> str:
    """Return the driver's command. Every attempt has ``--resume``, so that a restart resumes the run."""
    options = ["--run-dir", run_dir, "--run-id", run_id, "--resume", *(f"--trust={name}" for name in trust)]
    return shlex.join(["metadist", "train", "config.yaml", *options])


def config_sha256(document: Mapping[str, Any]) -> str:
    """Return the hash of a resolved config, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _which_run(request: Request, name: str, jobs: Sequence[Job]) -> tuple[str, str]:
    """Return (run id, run directory) of the run that the request names by either, else of a new run."""
    known = [
        (job.metadata[RUN_ID], job.metadata[RUN_DIR])
        for job in jobs
        if RUN_ID in job.metadata and RUN_DIR in job.metadata
    ]
    run_id, run_dir = request.run_id, request.run_dir.rstrip("/") if request.run_dir else None
    if run_dir is not None:
        found = _run_id_at(run_dir) or next((i for i, where in known if where == run_dir), None)
        if found and run_id and found != run_id:
            raise ConfigError(f"--run-id {run_id}: the run in {run_dir} is {found}")
        run_id = run_id or found
    elif run_id is not None:
        run_dir = next((where for i, where in known if i == run_id), None)
    run_id = run_id or new_run_id(name)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,119}", run_id):
        raise ConfigError(
            f"--run-id '{run_id}' must be 1 to 120 letters, digits, '.', '_' or '-': it names a folder and a job"
        )
    return run_id, _reachable(run_dir or f"{runs_root()}/{run_id}")


def _reachable(run_dir: str) -> str:
    refuse_password(run_dir)
    if "://" not in run_dir and not os.path.isabs(run_dir):
        raise ConfigError(
            f"run_dir '{run_dir}' is relative, and a job has no lasting working directory; give --run-dir (or "
            "METADIST_RUNS) a URL such as s3://bucket/runs/a, or an absolute path on a disk that every node has"
        )
    return run_dir


def _run_id_at(run_dir: str) -> str | None:
    """Return the id of the run in a directory; None if this machine cannot read it (the cluster may)."""
    if "://" not in run_dir and not os.path.isabs(run_dir):
        return None
    try:
        about = RunDirectory(run_dir).read_json("run.json")
    except Exception:  # each store's library raises its own errors for missing keys, network or packages
        return None
    return str(about["run_id"]) if about else None


def _environment(request: Request, run_dir: str) -> dict[str, str]:
    given = {name: os.environ[name] for name in FORWARDED if os.environ.get(name)}
    if has_password(given.get("MLFLOW_TRACKING_URI", "")) and "MLFLOW_TRACKING_URI" not in request.environment:
        del given["MLFLOW_TRACKING_URI"]
        log.warning(
            "MLFLOW_TRACKING_URI has a password, which everyone with the cluster's token could read, and is not sent; "
            "set it on the nodes, or send it by --env MLFLOW_TRACKING_URI"
        )
    if request.data:
        given["METADIST_DATA"] = request.data
    data = given.get("METADIST_DATA", "")
    if data and "://" not in data:
        given["METADIST_DATA"] = os.path.abspath(os.path.expanduser(data))
    root = run_dir.rpartition("/")[0]
    return {"METADIST_RUNS": root, "RAY_JOB_STOP_WAIT_TIME_S": str(STOPPING), **given, **request.environment}


# The job's files ------------------------------------------------------------------------------------------------------


@contextmanager
def working_directory(document: dict[str, Any], modules: Sequence[str] = ()) -> Iterator[Path]:
    """Yield a folder with the driver's files: the resolved config, the user's modules, initial parameters.

    ``modules``: names of modules to ship with those that the config names. Logs a note for each module that the nodes
    must have by themselves.
    """
    with tempfile.TemporaryDirectory(prefix="metadist-job-") as temporary:
        folder = Path(temporary)
        document = dict(document)
        document["init_from"] = _initial(document.get("init_from"), folder)
        chosen = shipment(document, modules)
        for note in chosen.notes:
            log.warning("%s", note)
        for source, target in chosen.files.items():
            (folder / target).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, folder / target)
        (folder / "config.yaml").write_text(
            yaml.safe_dump(document, sort_keys=False, allow_unicode=True), encoding="utf-8"
        )
        _check_size(folder)
        yield folder


def _initial(source: str | None, folder: Path) -> str | None:
    if source is None or "://" in source:
        return source
    if not source.endswith(".safetensors"):
        raise ConfigError(
            f"init_from: '{source}' is a folder of this machine; give the run's URL, or a .safetensors file (metadist "
            "export), which is shipped with the job"
        )
    try:
        shutil.copyfile(source, folder / "init.safetensors")
    except OSError as error:
        raise ConfigError(f"init_from: '{source}' can't be read: {error}") from error
    return "init.safetensors"


def _check_size(folder: Path) -> None:
    """Raise ``ConfigError`` if the files, compressed as Ray compresses them, exceed Ray's limit."""
    files = sorted((p for p in folder.rglob("*") if p.is_file()), key=lambda p: -p.stat().st_size)
    with tempfile.TemporaryFile() as archive:
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
            for path in files:
                packed.write(path, path.relative_to(folder))
        size = archive.tell()
    if size >= WORKING_DIRECTORY_LIMIT:
        largest = ", ".join(f"{p.relative_to(folder)} {p.stat().st_size / 2**20:.0f} MiB" for p in files[:3])
        raise ConfigError(
            f"the job's files have {size / 2**20:.0f} MiB, Ray accepts {WORKING_DIRECTORY_LIMIT / 2**20:.0f} MiB; the "
            f"largest: {largest}. Give init_from a URL, and install large modules on the nodes"
        )


# Submitted jobs -------------------------------------------------------------------------------------------------------


def find(cluster: RayJobs, name: str | None) -> Job:
    """Return the job of that id, or the newest job of the run of that id; without a name the newest of all."""
    jobs = cluster.all()
    if not jobs:
        raise ConfigError(f"the Ray cluster at {cluster.address} has no jobs")
    for job in jobs:
        if name is None or name in (job.id, job.metadata.get(RUN_ID)):
            return job
    raise ConfigError(
        f"'{name}' is neither a job nor a run of the cluster at {cluster.address}; metadist jobs list shows all"
    )


def reason(job: Job) -> str:
    """Return the reason for a job's end in one line: from the log that Ray quotes, the error, else the last line."""
    what, quoted, log = job.message.partition(", last available logs")
    lines = [line.strip() for line in log.splitlines()[1:] if line.strip()]
    said = next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1] if lines else "")
    return ": ".join(" ".join(part.split()) for part in (what, said) if part.strip())[:400]


def why_it_failed(job: Job) -> MetadistError:
    """Return one line about a job that failed, with a remedy."""
    again = "submit it again"
    if RUN_ID in job.metadata:
        again = f"metadist submit … --run-id {job.metadata[RUN_ID]} resumes the run"
    if job.exit_code == 127:
        return WorkerError(
            f"job {job.id}: the cluster's nodes have no metadist; install it where Ray runs (pip install metadist), or "
            "start Ray with its environment first on PATH"
        )
    if job.exit_code is not None and job.exit_code < 0 or job.exit_code in (137, 139):
        return WorkerError(f"job {job.id}: its driver was killed (exit code {job.exit_code}); {again}")
    ended = reason(job)
    if module := re.search(r"No module named '(\w+)", ended):
        again += f"; add --module {module[1]}, or install {module[1]} on the nodes"
    return WorkerError(f"job {job.id} {job.status.lower()}: {ended or 'no reason given'}; {again}")
