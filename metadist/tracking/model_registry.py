"""Save trained models as MLflow models, register them, and choose the champion by its validation score.

A saved model has all that a new environment needs.
"""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

import metadist
from metadist.core.errors import CheckpointError, ConfigError
from metadist.core.text import without_passwords
from metadist.tracking.mlflow_uri import client_of, prepare_environment, require_mlflow, resolve_uri
from metadist.tracking.spool import read_json

logger = logging.getLogger(__name__)

#: The packages that loading and predicting import. The model itself contains metadist.
REQUIREMENTS = (
    "torch",
    "numpy",
    "safetensors",
    "pydantic",
    "PyYAML",
    "pyarrow",
    "xxhash",
    "fsspec",
    "filelock",
    "psutil",
    "pillow",
)
WEIGHTS, EXAMPLE = "model.safetensors", "example.npz"
CANDIDATE, CHAMPION = "candidate", "champion"
#: tags of a registered version
SCORE, PROTOCOL, MODEL = "metadist.validation", "metadist.protocol", "metadist.model"


def save(folder: Path, source: Path, about: Mapping[str, Any]) -> None:
    """Make an MLflow model in ``folder`` from the exported model and the example of an input in ``source``.

    The model adapts to the support set in its input. Inputs: support_x, support_y, query_x. Output: a row of logits or
    values per query, by name where the model predicts several.
    """
    import mlflow.pyfunc
    from mlflow.models import ModelSignature
    from mlflow.types import ParamSchema, ParamSpec, Schema, TensorSpec

    with np.load(source / EXAMPLE, allow_pickle=False) as found:
        example = dict(found)
    inputs: list[Any] = [TensorSpec(array.dtype, (-1, *array.shape[1:]), name) for name, array in example.items()]
    outputs: list[Any] = [
        TensorSpec(np.dtype(dtype), (-1, *shape), name or None) for name, (shape, dtype) in _predictions(about).items()
    ]
    steps = ParamSchema([ParamSpec("inner_steps", "long", about["inner_steps"])])
    with tempfile.TemporaryDirectory() as place:
        data = Path(place) / "data"
        data.mkdir()
        (data / WEIGHTS).write_bytes((source / WEIGHTS).read_bytes())
        mlflow.pyfunc.save_model(
            str(folder),
            loader_module="metadist.serving.mlflow_model",
            data_path=str(data),
            code_paths=[str(Path(metadist.__file__).parent)],
            pip_requirements=_requirements(),
            signature=ModelSignature(Schema(inputs), Schema(outputs), steps),
            input_example=example,
            metadata={n: str(about[n]) for n in ("run_id", "algorithm", "metric", "weights") if n in about},
        )


def _predictions(about: Mapping[str, Any]) -> Mapping[str, tuple[Sequence[int], str]]:
    """Return the (shape, dtype) of a row of each tensor of a prediction by name; "" is that of a single one.

    A spool of an earlier version states the shape of a single one, or a number of outputs.
    """
    if "predictions" in about:
        return about["predictions"]
    shape = about["prediction_shape"] if "prediction_shape" in about else (about["outputs"],)
    return {"": (shape, about["dtype"])}


def _requirements() -> list[str]:
    found = []
    for name in REQUIREMENTS:
        try:  # a local build such as 2.13.0+cpu is not on every index
            found.append(f"{name}=={version(name).partition('+')[0]}")
        except PackageNotFoundError:
            found.append(name)
    return found


def register(client: Any, name: str, source: str, mlflow_run_id: str, about: Mapping[str, Any]) -> str:
    """Create a version of the registered model ``name``, or find that of an earlier attempt; return its number.

    The version becomes the ``candidate``. It becomes the ``champion`` where the model has none, or where the champion
    validated worse on the same tasks.
    """
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    mine = f"{about['run_id']}/{about['meta_step']}"
    known = [v for v in client.search_model_versions(f"name = '{name}'") if v.tags.get(MODEL) == mine]
    if known:
        made = known[0]
    else:
        tags = {
            MODEL: mine,
            SCORE: repr(about["score"]),
            PROTOCOL: about["protocol"],
            "metadist.metric": about["metric"],
            "metadist.weights": about.get("weights", "trained"),  # a spool of an earlier version has no averages
        }
        made = client.create_model_version(name, source, run_id=mlflow_run_id, tags=tags)
    client.set_registered_model_alias(name, CANDIDATE, made.version)
    champion = _champion(client, name)
    if champion is None or champion.version == made.version or _beats(about, champion):
        client.set_registered_model_alias(name, CHAMPION, made.version)
        logger.info("model %s version %s is the champion (%s %s)", name, made.version, about["metric"], about["score"])
    else:
        logger.info(
            "model %s: version %s stays champion, version %s is the candidate", name, champion.version, made.version
        )
    return str(made.version)


