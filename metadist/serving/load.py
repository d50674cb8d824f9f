"""Trained models put to work: from a run or an exported file to a server with gRPC and HTTP doors."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch

from metadist.config.build import build
from metadist.config.experiment import Experiment
from metadist.core.errors import CheckpointError, ConfigError, nearest, one_of
from metadist.core.state import State
from metadist.experiment.load import load_run
from metadist.experiment.result import SLOTS
from metadist.learners.few_shot import FewShotLearner
from metadist.storage.checkpoints import exported_metadata, load_parameters

if TYPE_CHECKING:
    from metadist.rpc.endpoint import Endpoint
    from metadist.serving.model import ServedModel
    from metadist.serving.service import Adaptation

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Serving:
    """How models are served; every field is an option of ``metadist serve``. Plain data: it travels to Ray Serve's replicas."""

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


def open_model(source: str, *, normalization: str | None = None, device: str = "cpu", **limits: Any) -> ServedModel:
    """A run directory, a file that ``metadist export`` wrote or a registered model (``models:/NAME@champion``), ready to be served; NAME=SOURCE names it."""
    from metadist.serving.model import Limits, ServedModel

    name, separator, location = source.partition("=")
    if not separator or "/" in name or ":" in name:
        name, location = "", source
    if location.startswith(("models:/", "runs:/")):
        from metadist.experiment.registration import registered_weights

        location = str(registered_weights(location))
    origin, experiment, state = _exported(location) if location.endswith(".safetensors") else _run(location)
    learner = experiment.learner
    if not isinstance(learner, FewShotLearner):
        raise ConfigError(
            f"serve: {location} is a trial run ({type(learner.tasks).__name__} is a meta-environment): its policy adapts by acting, not to "
            "a support set; only supervised runs can be served"
        )
    if normalization is not None:
        one_of("--normalization", normalization, ("transductive", "inductive"))
        learner.normalization = normalization
    move(learner, device)
    decode = getattr(learner.tasks, "decode", None)
    images = None if decode is None else (decode.size, decode.channels, decode.invert)
    return ServedModel(name or experiment.name, learner, state, origin, Limits(**limits), images)


def _run(location: str) -> tuple[str, Experiment, State]:
    loaded = load_run(location)
    return loaded.run_id, loaded.experiment, loaded.state


def _exported(path: str) -> tuple[str, Experiment, State]:
    metadata, tensors = exported_metadata(path), load_parameters(path)
    if "config" not in metadata:
        raise CheckpointError(
            f"{path} has parameters alone, not the config that they belong to; export it again by 'metadist export RUN {path}'"
        )
    experiment = build(json.loads(metadata["config"]))
    learner = experiment.learner
    initial = learner.initial(experiment.seed)
    if not isinstance(learner, FewShotLearner):
        return metadata.get("run_id", ""), experiment, initial
    slots = {}
    for name, vector in initial.slots.items():
        layout = learner.slots[name].layout
        named = {n: tensors.get(n, tensors.get(f"{SLOTS}{name}/{n}")) for n in layout.names}
        if name in learner.algorithm.slots(learner.model, learner.model.initial(0)[0]):
            named = {n: tensors.get(f"{SLOTS}{name}/{n}") for n in layout.names}
        for n, shape in zip(layout.names, layout.shapes):
            tensor = named[n]
            if tensor is None or tuple(tensor.shape) != tuple(shape):
                raise CheckpointError(
                    f"{path}: '{n}' of {name} is {'missing' if tensor is None else list(tensor.shape)}, expected {list(shape)}"
                )
        slots[name] = layout.flatten({n: t.to(vector.dtype) for n, t in named.items() if t is not None})
    return metadata.get("run_id", ""), experiment, State(slots, {})


def move(learner: FewShotLearner, device: str) -> None:
    """Where the model computes; its tasks' data stay where they are, and needn't be there at all."""
    try:
        place = torch.device(device)
        torch.zeros(1, device=place)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {device}: can't be used ({str(error).splitlines()[0]}); cpu can") from None
    learner.model.to(place)
    learner.device = place


def adaptation(serving: Serving, shelf: Callable[..., Any] | None = None) -> Adaptation:
    """The service without a door."""
    from metadist.serving.service import MIB, Adaptation

    if serving.threads is not None:
        torch.set_num_threads(serving.threads)
    limits = {"support": serving.max_support, "queries": serving.max_queries, "inner_steps": serving.max_inner_steps}
    models = [
        open_model(source, normalization=serving.normalization, device=serving.device, **limits)
        for source in serving.sources
    ]
    for model in models:
        model.warm_up()
    budget, patience = int(serving.budget_mib * MIB), serving.batch_wait_ms / 1000
    return Adaptation(models, budget=budget, largest=serving.max_batch, patience=patience, shelf=shelf)


@dataclass(frozen=True)
class Running:
    address: str
    http_address: str | None
    service: Adaptation


@contextmanager
def serve(service: Adaptation, endpoint: Endpoint, http_port: int | None = None) -> Iterator[Running]:
    """Open the doors: gRPC, and HTTP where a port (0: any) is given."""
    from contextlib import ExitStack

    from metadist.rpc.endpoint import serve as serve_grpc
    from metadist.serving.adapt_pb2_grpc import add_AdaptationServicer_to_server as add
    from metadist.serving.grpc import AdaptationServicer
    from metadist.serving.http import serve_http

    _allow_many_connections()
    with ExitStack() as stack:
        stack.callback(service.close)
        served = stack.enter_context(
            serve_grpc(endpoint, {add: AdaptationServicer(service)}, observe=service.measures.observe)
        )
        http = None
        if http_port is not None:
            port = stack.enter_context(serve_http(service, replace(endpoint, port=http_port)))
            http = f"{'https' if endpoint.secure else 'http'}://{served.address.rpartition(':')[0]}:{port}"
        yield Running(served.address, http, service)


def replica(
    settings: Mapping[str, Any],
    *,
    shelf: Callable[..., Any],
    token_file: str | None = None,
    message_bytes: int = 8 << 20,
    concurrent: int = 128,
    seconds: float = 60.0,
) -> Any:
    """The HTTP door as an ASGI application, of one of Ray Serve's replicas. ``settings`` are fields of ``Serving``."""
    from metadist.rpc.credentials import read_token
    from metadist.serving.http import app

    unknown = settings.keys() - {f.name for f in fields(Serving)}
    if unknown:
        raise ConfigError(
            f"args.{min(unknown)}: unknown; there are {', '.join(f.name for f in fields(Serving))}{nearest(min(unknown), Serving.__annotations__)}"
        )
    serving = Serving(**{**settings, "sources": tuple(settings["sources"])})
    token = read_token(token_file) if token_file else None
    return app(
        adaptation(serving, shelf), token=token, seconds=seconds, message_bytes=message_bytes, concurrent=concurrent
    )


def _allow_many_connections() -> None:
    try:
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 65536)), hard))
    except (ImportError, OSError, ValueError):
        pass


def decoder(images: Sequence[Any]) -> Any:
    """How (size, channels, invert) turn image files into inputs, as in training."""
    from metadist.tasks.sources import Decode

    return Decode(*images)
