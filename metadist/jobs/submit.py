"""A training run as a job of a Ray cluster: what travels there, under which name, and how a run that was there before goes on."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import sys
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
from metadist.config.schema import flatten
from metadist.core.errors import ConfigError, MetadistError, WorkerError
from metadist.jobs.links import JOB_ID, JOB_URL
from metadist.jobs.ray_jobs import WORKING_DIRECTORY_LIMIT, Job, RayJobs
from metadist.storage.run_directory import RunDirectory, new_run_id, runs_root

#: keys of a job's metadata
RUN_ID, RUN_DIR, CONFIG, ATTEMPT = "metadist.run_id", "metadist.run_dir", "metadist.config_sha256", "metadist.attempt"
#: given on by name where they are set here; all else by --env
GIVEN_ON = ("METADIST_DATA", "MLFLOW_TRACKING_URI")
#: seconds for a stopped driver to end its meta-step and write a checkpoint; Ray's own 3 don't do
STOPPING = 120
#: beside the modules that a config names
NOT_SHIPPED = {"__pycache__", ".git", ".venv", "node_modules", "runs", "data"}


@dataclass(frozen=True)
class Submitted:
    """A run under way as a job."""

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
    """What is asked of the cluster, beside the config."""

    run_id: str | None = None
    run_dir: str | None = None
    data: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    driver_cpus: float = 0.0


# Submitting -----------------------------------------------------------------------------------------------------------


def submit(cluster: RayJobs, document: dict[str, Any], request: Request) -> Submitted:
    """Begin a run as a job, or go on with one: the driver resumes from what it finds at the run's directory."""
    config = build(document)
    document = config.document
    jobs = cluster.all()
    run_id, run_dir = _which_run(request, config.name, jobs)
    earlier = [job for job in jobs if job.metadata.get(RUN_ID) == run_id]
    for job in earlier:
        if not job.over:
            raise ConfigError(
                f"run {run_id} is {job.status.lower()} as job {job.id}; two drivers would write into one run: stop it first (metadist jobs stop {job.id})"
            )
    attempt = 1 + max((int(job.metadata.get(ATTEMPT, 0)) for job in earlier), default=0)
    job_id = f"{run_id}-{attempt}"
    url = f"{cluster.address}/#/jobs/{job_id}"
    digest = config_sha256(document)
    with working_directory(document) as folder:
        cluster.submit(
            job_id,
            entrypoint(run_id, run_dir),
            folder=folder,
            environment={**_environment(request, run_dir), JOB_ID: job_id, JOB_URL: url},
            metadata={
                RUN_ID: run_id,
                RUN_DIR: run_dir,
                CONFIG: digest,
                ATTEMPT: str(attempt),
                "metadist.name": config.name,
                "metadist.version": metadist.__version__,
            },
            cpus=request.driver_cpus,
        )
    return Submitted(run_id, run_dir, job_id, attempt, url, digest)


def entrypoint(run_id: str, run_dir: str) -> str:
    """The driver's command. With ``--resume`` from the first attempt on: whoever starts it again goes on with the run."""
    return shlex.join(["metadist", "train", "config.yaml", "--run-dir", run_dir, "--run-id", run_id, "--resume"])


def config_sha256(document: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _which_run(request: Request, name: str, jobs: Sequence[Job]) -> tuple[str, str]:
    """(run id, run directory): of the run that was asked for by either, else of a new one."""
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
            f"--run-id '{run_id}' must be 1 to 120 letters, digits, '.', '_' or '-', since it names a folder and a job"
        )
    return run_id, _reachable(run_dir or f"{runs_root()}/{run_id}")


def _reachable(run_dir: str) -> str:
    if "://" not in run_dir and not os.path.isabs(run_dir):
        raise ConfigError(
            f"run_dir '{run_dir}' is relative, and a job has no lasting working directory; give --run-dir (or METADIST_RUNS) a URL such "
            "as s3://bucket/runs/a, or an absolute path on a disk that every node has"
        )
    return run_dir


def _run_id_at(run_dir: str) -> str | None:
    """Whose folder it is, if that can be seen from here: the cluster may reach what this machine doesn't."""
    if "://" not in run_dir and not os.path.isabs(run_dir):
        return None
    try:
        about = RunDirectory(run_dir).read_json("run.json")
    except Exception:  # whatever a store's library raises for a lack of keys, network or itself
        return None
    return str(about["run_id"]) if about else None


def _environment(request: Request, run_dir: str) -> dict[str, str]:
    given = {name: os.environ[name] for name in GIVEN_ON if os.environ.get(name)}
    if request.data:
        given["METADIST_DATA"] = request.data
    data = given.get("METADIST_DATA", "")
    if data and "://" not in data:
        given["METADIST_DATA"] = os.path.abspath(os.path.expanduser(data))
    root = run_dir.rpartition("/")[0]
    return {"METADIST_RUNS": root, "RAY_JOB_STOP_WAIT_TIME_S": str(STOPPING), **given, **request.environment}


# What travels ---------------------------------------------------------------------------------------------------------


