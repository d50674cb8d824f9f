"""Deploy the adaptation service on Ray Serve: replicas of the HTTP application, and one cache for all of them.

The application and the cache are named by import paths and created in the processes where they run, so that the driver
imports neither.
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

#: (settings, shared_cache=…, **options) → ASGI application
APPLICATION = "metadist.serving.load:build_replica"
SHARED_CACHE = "metadist.serving.cache:SharedCache"
NAME = "metadist"
CACHE_ACTOR = f"{NAME}-shared-cache"
#: running calls per replica that autoscaling aims at: about one batch
TARGET_ONGOING_CALLS = 16
#: the keys of ``args`` that belong to the deployment; all others are fields of ``Serving``
DEPLOYMENT_ARGS = ("replicas", "cpus", "gpus", "token_file", "message_bytes", "concurrent", "seconds")


class _CacheActor:
    """An actor that creates the shared cache in its process and calls its methods."""

    def __init__(self, path: str, budget: int) -> None:
        self._cache = _imported(path)(budget)

    def call(self, method: str, *arguments: Any) -> Any:
        return getattr(self._cache, method)(*arguments)


def application(args: Mapping[str, Any]) -> Any:
    """Build the Serve application; a Serve config (KubeRay's RayService) names this function as ``import_path``.

    ``args``: sources, replicas ("2", or "1-4" for autoscaling), cpus and gpus of a replica, token_file, message_bytes,
    concurrent, seconds, and the fields of ``metadist.serving.load.Serving``.

    Raises ``ConfigError`` for missing sources or wrong replicas, and if Ray Serve is not installed.
    """
    try:
        from ray import serve
    except ImportError as error:
        raise ConfigError(f"Ray Serve is not installed ({error}); pip install 'metadist[serve]'") from None
    settings = {key: value for key, value in args.items() if key not in DEPLOYMENT_ARGS}
    settings["sources"] = (
        [settings["sources"]] if isinstance(settings.get("sources"), str) else list(settings.get("sources") or ())
    )
    if not settings["sources"]:
        raise ConfigError("args.sources: missing; expected the runs or models to serve")
    minimum, maximum = bounds(str(args.get("replicas", 1)))
    options = {
        key: args[key] for key in ("token_file", "message_bytes", "concurrent", "seconds") if args.get(key) is not None
    }
    budget = int(float(args.get("budget_mib", 256)) * 2**20)
    cache = ray.remote(_CacheActor).options(
        name=CACHE_ACTOR, get_if_exists=True, lifetime="detached", num_cpus=0, max_restarts=-1, max_concurrency=1
    )
    cache.remote(SHARED_CACHE, budget)

    def build() -> Any:
        actor = ray.get_actor(CACHE_ACTOR)

        def call(method: str, *arguments: Any) -> Any:
            return ray.get(actor.call.remote(method, *arguments))

        return _imported(APPLICATION)(settings, shared_cache=call, **options)

    scaling: dict[str, Any] = {"num_replicas": minimum}
    if minimum < maximum:
        autoscaling = {"min_replicas": minimum, "max_replicas": maximum}
        scaling = {"autoscaling_config": {**autoscaling, "target_ongoing_requests": TARGET_ONGOING_CALLS}}
    resources = {"num_cpus": float(args.get("cpus", 1)), "num_gpus": float(args.get("gpus", 0))}
    deployment = serve.deployment(
        name="Adaptation",
        max_ongoing_requests=int(options.get("concurrent", 128)),
        ray_actor_options=resources,
        **scaling,
    )(serve.ingress(build)(type("Adaptation", (), {})))
    return deployment.bind()


@contextlib.contextmanager
def deploy(
    args: Mapping[str, Any], *, host: str, port: int, tls_cert: str | None = None, tls_key: str | None = None
) -> Iterator[str]:
    """Deploy during the block, on the cluster in RAY_ADDRESS or on a new local one; yields the URL.

    Raises ``ConfigError`` for wrong arguments and ``WorkerError`` if Ray or the application does not start.
    """
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
            f"--ray-serve: the application did not start ({' '.join(str(error).split())[:300]}); "
            "the replicas' logs have the details"
        ) from error
    finally:
        with contextlib.suppress(Exception):
            serve.delete(NAME)
            ray.kill(ray.get_actor(CACHE_ACTOR))
            if ours:
                serve.shutdown()
        ray.shutdown()


def bounds(replicas: str) -> tuple[int, int]:
    """Return (minimum, maximum) of ``2`` or ``1-4``. Raises ``ConfigError`` for other text."""
    low, dash, high = replicas.partition("-")
    if not low.isdecimal() or (dash and not high.isdecimal()) or int(low) < 1 or (dash and int(high) < int(low)):
        raise ConfigError(f"--replicas {replicas}: expected a number such as 2, or a range such as 1-4")
    return int(low), int(high or low)


def _join(args: Mapping[str, Any]) -> None:
    """Join the cluster in RAY_ADDRESS, or start Ray with enough CPUs for all replicas."""
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
            f"can't {where}: {' '.join(str(error).split())[:300]}; without --ray-serve the server does not need Ray"
        ) from error


def _tls(serve: Any, certificate: str | None, key: str | None) -> dict[str, str]:
    if certificate is None or key is None:
        return {}
    fields = getattr(serve.HTTPOptions, "model_fields", None) or getattr(serve.HTTPOptions, "__fields__", {})
    if "ssl_certfile" not in fields:
        raise ConfigError(
            f"--tls-cert: Ray Serve {ray.__version__} does not support TLS; use a newer Ray, or a proxy with TLS"
        )
    return {"ssl_certfile": os.path.abspath(certificate), "ssl_keyfile": os.path.abspath(key)}


def _imported(path: str) -> Callable[..., Any]:
    """Return the object ``name`` of ``module:name``."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)
