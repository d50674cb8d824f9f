"""Ray's Jobs API, as far as metadist uses it: submit, list, follow, stop. Every failure is one line that says what to do."""

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

from metadist.workers.ray import environment as ray_environment  # isort: skip  (must precede ray, which reads its environment on import)

import ray.exceptions
from ray._private.runtime_env.packaging import GCS_STORAGE_MAX_SIZE
from ray.job_submission import JobDetails, JobSubmissionClient

from metadist.core.errors import ConfigError, WorkerError

#: what Ray takes as a working directory, compressed
WORKING_DIRECTORY_LIMIT = GCS_STORAGE_MAX_SIZE
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
#: seconds for a connection, and for an answer
TIMEOUT = (10.0, 120.0)


@dataclass(frozen=True)
class Job:
    """A submitted job, as the cluster knows it."""

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
        return self.status in ENDED

    @classmethod
    def of(cls, details: JobDetails) -> Job:
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


class _Client(JobSubmissionClient):
    """Ray's, which would wait for ever on a server that doesn't answer."""

    def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
        return super()._do_request(method, endpoint, timeout=TIMEOUT, **options)


class RayJobs:
    """The jobs of the cluster whose dashboard is at ``address``."""

    def __init__(self, address: str) -> None:
        self.address = _checked(address)
        for name in ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
            logging.getLogger(name).setLevel(logging.ERROR)  # they report every upload, and a missing token twice
        # Ray lets these override the address that it is given.
        others = {
            name: os.environ.pop(name) for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS") if name in os.environ
        }
        try:
            with self._explained("reach"):
                self._client = _Client(self.address)
        finally:
            os.environ.update(others)

    def submit(
        self,
        submission_id: str,
        entrypoint: str,
        *,
        folder: Path,
        environment: Mapping[str, str],
        metadata: Mapping[str, str],
        cpus: float = 0.0,
    ) -> None:
        """Begin ``entrypoint`` in a copy of ``folder``: on the head, or where ``cpus`` are to be had."""
        with self._explained("submit to"):
            self._client.submit_job(
                entrypoint=entrypoint,
                submission_id=submission_id,
                metadata=dict(metadata),
                runtime_env={"working_dir": str(folder), "env_vars": dict(environment)},
                entrypoint_num_cpus=cpus or None,
            )

    def all(self) -> list[Job]:
        """Submitted ones, the newest first; what drivers began without the Jobs API is none of them."""
        with self._explained("list the jobs of"):
            jobs = [Job.of(details) for details in self._client.list_jobs() if details.submission_id]
        return sorted(jobs, key=lambda job: job.started or 0.0, reverse=True)

    def job(self, id: str) -> Job:
        with self._explained("ask about a job at"):
            return Job.of(self._client.get_job_info(id))

    def logs(self, id: str) -> str:
        with self._explained("read logs from"):
            return self._client.get_job_logs(id)

    def stop(self, id: str) -> bool:
        with self._explained("stop a job at"):
            return bool(self._client.stop_job(id))

    def follow(self, id: str) -> Iterator[str]:
        """The log from its beginning, as it grows, until the job is over. A connection that breaks is taken up where it broke."""
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
                        f"the log of {id} broke off ({_short(error)}); metadist jobs logs -f {id} goes on"
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
                f"{where}: it {'asks for a token' if missing else 'does not accept this token'}; set RAY_AUTH_MODE=token and "
                f"RAY_AUTH_TOKEN_PATH to a file with {'it' if missing else 'the right one'} (on its head: ray get-auth-token)"
            ) from error
        except (OSError, RuntimeError, ValueError, TypeError, KeyError, ray.exceptions.RayError) as error:
            raise WorkerError(f"{where}: {_short(error)}") from error


def _checked(address: str) -> str:
    """The address, if it can be one and something listens there; Ray's token file, if it can be read."""
    url = urllib.parse.urlsplit(address)
    try:
        port = url.port or (443 if url.scheme == "https" else 80)
    except ValueError as error:
        raise ConfigError(f"--address {address}: {error}") from error
    if url.scheme not in ("http", "https") or not url.hostname:
        raise ConfigError(f"--address {address}: expected the URL of the cluster's dashboard, such as http://HEAD:8265")
    if path := os.environ.get("RAY_AUTH_TOKEN_PATH"):  # of a path that it can't read Ray dies without a word
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
            f"can't reach the Ray cluster at {address}: {error}; is it up, and is its dashboard's port open to this machine?"
        ) from error
    return address.rstrip("/")


def _synchronously(stream: AsyncIterator[str]) -> Iterator[str]:
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
    """Of what the server quotes, the last line that says something."""
    lines = [line.strip(" .") for line in str(error).replace("\\n", "\n").splitlines() if line.strip(" .")]
    return (lines[-1] if lines else type(error).__name__)[:300]
