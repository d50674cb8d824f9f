"""Call Ray's Jobs API: submit, list, follow, stop. Every failure is one line with a remedy."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
import urllib.parse
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Before ray, which reads its environment on import:
from metadist.workers.ray import environment as ray_environment  # isort: skip

import ray.exceptions
from ray._private.runtime_env.packaging import GCS_STORAGE_MAX_SIZE
from ray.job_submission import JobDetails, JobSubmissionClient

from metadist.core.errors import ConfigError, WorkerError

#: bytes that Ray accepts as a compressed working directory
WORKING_DIRECTORY_LIMIT = GCS_STORAGE_MAX_SIZE
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
#: seconds for a connection and for an answer
TIMEOUT = (10.0, 120.0)


@dataclass(frozen=True)
class Job:
    """A submitted job, as the cluster describes it. ``started``, ``ended``: seconds since the epoch."""

    id: str
    status: str
    message: str
    metadata: Mapping[str, str]
    started: float | None
    ended: float | None
    exit_code: int | None
    environment: Mapping[str, str]

    @property
    def over(self) -> bool:
        """Whether the job has ended."""
        return self.status in ENDED

    @classmethod
    def of(cls, details: JobDetails) -> Job:
        """Translate Ray's description."""
        started, ended = ((t / 1000 if t else None) for t in (details.start_time, details.end_time))
        environment = (details.runtime_env or {}).get("env_vars") or {}
        return cls(
            details.submission_id or details.job_id or "",
            str(details.status),
            details.message or "",
            details.metadata or {},
            started,
            ended,
            details.driver_exit_code,
            environment,
        )


@dataclass(frozen=True)
class JobRequest:
    """A job to submit: its id, the driver's command, the folder that Ray copies for the driver, and the driver's CPUs.

    With 0 CPUs Ray starts the driver on the head.
    """

    id: str
    entrypoint: str
    folder: Path
    environment: Mapping[str, str]
    metadata: Mapping[str, str]
    cpus: float = 0.0


class _Client(JobSubmissionClient):
    """Ray's client with time-outs: without them it waits for ever for a server that does not answer."""

    def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
        return super()._do_request(method, endpoint, timeout=TIMEOUT, **options)


class RayJobs:
    """The jobs of the cluster whose dashboard is at ``address`` (a URL).

    Every method raises ``ConfigError`` for a missing or wrong token, ``WorkerError`` if the cluster cannot be reached.
    """

    def __init__(self, address: str) -> None:
        self.address = _checked(address)
        for name in ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
            logging.getLogger(name).setLevel(logging.ERROR)  # they log every upload, and a missing token twice
        # Ray prefers these to the address of the call.
        others = {
            name: os.environ.pop(name) for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS") if name in os.environ
        }
        try:
            with self._explained("reach"):
                self._client = _Client(self.address)
        finally:
            os.environ.update(others)

    def submit(self, request: JobRequest) -> None:
        """Start a job in a copy of its folder."""
        with self._explained("submit to"):
            self._client.submit_job(
                entrypoint=request.entrypoint,
                submission_id=request.id,
                metadata=dict(request.metadata),
                runtime_env={"working_dir": str(request.folder), "env_vars": dict(request.environment)},
                entrypoint_num_cpus=request.cpus or None,
            )

    def all(self) -> list[Job]:
        """Return the submitted jobs, the newest first, without drivers that were started without the Jobs API."""
        with self._explained("list the jobs of"):
            jobs = [Job.of(details) for details in self._client.list_jobs() if details.submission_id]
        return sorted(jobs, key=lambda job: job.started or 0.0, reverse=True)

    def job(self, id: str) -> Job:
        """Return one job."""
        with self._explained("ask about a job at"):
            return Job.of(self._client.get_job_info(id))

    def logs(self, id: str) -> str:
        """Return the log of a job's driver."""
        with self._explained("read logs from"):
            return self._client.get_job_logs(id)

    def stop(self, id: str) -> bool:
        """Ask a job to stop; return whether it was running."""
        with self._explained("stop a job at"):
            return bool(self._client.stop_job(id))

    def follow(self, id: str) -> Iterator[str]:
        """Yield the log from its beginning until the job ends; after a broken connection, continue where it broke."""
        shown, failures = 0, 0
        while True:
            seen = 0
            try:
                for text in _synchronously(self._client.tail_job_logs(id)):
                    seen += len(text)
                    if seen > shown:
                        yield text[len(text) - (seen - shown) :]
                        shown, failures = seen, 0
            except (OSError, RuntimeError, ray.exceptions.RayError, asyncio.TimeoutError) as error:
                failures += 1
                if failures > 5:
                    raise WorkerError(
                        f"the connection to the log of {id} failed ({_short(error)}); try metadist jobs logs -f {id}"
                    ) from error
            if self.job(id).over:
                return
            time.sleep(1.0)

    @contextlib.contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        where = f"can't {what} the Ray cluster at {self.address}"
        try:
            yield
        except ray.exceptions.AuthenticationError as error:
            missing = "Authentication required" in str(error)
            raise ConfigError(
                f"{where}: it {'needs a token' if missing else 'does not accept this token'}; set RAY_AUTH_MODE=token "
                "and RAY_AUTH_TOKEN_PATH to a file with the cluster's token (on its head: ray get-auth-token)"
            ) from error
        except (OSError, RuntimeError, ValueError, TypeError, KeyError, ray.exceptions.RayError) as error:
            raise WorkerError(f"{where}: {_short(error)}") from error


def _checked(address: str) -> str:
    """Return the address without a final slash. Raise an error if it is no URL, if nothing listens there, or if Ray's
    token file cannot be read."""
    url = urllib.parse.urlsplit(address)
    try:
        port = url.port or (443 if url.scheme == "https" else 80)
    except ValueError as error:
        raise ConfigError(f"--address {address}: {error}") from error
    if url.scheme not in ("http", "https") or not url.hostname:
        raise ConfigError(f"--address {address}: expected the URL of the cluster's dashboard, such as http://HEAD:8265")
    if path := os.environ.get("RAY_AUTH_TOKEN_PATH"):  # Ray exits without a message if it cannot read the file
        try:
            empty = not Path(path).read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"RAY_AUTH_TOKEN_PATH={path} can't be read: {error}") from error
        if empty:
            raise ConfigError(
                f"RAY_AUTH_TOKEN_PATH={path} is empty; expected the cluster's token (on its head: ray get-auth-token)"
            )
    try:
        ray_environment.reach(f"{url.hostname}:{port}")
    except OSError as error:
        raise WorkerError(
            f"can't reach the Ray cluster at {address}: {error}; is it running, and is its dashboard's port open to "
            "this machine?"
        ) from error
    return address.rstrip("/")


def _synchronously(stream: AsyncIterator[str]) -> Iterator[str]:
    """Iterate over an asynchronous stream in this thread."""
    loop = asyncio.new_event_loop()
    try:
        while True:
            try:
                yield loop.run_until_complete(stream.__anext__())
            except StopAsyncIteration:
                return
    finally:
        with contextlib.suppress(Exception):
            loop.run_until_complete(stream.aclose())  # type: ignore[attr-defined]
        loop.close()


def _short(error: BaseException) -> str:
    """Return the last line with text of an error, which may quote a server's traceback."""
    lines = [line.strip(" .") for line in str(error).replace("\\n", "\n").splitlines() if line.strip(" .")]
    return (lines[-1] if lines else type(error).__name__)[:300]
