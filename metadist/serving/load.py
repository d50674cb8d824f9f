"""Load trained models from runs, exported files or the model registry, and start servers for them."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Union

import torch

from metadist.config.build import build_foreign
from metadist.config.experiment import Experiment
from metadist.config.schema import Document
from metadist.config.trust import trusted
from metadist.core.errors import CheckpointError, ConfigError, nearest, one_of
from metadist.core.signature import Signature
from metadist.core.state import State
from metadist.experiment.load import load_run
from metadist.experiment.result import SLOTS, signature_of
from metadist.learners import FewShotLearner, supervised
from metadist.storage.checkpoints import exported_metadata, load_parameters

if TYPE_CHECKING:
    from metadist.rpc.endpoint import Endpoint
    from metadist.serving.model import ServedModel
    from metadist.serving.service import AdaptationService

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Serving:
    """The options of serving; each field is an option of ``metadist serve``. Plain data, so Ray Serve can send it."""

    sources: tuple[str, ...]
    normalization: str | None = None
    device: str = "cpu"
    threads: int | None = None
    max_batch: int = 64
    batch_wait_ms: float = 2.0
    budget_mib: float = 256.0
    max_support: int = 1000
    max_queries: int = 1000
    max_inner_steps: int = 100
    trust: tuple[str, ...] = ()


def open_model(
    source: str,
    *,
    normalization: str | None = None,
    device: str = "cpu",
    trust: Sequence[str] = (),
    **limits: Any,
) -> ServedModel:
    """Load a model for serving.

    ``source`` is a run directory, a file of ``metadist export``, or a registered model (``models:/NAME@champion``);
    NAME=SOURCE gives the model another name. ``trust``: the modules that the source's config may name. ``limits`` are
    fields of ``model.Limits``.

    Raises ``ConfigError`` or ``CheckpointError`` if the source cannot be loaded or served.
    """
    from metadist.serving.model import Limits, ServedModel

    name, separator, location = source.partition("=")
    if not separator or "/" in name or ":" in name:
        name, location = "", source
    if location.startswith(("models:/", "runs:/")):
        from metadist.experiment.registration import fetch_registered

        location = fetch_registered(location)
    read = _exported if location.endswith(".safetensors") else _run
    origin, experiment, state, signature, weights = read(location, trust)
    if reason := experiment.learner.servable():
        raise ConfigError(f"serve: {location} cannot be served: {reason}")
    learner = supervised(experiment.learner)
    if normalization is not None:
        one_of("--normalization", normalization, ("transductive", "inductive"))
        learner.normalize(normalization)
    move_to_device(learner, device)
    decode = learner.tasks.decode
    images = None if decode is None else (decode.size, decode.channels, decode.invert, decode.white)
    table, bounds = learner.tasks.columns, Limits(**limits)
    return ServedModel(name or experiment.name, learner, state, origin, bounds, images, table, signature, weights)


Loaded = tuple[str, Experiment, State, Union[Signature, None], str]
"""(run id, experiment, state, what training recorded of inputs and targets, the kind of the weights)."""


def _run(location: str, trust: Sequence[str]) -> Loaded:
    loaded = load_run(location, trust=trust)
    return loaded.run_id, loaded.experiment, loaded.state, loaded.recorded, loaded.weights


def _exported(path: str, trust: Sequence[str]) -> Loaded:
    metadata, tensors = exported_metadata(path), load_parameters(path)
    if "config" not in metadata:
        raise CheckpointError(f"{path} has parameters but no config; export it again by 'metadist export RUN {path}'")
    experiment = build_foreign(_document(metadata["config"], path), f"file '{path}'", trust)
    learner = experiment.learner
    initial = learner.initial(experiment.seed)
    if learner.servable() is not None:
        return metadata.get("run_id", ""), experiment, initial, None, initial.weights
    slots = {}
    for name, vector in initial.slots.items():
        layout = learner.slots[name].layout
        named = {n: tensors.get(n, tensors.get(f"{SLOTS}{name}/{n}")) for n in layout.names}
        if name in learner.algorithm.slots(learner.model, learner.model.initial(0)[0]):
            named = {n: tensors.get(f"{SLOTS}{name}/{n}") for n in layout.names}
        for n, shape in zip(layout.names, layout.shapes):
            tensor = named[n]
            if tensor is None or tuple(tensor.shape) != tuple(shape):
                found = "missing" if tensor is None else f"of shape {list(tensor.shape)}"
                raise CheckpointError(f"{path}: '{n}' of {name} is {found}; expected shape {list(shape)}")
        slots[name] = layout.flatten({n: t.to(vector.dtype) for n, t in named.items() if t is not None})
    weights = metadata.get("weights", "trained")
    return metadata.get("run_id", ""), experiment, State(slots, {}), signature_of(metadata), weights


def _document(text: str, path: str) -> Document:
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: its config is damaged: {error}") from error


def move_to_device(learner: FewShotLearner, device: str) -> None:
    """Move the learner's model to ``device``. The data of its tasks stays where it is, and need not exist.

    Raises ``ConfigError`` if PyTorch cannot use the device.
    """
    try:
        place = torch.device(device)
        torch.zeros(1, device=place)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {device}: can't be used ({str(error).splitlines()[0]}); use cpu") from None
    learner.model.to(place)
    learner.device = place


def build_service(serving: Serving, shared_cache: Callable[..., Any] | None = None) -> AdaptationService:
    """Build the adaptation service without starting a server.

    ``shared_cache`` calls a method of the cache of all replicas; None for a single server.
    """
    from metadist.serving.service import MIB, AdaptationService

    if serving.threads is not None:
        torch.set_num_threads(serving.threads)
    limits = {"support": serving.max_support, "queries": serving.max_queries, "inner_steps": serving.max_inner_steps}
    models = [
        open_model(source, normalization=serving.normalization, device=serving.device, trust=serving.trust, **limits)
        for source in serving.sources
    ]
    for model in models:
        model.warm_up()
    budget, max_wait = int(serving.budget_mib * MIB), serving.batch_wait_ms / 1000
    return AdaptationService(
        models, budget=budget, largest=serving.max_batch, max_wait=max_wait, shared_cache=shared_cache
    )


@dataclass(frozen=True)
class RunningServer:
    """The addresses of a running server: HOST:PORT of gRPC, and the URL of HTTP or None."""

    address: str
    http_address: str | None
    service: AdaptationService


@contextmanager
def serve(service: AdaptationService, endpoint: Endpoint, http_port: int | None = None) -> Iterator[RunningServer]:
    """Serve over gRPC during the block, and over HTTP if ``http_port`` is given (0 takes a free port)."""
    from metadist.rpc.endpoint import serve as serve_grpc
    from metadist.serving.adapt_pb2_grpc import add_AdaptationServicer_to_server as add
    from metadist.serving.grpc import GrpcAdaptationService
    from metadist.serving.http import serve_http

    _allow_many_connections()
    with ExitStack() as stack:
        stack.callback(service.close)
        served = stack.enter_context(
            serve_grpc(endpoint, {add: GrpcAdaptationService(service)}, observe=service.metrics.observe)
        )
        http = None
        if http_port is not None:
            port = stack.enter_context(serve_http(service, replace(endpoint, port=http_port)))
            http = f"{'https' if endpoint.secure else 'http'}://{served.address.rpartition(':')[0]}:{port}"
        yield RunningServer(served.address, http, service)


def build_replica(
    settings: Mapping[str, Any],
    *,
    shared_cache: Callable[..., Any],
    token_file: str | None = None,
    message_bytes: int = 64 << 20,
    concurrent: int = 128,
    seconds: float = 60.0,
) -> Any:
    """Return the ASGI application of one replica of Ray Serve. ``settings`` are fields of ``Serving``.

    Raises ``ConfigError`` for an unknown field.
    """
    from metadist.rpc.credentials import read_token
    from metadist.serving.http import app

    known = [f.name for f in fields(Serving)]
    if unknown := settings.keys() - set(known):
        raise ConfigError(
            f"args.{min(unknown)}: unknown key; expected one of {', '.join(known)}{nearest(min(unknown), known)}"
        )
    serving = Serving(
        **{**settings, "sources": tuple(settings["sources"]), "trust": trusted(settings.get("trust") or ())}
    )
    token = read_token(token_file) if token_file else None
    service = build_service(serving, shared_cache)
    return app(service, token=token, seconds=seconds, message_bytes=message_bytes, concurrent=concurrent)


def _allow_many_connections() -> None:
    """Raise the process's limit of open files to its hard limit, at most 65,536."""
    try:
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 65536)), hard))
    except (ImportError, OSError, ValueError):
        pass
