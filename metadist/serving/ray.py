"""The adaptation service on Ray Serve: replicas of the same HTTP door, and one shelf for what all of them adapted.

The application and the shelf are named by import path and made where they run: this room knows neither.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from metadist.workers.ray import environment as ray_environment  # isort: skip  (must precede ray, which reads its environment on import)

import ray
import ray.exceptions

from metadist.core.errors import ConfigError, WorkerError

log = logging.getLogger(__name__)

#: (settings, shelf=…, **options) → ASGI application
APPLICATION = "metadist.serving.load:replica"
SHELF = "metadist.serving.cache:Shelf"
NAME = "metadist"
#: calls under way per replica that autoscaling aims at: a batch's worth
ONGOING = 16


class _Shelf:
    """An actor around an object that is made there."""

    def __init__(self, path: str, budget: int) -> None:
        self._object = _located(path)(budget)

    def call(self, method: str, *arguments: Any) -> Any:
        return getattr(self._object, method)(*arguments)


def application(args: Mapping[str, Any]) -> Any:
    """What a Serve config (KubeRay's RayService) names as ``import_path``; ``args``: sources, replicas ("2", or "1-4"), cpus and gpus
    of a replica, token_file, and every field of ``metadist.serving.load.Serving``."""
    try:
        from ray import serve
    except ImportError as error:
        raise ConfigError(f"Ray Serve is not installed ({error}); pip install 'metadist[serve]'") from None
    settings = {key: value for key, value in args.items() if key not in _OWN}
    settings["sources"] = (
        [settings["sources"]] if isinstance(settings.get("sources"), str) else list(settings.get("sources") or ())
    )
    if not settings["sources"]:
        raise ConfigError("args.sources: which runs or models to serve is missing")
    least, most = bounds(str(args.get("replicas", 1)))
    options = {
        key: args[key] for key in ("token_file", "message_bytes", "concurrent", "seconds") if args.get(key) is not None
    }
    budget = int(float(args.get("budget_mib", 256)) * 2**20)
    shelf = ray.remote(_Shelf).options(
        name=f"{NAME}-shelf", get_if_exists=True, lifetime="detached", num_cpus=0, max_restarts=-1, max_concurrency=1
    )
    shelf.remote(SHELF, budget)

    def build() -> Any:
        actor = ray.get_actor(f"{NAME}-shelf")

        def call(method: str, *arguments: Any) -> Any:
            return ray.get(actor.call.remote(method, *arguments))

        return _located(APPLICATION)(settings, shelf=call, **options)

    scaling: dict[str, Any] = (
        {"num_replicas": least}
        if least == most
        else {"autoscaling_config": {"min_replicas": least, "max_replicas": most, "target_ongoing_requests": ONGOING}}
    )
    resources = {"num_cpus": float(args.get("cpus", 1)), "num_gpus": float(args.get("gpus", 0))}
    deployment = serve.deployment(
        name="Adaptation",
        max_ongoing_requests=int(options.get("concurrent", 128)),
        ray_actor_options=resources,
        **scaling,
    )(serve.ingress(build)(type("Adaptation", (), {})))
    return deployment.bind()


_OWN = ("replicas", "cpus", "gpus", "token_file", "message_bytes", "concurrent", "seconds")


@contextlib.contextmanager
def deploy(
    args: Mapping[str, Any], *, host: str, port: int, tls_cert: str | None = None, tls_key: str | None = None
) -> Iterator[str]:
    """Deploy on the cluster in RAY_ADDRESS, or on one started here; yields the address. Leaving takes the application down again."""
    bounds(str(args.get("replicas", 1)))
    try:
        from ray import serve
    except ImportError as error:
        raise ConfigError(f"--ray-serve: Ray Serve is not installed ({error}); pip install 'metadist[serve]'") from None
    http = {
        "host": host,
        "port": port,
        "request_timeout_s": float(args.get("seconds", 60.0)),
        **_tls(serve, tls_cert, tls_key),
    }
    ours = ray_environment.ADDRESS is None
    _join(args)
    try:
        with ray_environment.own_signals():
            serve.start(http_options=http)
            serve.run(application(args), name=NAME, route_prefix="/")
        yield f"{'https' if tls_cert else 'http'}://{host}:{port}"
    except (RuntimeError, ray.exceptions.RayError) as error:
        raise WorkerError(
            f"--ray-serve: the application did not start ({' '.join(str(error).split())[:300]}); its replicas' logs say more"
        ) from error
    finally:
        with contextlib.suppress(Exception):
            serve.delete(NAME)
            ray.kill(ray.get_actor(f"{NAME}-shelf"))
            if ours:
                serve.shutdown()
        ray.shutdown()


def bounds(replicas: str) -> tuple[int, int]:
    """``2`` or ``1-4`` as (least, most)."""
    low, dash, high = replicas.partition("-")
    if not low.isdecimal() or (dash and not high.isdecimal()) or int(low) < 1 or (dash and int(high) < int(low)):
        raise ConfigError(f"--replicas {replicas}: expected a number such as 2, or bounds such as 1-4")
    return int(low), int(high or low)


def _join(args: Mapping[str, Any]) -> None:
    address, quiet = ray_environment.ADDRESS, {"log_to_driver": False, "logging_level": logging.WARNING}
    try:
        with ray_environment.own_signals():
            if address:
                ray_environment.reach(address)
                ray.init(address=address, **quiet)  # type: ignore[arg-type]
            else:
                needed = bounds(str(args.get("replicas", 1)))[1] * float(args.get("cpus", 1)) + 1
                cpus = max(os.cpu_count() or 1, int(needed + 0.999))
                ray.init(address="local", num_cpus=cpus, include_dashboard=False, **quiet)  # type: ignore[arg-type]
    except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        where = f"join the Ray cluster at RAY_ADDRESS={address}" if address else "start Ray on this machine"
        raise WorkerError(
            f"can't {where}: {' '.join(str(error).split())[:300]}; without --ray-serve the server needs no Ray"
        ) from error


def _tls(serve: Any, certificate: str | None, key: str | None) -> dict[str, str]:
    if certificate is None or key is None:
        return {}
    fields = getattr(serve.HTTPOptions, "model_fields", None) or getattr(serve.HTTPOptions, "__fields__", {})
    if "ssl_certfile" not in fields:
        raise ConfigError(
            f"--tls-cert: Ray Serve {ray.__version__} has no TLS; use a newer Ray, or put a proxy with TLS before it"
        )
    return {"ssl_certfile": os.path.abspath(certificate), "ssl_keyfile": os.path.abspath(key)}


def _located(path: str) -> Callable[..., Any]:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)