def _champion(client: Any, name: str) -> Any:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version_by_alias(name, CHAMPION)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        return None


def _beats(about: Mapping[str, Any], champion: Any) -> bool:
    """Return whether the score is better than the champion's. Scores on different tasks are not comparable."""
    if champion.tags.get(PROTOCOL) != about["protocol"] or SCORE not in champion.tags:
        logger.warning(
            "the champion was validated on other tasks and stays champion; to replace it, move the alias by hand"
        )
        return False
    there = float(champion.tags[SCORE])
    return about["score"] > there if about["higher_is_better"] else about["score"] < there


def log_and_register(
    client: Any, mlflow_run_id: str, folder: str, source: Path, about: Mapping[str, Any]
) -> str | None:
    """Log the model as the artifact ``folder`` of the run; register it as ``about['register']`` unless that is None."""
    with tempfile.TemporaryDirectory() as place:
        saved = Path(place) / "model"
        save(saved, source, about)
        client.log_artifacts(mlflow_run_id, str(saved), folder)
    if not about["register"]:
        return None
    where = f"{client.get_run(mlflow_run_id).info.artifact_uri}/{folder}"
    return register(client, about["register"], where, mlflow_run_id, about)


def register_now(spool: Path, uri: str | None, runs_root: Path, source: Path, about: Mapping[str, Any]) -> str:
    """Log and register a model of the run that ``spool`` recorded; wait for the server. Return the version."""
    require_mlflow()
    known = read_json(spool / "acked.json").get("mlflow_run_id")
    if known is None:
        raise ConfigError(f"register: MLflow does not have run {about['run_id']}; deliver it first with metadist ui")
    prepare_environment()
    from mlflow.exceptions import MlflowException

    store = resolve_uri(uri, runs_root)
    try:
        made = log_and_register(client_of(store), known, "model", source, about)
    except MlflowException as error:
        raise ConfigError(f"register: MLflow at {without_passwords(store)}: {_short(error)}") from None
    assert made is not None
    return made


def _short(error: Exception) -> str:
    return without_passwords(" ".join(str(error).split()))[:300]


def _files_of(client: Any, uri: str) -> str:
    """Return where the files of a registered model are; other URIs are returned as they are.

    MLflow itself would look in the registry that any code in this process set last.
    """
    found = re.fullmatch(r"models:/([^/@]+)(?:@([^/]+)|/(\d+|latest))", uri)
    if found is None:
        return uri
    name, alias, version = found.groups()
    if alias:
        version = client.get_model_version_by_alias(name, alias).version
    elif version == "latest":
        version = max((int(v.version) for v in client.search_model_versions(f"name='{name}'")), default=0)
    where: str = client.get_model_version_download_uri(name, str(version))
    return where


def fetch(uri: str, runs_root: Path, tracking_uri: str | None = None) -> Path:
    """Download ``models:/NAME@ALIAS``, ``models:/NAME/VERSION`` or ``runs:/…``; return the path of the weights."""
    require_mlflow()
    prepare_environment()
    import mlflow
    from mlflow.exceptions import MlflowException

    store = resolve_uri(tracking_uri, runs_root)
    try:
        where = _files_of(client_of(store), uri)
        folder = Path(mlflow.artifacts.download_artifacts(artifact_uri=where, tracking_uri=store))
    except MlflowException as error:
        raise ConfigError(f"{uri}: {_short(error)} (MLflow at {without_passwords(store)})") from None
    except OSError as error:
        raise CheckpointError(
            f"{uri}: can't be fetched from MLflow at {without_passwords(store)}: {_short(error)}"
        ) from None
    found = sorted(folder.rglob(WEIGHTS))
    if not found:
        raise CheckpointError(
            f"{uri} is not a model of metadist: it has no {WEIGHTS}; expected a model that 'metadist register' or "
            "tracking.register made"
        )
    return found[0]
