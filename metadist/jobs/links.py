"""Where a run can be looked at: the pages of its job in the Ray dashboard and of its run in MLflow."""

from __future__ import annotations

import json
import logging
import os

from metadist.core.errors import MetadistError
from metadist.storage.run_directory import RunDirectory

log = logging.getLogger(__name__)

#: what a job's driver is told of itself, in its environment
JOB_ID, JOB_URL = "METADIST_JOB_ID", "METADIST_JOB_URL"
FILE = "links.json"


def job_url() -> str | None:
    """The Ray dashboard's page of the job that this process drives, if it drives one."""
    return os.environ.get(JOB_URL) or None


def tags() -> dict[str, str]:
    """For the MLflow run; MLflow shows the note at the head of the run's page, as Markdown."""
    if not (url := job_url()):
        return {}
    return {
        "ray.job_id": os.environ.get(JOB_ID, ""),
        "ray.job_url": url,
        "mlflow.note.content": f"[Ray job {os.environ.get(JOB_ID, '')}]({url})",
    }


def record(folder: RunDirectory, mlflow_url: str | None) -> None:
    """``links.json`` in the run's folder, where there is a link."""
    links = {"ray_job": job_url(), "mlflow": mlflow_url}
    if not any(links.values()):
        return
    try:
        folder.write(
            FILE, json.dumps({**(folder.read_json(FILE) or {}), **{k: v for k, v in links.items() if v}}, indent=1)
        )
    except MetadistError as error:  # not worth a run
        log.warning("%s", error)