@contextmanager
def working_directory(document: dict[str, Any]) -> Iterator[Path]:
    """A folder with what a driver needs and nothing else: the resolved config, the user's modules that it names, initial parameters."""
    with tempfile.TemporaryDirectory(prefix="metadist-job-") as temporary:
        folder = Path(temporary)
        document = dict(document)
        document["init_from"] = _initial(document.get("init_from"), folder)
        for source, target in own_modules(document).items():
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
            f"init_from: '{source}' is a folder of this machine; give the run's URL, or a .safetensors file (metadist export), which goes along"
        )
    try:
        shutil.copyfile(source, folder / "init.safetensors")
    except OSError as error:
        raise ConfigError(f"init_from: '{source}' can't be read: {error}") from error
    return "init.safetensors"


def own_modules(document: Mapping[str, Any]) -> dict[Path, str]:
    """File → its place below the working directory, of modules that the config names by import path and of those beside them that
    they import. Of a package all its Python files. What is installed stays: the nodes must have it."""
    named = {
        v.partition(":")[0] for k, v in flatten(dict(document)).items() if isinstance(v, str) and _is_import_path(k, v)
    }
    files: dict[Path, str] = {}
    roots = set()
    for name in sorted(named):
        top = _origin(name.partition(".")[0])
        if top is not None:
            roots.add(top.parent.parent if top.name == "__init__.py" else top.parent)
    for name in {n.partition(".")[0] for n in [*sys.modules, *named]}:
        top = _origin(name)
        if top is None:
            continue
        root = top.parent.parent if top.name == "__init__.py" else top.parent
        if root in roots:
            found = top.parent.rglob("*.py") if top.name == "__init__.py" else [top]
            files.update(
                {f: str(f.relative_to(root)) for f in found if not NOT_SHIPPED & set(f.relative_to(root).parts)}
            )
    return files


def _is_import_path(key: str, value: str) -> bool:
    module, colon, name = value.partition(":")
    return (
        bool(colon)
        and (key.endswith("name") or key in ("loss", "metric"))
        and all(p.isidentifier() for p in [*module.split("."), *name.split(".")])
    )


def _origin(module: str) -> Path | None:
    """Where a top-level module's file is, if it is the user's own: neither installed nor Python's nor metadist."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError, AttributeError):
        return None
    if spec is None or not spec.origin or not spec.origin.endswith(".py") or module in ("metadist", "__main__"):
        return None
    origin = Path(spec.origin).resolve()
    installed = {Path(p).resolve() for p in (sys.prefix, sys.base_prefix)}
    if (
        any(p in origin.parents for p in installed)
        or "site-packages" in origin.parts
        or Path(metadist.__file__).resolve().parent in origin.parents
    ):
        return None
    return origin


def _check_size(folder: Path) -> None:
    """Against Ray's limit, on what it would send."""
    files = sorted((p for p in folder.rglob("*") if p.is_file()), key=lambda p: -p.stat().st_size)
    with tempfile.TemporaryFile() as archive:
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
            for path in files:
                packed.write(path, path.relative_to(folder))
        size = archive.tell()
    if size >= WORKING_DIRECTORY_LIMIT:
        largest = ", ".join(f"{p.relative_to(folder)} {p.stat().st_size / 2**20:.0f} MiB" for p in files[:3])
        raise ConfigError(
            f"the job's files come to {size / 2**20:.0f} MiB, Ray takes {WORKING_DIRECTORY_LIMIT / 2**20:.0f} MiB; the largest: {largest}. "
            "Give init_from a URL, and install large modules on the nodes"
        )


# Afterwards -----------------------------------------------------------------------------------------------------------


def find(cluster: RayJobs, name: str | None) -> Job:
    """The job of that id, or the newest of the run of that id; without a name the newest of all."""
    jobs = cluster.all()
    if not jobs:
        raise ConfigError(f"the Ray cluster at {cluster.address} has no jobs")
    for job in jobs:
        if name is None or name in (job.id, job.metadata.get(RUN_ID)):
            return job
    raise ConfigError(
        f"'{name}' is neither a job nor a run of the cluster at {cluster.address}; metadist jobs list names them"
    )


def reason(job: Job) -> str:
    """What a job says of its end, in one line: of the log that Ray quotes, the error, or else the last line."""
    what, quoted, log = job.message.partition(", last available logs")
    lines = [line.strip() for line in log.splitlines()[1:] if line.strip()]
    said = next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1] if lines else "")
    return ": ".join(" ".join(part.split()) for part in (what, said) if part.strip())[:400]


def why_it_failed(job: Job) -> MetadistError:
    """One line on a job that ended badly, with what to do."""
    again = (
        f"metadist submit … --run-id {job.metadata[RUN_ID]} goes on with it"
        if RUN_ID in job.metadata
        else "submit it again"
    )
    if job.exit_code == 127:
        return WorkerError(
            f"job {job.id}: the cluster's nodes have no metadist; install it where Ray runs (pip install metadist), or start Ray with "
            "its environment first on PATH"
        )
    if job.exit_code is not None and job.exit_code < 0 or job.exit_code in (137, 139):
        return WorkerError(f"job {job.id}: its driver was killed (exit code {job.exit_code}); {again}")
    return WorkerError(f"job {job.id} {job.status.lower()}: {reason(job) or 'no reason given'}; {again}")
