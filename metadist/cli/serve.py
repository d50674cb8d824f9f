"""``metadist serve``: trained models as an adaptation service."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import threading
from dataclasses import asdict
from typing import Annotated, Any

import typer

from metadist.cli.terminal import clean_errors, only_results_on_stdout, say, set_up_logging
from metadist.core.errors import ConfigError

_TRIM_SECONDS = 2.0

TokenFile = Annotated[
    str | None, typer.Option("--token-file", metavar="FILE", help="The bearer token that every call must carry.")
]
TlsCert = Annotated[str | None, typer.Option("--tls-cert", metavar="FILE", help="The server's certificate (PEM).")]
TlsKey = Annotated[str | None, typer.Option("--tls-key", metavar="FILE", help="Its private key (PEM).")]


def serve(
    sources: Annotated[
        list[str], typer.Argument(metavar="[NAME=]RUN_OR_MODEL…", help="Run directories, or files of metadist export.")
    ],
    host: Annotated[str, typer.Option(help="Anything but loopback needs TLS and a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Of gRPC; 0 takes a free one.", min=0, max=65535)] = 8470,
    http_port: Annotated[
        int, typer.Option(help="Of JSON over HTTP; 0 takes a free one, -1 does without.", min=-1, max=65535)
    ] = 8471,
    token_file: TokenFile = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    normalization: Annotated[
        str | None, typer.Option(help="transductive or inductive batch norm; default: the run's.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[
        int | None, typer.Option(help="CPU threads of the computation; default: PyTorch's.", min=1)
    ] = None,
    max_batch: Annotated[
        int, typer.Option(help="Requests computed together at most; 1 serves one at a time.", min=1)
    ] = 64,
    batch_wait_ms: Annotated[float, typer.Option(help="How long a request may wait for company.", min=0.0)] = 2.0,
    budget_mib: Annotated[
        float, typer.Option(help="Memory for adapted parameters; the least recently used are evicted.", min=0.0)
    ] = 256.0,
    max_message_mib: Annotated[float, typer.Option(help="Of one request or answer.", min=0.01, max=1024)] = 8.0,
    max_calls: Annotated[int, typer.Option(help="Calls at once.", min=1)] = 128,
    max_support: Annotated[int, typer.Option(help="Rows of a support set.", min=1)] = 1000,
    max_queries: Annotated[int, typer.Option(help="Rows to predict in one call.", min=1)] = 1000,
    ray_serve: Annotated[
        bool, typer.Option("--ray-serve", help="Deploy on Ray Serve: JSON over HTTP, replicas, autoscaling.")
    ] = False,
    replicas: Annotated[
        str, typer.Option(metavar="N|MIN-MAX", help="With --ray-serve: replicas, or the bounds of autoscaling.")
    ] = "1",
    replica_cpus: Annotated[float, typer.Option(help="With --ray-serve: CPUs that a replica reserves.", min=0.0)] = 1.0,
    replica_gpus: Annotated[float, typer.Option(help="With --ray-serve: GPUs that a replica reserves.", min=0.0)] = 0.0,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what the server does.")] = False,
) -> None:
    """Adapt to support sets that callers send, and predict: over gRPC (metadist.adapt.v1) and as JSON over HTTP."""
    set_up_logging(verbose)
    _few_arenas()
    with clean_errors():
        from metadist.rpc.endpoint import Endpoint
        from metadist.serving import load as serving

        with only_results_on_stdout():
            message_bytes = int(max_message_mib * 2**20)
            settings = serving.Serving(
                tuple(sources),
                normalization,
                device,
                threads,
                max_batch,
                batch_wait_ms,
                budget_mib,
                max_support,
                max_queries,
            )
            if ray_serve:
                args = {
                    **asdict(settings),
                    "replicas": replicas,
                    "cpus": replica_cpus,
                    "gpus": replica_gpus,
                    "message_bytes": message_bytes,
                }
                args |= {"concurrent": max_calls, "token_file": token_file and os.path.abspath(token_file)}
                _on_ray(args, host, http_port, tls_cert, tls_key)
                return
            endpoint = Endpoint(
                host, port, tls_cert, tls_key, token_file, message_bytes=message_bytes, concurrent=max_calls
            )  # refuses what is not safe, before anything is loaded
            endpoint.token(), endpoint.credentials()
            service = serving.adaptation(settings)
            with serving.serve(service, endpoint, None if http_port < 0 else http_port) as running:
                for model in service.models.values():
                    say(f"model  {model.name}: {model.algorithm}, {model.learner.tasks.kind}, {model.source}")
                say(f"gRPC   {running.address}" + (" (TLS)" if endpoint.secure else ""))
                if running.http_address:
                    say(f"HTTP   {running.http_address}/v1/models")
                _until_stopped()
            say("stopped: " + ", ".join(f"{name} {value:g}" for name, value in service.statistics().items()))


def _on_ray(args: dict[str, Any], host: str, port: int, tls_cert: str | None, tls_key: str | None) -> None:
    from metadist.rpc.endpoint import Endpoint

    endpoint = Endpoint(
        host, max(port, 0), tls_cert, tls_key, args["token_file"]
    )  # the same rules for other hosts than loopback
    endpoint.token(), endpoint.credentials()
    if port < 1:
        raise ConfigError(f"--http-port {port}: Ray Serve has HTTP alone, and needs a port of its own")
    from metadist.serving.ray import deploy

    args["sources"] = [_absolute(source) for source in args["sources"]]
    with deploy(args, host=host, port=port, tls_cert=tls_cert, tls_key=tls_key) as address:
        say(f"HTTP   {address}/v1/models (Ray Serve, replicas: {args['replicas']})")
        _until_stopped()


def _absolute(source: str) -> str:
    """Replicas run in folders of their own."""
    name, separator, location = source.rpartition("=")
    return source if "://" in location or ":/" in location else f"{name}{separator}{os.path.abspath(location)}"


def _few_arenas() -> None:
    """A hundred threads that each parse a request would leave glibc's heaps, one for a few threads, full of holes."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(-8, 2)  # M_ARENA_MAX


def _give_back() -> None:
    """What glibc keeps of memory that was freed goes back: a storm of connections would leave 70 MiB behind for good."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def _until_stopped() -> None:
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    while not stop.wait(_TRIM_SECONDS):
        _give_back()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    say("\nstopping; running calls end first, press Ctrl-C again to stop at once")
