"""Write to one MLflow run in one MLflow store, by idempotent operations.

The first use imports mlflow, which takes seconds: use this module from the delivery thread.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from metadist.tracking.mlflow_uri import artifact_location, client_of, prepare_environment, prepare_sqlite

logger = logging.getLogger(__name__)

RUN_TAG = "metadist.run_id"
PARENT_TAG = "mlflow.parentRunId"
#: Without this tag, the UI shows the experiment as traces of a language-model application.
KIND_TAG, KIND = "mlflow.experimentKind", "custom_model_development"


class RunStore:
    """The MLflow run of a ``run_id``, found or created. Every operation can be repeated without harm."""

    def __init__(self, uri: str, experiment: str, runs_root: Path) -> None:
        prepare_environment()
        prepare_sqlite(uri, runs_root)
        self.uri = uri
        self.experiment = experiment
        self.runs_root = Path(runs_root)
        self.run_id = ""
        self.experiment_id = ""
        self.params: dict[str, str] = {}
        self.adopted = False  # the run has points that the position file does not count
        self._client = client_of(uri)

    def open(self, identity: Mapping[str, Any], known: str | None) -> str:
        """Find or create the run, and return its MLflow id.

        The run is ``known``, or the MLflow run that ``identity`` names, or the run with the tag of its ``run_id``.
        """
        self.adopted = False
        run = self._get(known)
        if run is None:
            run = self._get(identity.get("mlflow_run_id"))
            if run is None:
                self.experiment_id = self._experiment()
                with self._creating():
                    run = self._find_or_create(
                        identity["run_id"], identity["name"], identity["start_ms"], identity.get("parent")
                    )
            self.adopted = bool(run.data.metrics)
            if run.info.run_name != identity["name"]:  # a parent that a child created, under its id
                self._client.update_run(run.info.run_id, name=identity["name"])
        if run.info.lifecycle_stage == "deleted":
            logger.warning("MLflow run %s was deleted meanwhile and is restored", run.info.run_id)
            self._client.restore_run(run.info.run_id)
        self.run_id, self.experiment_id = run.info.run_id, run.info.experiment_id
        self.params = dict(run.data.params)
        return self.run_id

    def log(self, metrics: Sequence[dict[str, Any]], params: Sequence[tuple[str, str]], tags: dict[str, str]) -> None:
        """Log one batch with the records' own timestamps: MLflow then drops the metrics that it already has."""
        from mlflow.entities import Metric, Param, RunTag

        tags = dict(tags)
        new: dict[str, str] = {}
        for key, value in params:
            first = self.params.get(key, new.get(key))
            if first is None:
                new[key] = value
            elif first != value:  # params are immutable in MLflow
                logger.warning("param %s was %r and is now %r: recorded as a tag", key, first, value)
                tags[f"metadist.changed.{key}"[:250]] = value
        for chunk in _chunks(list(new.items()), 100):
            self._log_batch(params=[Param(*item) for item in chunk])
        for chunk in _chunks(list(tags.items()), 100):
            self._log_batch(tags=[RunTag(*item) for item in chunk])
        self.params.update(new)
        if metrics:
            self._log_batch(
                metrics=[Metric(m["key"], float(m["value"]), m["timestamp_ms"], m["step"]) for m in metrics]
            )

    def _log_batch(self, **entities: Any) -> None:
        self._client.log_batch(self.run_id, **entities)

    def log_dataset(self, name: str, data: Mapping[str, Any]) -> None:
        """Log the data of the run as an input."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        source, digest = data["source"], data["digest"][:36]  # MLflow keeps 36 characters
        kind = "code" if source.startswith("tasks:") else "local" if "://" not in source else source.partition("://")[0]
        described = json.dumps({"uri": source}), json.dumps(data["about"])
        dataset = Dataset(name[:500], digest, kind, described[0], profile=described[1])
        used = [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])]
        self._client.log_inputs(self.run_id, used)

    def log_artifact(self, path: Path, folder: str) -> None:
        """Upload a file; a later version replaces an earlier one."""
        self._client.log_artifact(self.run_id, str(path), folder or None)

    def log_model(self, folder: str, source: Path, about: Mapping[str, Any]) -> None:
        """Log a model as an artifact, and register it where ``about`` says so; it replaces an earlier model."""
        from metadist.tracking.model_registry import log_and_register

        log_and_register(self._client, self.run_id, folder, source, about)

    def set_status(self, status: str, timestamp_ms: int) -> None:
        """Reopen the run (RUNNING) or end it at ``timestamp_ms``."""
        if status == "RUNNING":
            self._client.update_run(self.run_id, status=status)
        else:
            self._client.set_terminated(self.run_id, status=status, end_time=timestamp_ms)

    def history(self) -> Iterator[tuple[str, int]]:
        """Yield every (key, step) that the run has."""
        for key in self._client.get_run(self.run_id).data.metrics:
            for metric in self._client.get_metric_history(self.run_id, key):
                yield key, metric.step

    def delete_twins(self, run_id: str) -> None:
        """Delete empty runs with the same ``run_id`` tag.

        A server that froze during ``create_run`` creates its run when it continues, after this process made another.
        """
        for run in self._tagged(run_id):
            if run.info.run_id != self.run_id and not run.data.metrics:
                self._client.delete_run(run.info.run_id)

    def _experiment(self) -> str:
        found: Any = self._client.get_experiment_by_name(self.experiment)
        if found is None:
            from mlflow.exceptions import MlflowException

            location = artifact_location(self.uri, self.runs_root)
            try:
                return self._client.create_experiment(
                    self.experiment, artifact_location=location, tags={KIND_TAG: KIND}
                )
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another driver created it
                    raise
                found = self._client.get_experiment_by_name(self.experiment)
        if KIND_TAG not in found.tags:
            self._client.set_experiment_tag(found.experiment_id, KIND_TAG, KIND)
        if found.lifecycle_stage == "deleted":
            logger.warning("MLflow experiment %r was deleted and is restored", self.experiment)
            self._client.restore_experiment(found.experiment_id)
        return found.experiment_id

    def _find_or_create(self, run_id: str, name: str, start_ms: int, parent: str | None) -> Any:
        found = self._tagged(run_id)
        if found:
            return found[0]
        tags = {RUN_TAG: run_id}
        if parent:
            tags[PARENT_TAG] = self._find_or_create(parent, parent, start_ms, None).info.run_id
        return self._client.create_run(self.experiment_id, start_time=start_ms, tags=tags, run_name=name)

    def _tagged(self, run_id: str) -> list[Any]:
        order = ["attributes.start_time ASC", "attributes.run_id ASC"]  # every process chooses the same run
        return list(
            self._client.search_runs(
                [self.experiment_id], f"tags.`{RUN_TAG}` = '{run_id}'", order_by=order, max_results=100
            )
        )

    def _get(self, mlflow_run_id: str | None) -> Any:
        if mlflow_run_id is None:
            return None
        from mlflow.exceptions import MlflowException

        try:
            return self._client.get_run(mlflow_run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None

    @contextlib.contextmanager
    def _creating(self) -> Iterator[None]:
        """Hold a lock, so that of several drivers that start together on one machine one creates the parent run."""
        self.runs_root.mkdir(parents=True, exist_ok=True)
        with FileLock(str(self.runs_root / ".mlflow-create.lock"), timeout=60):
            yield


def _chunks(items: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
