"""``metadist serve``: serve trained models."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import threading
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from metadist.cli.terminal import Trust, clean_errors, only_results_on_stdout, say, set_up_logging
from metadist.core.errors import ConfigError

if TYPE_CHECKING:
    from metadist.rpc.endpoint import Endpoint
    from metadist.serving.load import Serving

_TRIM_SECONDS = 2.0

# Options --------------------------------------------------------------------------------------------------------------

Sources = Annotated[
    list[str],
    typer.Argument(metavar="[NAME=]RUN_OR_MODEL…", help="Run directories, exported files, or registered models."),
]
Host = Annotated[str, typer.Option(help="Hosts other than loopback need TLS and a token.")]
Port = Annotated[int, typer.Option(help="The port of gRPC; 0 takes a free port.", min=0, max=65535)]
HttpPort = Annotated[
    int, typer.Option(help="The port of JSON over HTTP; 0 takes a free port, -1 serves no HTTP.", min=-1, max=65535)
]
TokenFile = Annotated[
    str | None, typer.Option("--token-file", metavar="FILE", help="The bearer token that every call must carry.")
]
TlsCert = Annotated[str | None, typer.Option("--tls-cert", metavar="FILE", help="The server's certificate (PEM).")]
TlsKey = Annotated[
    str | None, typer.Option("--tls-key", metavar="FILE", help="The private key of the certificate (PEM).")
]
Normalization = Annotated[
    str | None, typer.Option(help="transductive or inductive batch norm; default: as in the run.")
]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Threads = Annotated[
    int | None, typer.Option(help="CPU threads of the computation; default: as PyTorch chooses.", min=1)
]
MaxBatch = Annotated[
    int, typer.Option(help="Most requests that are computed together; 1 computes one at a time.", min=1)
]
BatchWait = Annotated[
    float, typer.Option(help="How long a request may wait for others to be computed with it.", min=0.0)
]
Budget = Annotated[
    float, typer.Option(help="Memory for adapted parameters; the least recently used are evicted.", min=0.0)
]
MaxMessage = Annotated[float, typer.Option(help="Largest request or answer.", min=0.01, max=1024)]
MaxCalls = Annotated[int, typer.Option(help="Simultaneous calls.", min=1)]
MaxSupport = Annotated[int, typer.Option(help="Most rows of a support set.", min=1)]
MaxQueries = Annotated[int, typer.Option(help="Most rows to predict in one call.", min=1)]
OnRay = Annotated[bool, typer.Option("--ray-serve", help="Deploy on Ray Serve: JSON over HTTP, replicas, autoscaling.")]
Replicas = Annotated[
    str, typer.Option(metavar="N|MIN-MAX", help="With --ray-serve: replicas, or the limits of autoscaling.")
]
ReplicaCpus = Annotated[float, typer.Option(help="With --ray-serve: CPUs that a replica reserves.", min=0.0)]
ReplicaGpus = Annotated[float, typer.Option(help="With --ray-serve: GPUs that a replica reserves.", min=0.0)]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Log what the server does.")]

# The command ----------------------------------------------------------------------------------------------------------


def serve(
    sources: Sources,
    host: Host = "127.0.0.1",
    port: Port = 8470,
    http_port: HttpPort = 8471,
    token_file: TokenFile = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    normalization: Normalization = None,
    device: Device = "cpu",
    threads: Threads = None,
    max_batch: MaxBatch = 64,
    batch_wait_ms: BatchWait = 2.0,
    budget_mib: Budget = 256.0,
    max_message_mib: MaxMessage = 64.0,
    max_calls: MaxCalls = 128,
    max_support: MaxSupport = 1000,
    max_queries: MaxQueries = 1000,
    ray_serve: OnRay = False,
    replicas: Replicas = "1",
    replica_cpus: ReplicaCpus = 1.0,
    replica_gpus: ReplicaGpus = 0.0,
    trust: Trust = None,
    verbose: Verbose = False,
) -> None:
    """Serve adaptation to support sets and predictions, over gRPC (metadist.adapt.v1) and as JSON over HTTP."""
    set_up_logging(verbose)
    _few_arenas()
    with clean_errors(), only_results_on_stdout():
        from metadist.serving.load import Serving

        runs = tuple(sources)
        serving = Serving(
            runs, normalization, device, threads, max_batch, batch_wait_ms, budget_mib, max_support, max_queries
        )
        serving = replace(serving, trust=tuple(trust or ()))
        server = _Server(host, tls_cert, tls_key, token_file, int(max_message_mib * 2**20), max_calls)
        if ray_serve:
            resources = {"replicas": replicas, "cpus": replica_cpus, "gpus": replica_gpus}
            _serve_on_ray({**asdict(serving), **resources}, server, http_port)
        else:
            _serve_here(serving, server.endpoint(port), None if http_port < 0 else http_port)


@dataclass(frozen=True)
class _Server:
    host: str
    tls_cert: str | None
    tls_key: str | None
    token_file: str | None
    message_bytes: int
    concurrent: int

    def endpoint(self, port: int) -> Endpoint:
        """Return the checked endpoint. ConfigError where it is unsafe or a file is wrong, before a model is loaded."""
        from metadist.rpc.endpoint import Endpoint

        endpoint = Endpoint(**asdict(self), port=port)
        endpoint.token(), endpoint.credentials()
        return endpoint


def _serve_here(serving: Serving, endpoint: Endpoint, http_port: int | None) -> None:
    """Serve over gRPC and HTTP from this process until a signal arrives."""
    from metadist.serving import load

    service = load.build_service(serving)
    with load.serve(service, endpoint, http_port) as running:
        for model in service.models.values():
            about = f"{model.algorithm}, {model.learner.tasks.kind}, {model.weights} weights, {model.source}"
            say(f"model  {model.name}: {about}")
        say(f"gRPC   {running.address}" + (" (TLS)" if endpoint.secure else ""))
        if running.http_address:
            say(f"HTTP   {running.http_address}/v1/models")
        _until_stopped()
    say("stopped: " + ", ".join(f"{name} {value:g}" for name, value in service.statistics().items()))


def _serve_on_ray(args: dict[str, Any], server: _Server, port: int) -> None:
    """Serve over HTTP from replicas on Ray Serve until a signal arrives."""
    server.endpoint(max(port, 0))  # the rules for hosts other than loopback are the same
    if port < 1:
        raise ConfigError(f"--http-port {port}: Ray Serve offers only HTTP; give a port from 1 to 65535")
    from metadist.serving.ray import deploy

    args |= {"message_bytes": server.message_bytes, "concurrent": server.concurrent}
    args["token_file"] = server.token_file and os.path.abspath(server.token_file)
    args["sources"] = [_absolute(source) for source in args["sources"]]
    with deploy(args, host=server.host, port=port, tls_cert=server.tls_cert, tls_key=server.tls_key) as address:
        say(f"HTTP   {address}/v1/models (Ray Serve, replicas: {args['replicas']})")
        _until_stopped()


def _absolute(source: str) -> str:
    """Return a source with an absolute path: each replica runs in another folder."""
    name, separator, location = source.rpartition("=")
    return source if "://" in location or ":/" in location else f"{name}{separator}{os.path.abspath(location)}"


def _few_arenas() -> None:
    """Limit glibc to two heaps: with its default, a hundred threads that parse requests fragment many heaps."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(-8, 2)  # M_ARENA_MAX


def _release_free_memory() -> None:
    """Return freed memory from glibc to the system. Without this, 1,000 connections cost 70 MiB permanently."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def _until_stopped() -> None:
    """Wait for SIGINT or SIGTERM."""
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    while not stop.wait(_TRIM_SECONDS):
        _release_free_memory()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    say("\nstopping after the running calls; press Ctrl-C again to stop immediately")
