"""Link a run to its pages: its job in the Ray dashboard, its run in MLflow."""

from __future__ import annotations

import json
import logging
import os

from metadist.core.errors import MetadistError
from metadist.storage.run_directory import RunDirectory

log = logging.getLogger(__name__)

#: environment variables of a job's driver: its own id and page
JOB_ID, JOB_URL = "METADIST_JOB_ID", "METADIST_JOB_URL"
FILE = "links.json"


def job_url() -> str | None:
    """Return the Ray dashboard's page of the job that this process drives, if it drives one."""
    return os.environ.get(JOB_URL) or None


def job_link() -> str:
    """Return a Markdown link to the page of the job that this process drives; empty without a job."""
    url = job_url()
    return f"[Ray job {os.environ.get(JOB_ID, '')}]({url})" if url else ""


def tags() -> dict[str, str]:
    """Return the MLflow run's tags. MLflow shows the note as Markdown at the top of the run's page."""
    if not (url := job_url()):
        return {}
    return {
        "ray.job_id": os.environ.get(JOB_ID, ""),
        "ray.job_url": url,
        "mlflow.note.content": job_link(),
    }


def record(folder: RunDirectory, mlflow_url: str | None) -> None:
    """Write the known links to ``links.json`` in the run's directory; on failure, warn and continue."""
    links = {"ray_job": job_url(), "mlflow": mlflow_url}
    if not any(links.values()):
        return
    try:
        known = {**(folder.read_json(FILE) or {}), **{k: v for k, v in links.items() if v}}
        folder.write(FILE, json.dumps(known, indent=1))
    except MetadistError as error:
        log.warning("%s", error)
