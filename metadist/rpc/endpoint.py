"""Start gRPC servers with limits: on loopback by default, with TLS and a token for other machines."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from metadist.core.errors import ConfigError
from metadist.rpc.channel import ServiceError, calling, connect, explain
from metadist.rpc.credentials import is_loopback, read_file, read_token
from metadist.rpc.grpc_guard import GrpcGuard, Observe, Refused

__all__ = [
    "AddServicer",
    "Endpoint",
    "Refused",
    "RunningEndpoint",
    "ServiceError",
    "calling",
    "connect",
    "explain",
    "is_loopback",
    "serve",
]

log = logging.getLogger(__name__)

AddServicer = Callable[[Any, Any], None]
"""A generated function ``add_XServicer_to_server``."""


@dataclass(frozen=True)
class Endpoint:
    """The address, the credentials and the limits of a server.

    Without TLS *and* a token a server listens on loopback only. ``port`` 0 takes a free port. ``seconds`` bounds every
    unary call, including the arrival of its request, regardless of the client's deadline. ``stream_seconds`` bounds a
    streaming call; its client then opens a new one.

    Raises ``ConfigError`` for contradictory or unsafe values.
    """

    host: str = "127.0.0.1"
    port: int = 0
    tls_cert: str | None = None
    tls_key: str | None = None
    token_file: str | None = None
    message_bytes: int = 8 << 20
    metadata_bytes: int = 16 << 10
    concurrent: int = 128
    seconds: float = 60.0
    stream_seconds: float = 3600.0
    idle_seconds: float = 300.0
    connection_seconds: float = 4 * 3600.0
    reflection: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port {self.port}: expected 0 (any free port) to 65535")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigError(
                "TLS needs two files: give both the certificate (--tls-cert) and its private key (--tls-key)"
            )
        if not is_loopback(self.host) and not (self.secure and self.token_file):
            missing = " and ".join(
                name for name, given in (("TLS", self.secure), ("a token", self.token_file)) if not given
            )
            raise ConfigError(
                f"host {self.host}: other machines could connect without {missing}; give --tls-cert, --tls-key and "
                "--token-file, or use 127.0.0.1"
            )

    @property
    def secure(self) -> bool:
        """Whether the server uses TLS."""
        return self.tls_cert is not None and self.tls_key is not None

    def token(self) -> str | None:
        """Read the token; None without a token file. Raises ``ConfigError`` if the file holds none."""
        return None if self.token_file is None else read_token(self.token_file)

    def credentials(self) -> grpc.ServerCredentials | None:
        """Read certificate and key; None without TLS. Raises ``ConfigError`` if a file is unreadable or not PEM."""
        if not self.secure:
            return None
        assert self.tls_cert is not None
        assert self.tls_key is not None
        certificate, key = read_file("tls-cert", self.tls_cert), read_file("tls-key", self.tls_key)
        if b"BEGIN CERTIFICATE" not in certificate or b"PRIVATE KEY" not in key:
            raise ConfigError(
                f"tls-cert {self.tls_cert}, tls-key {self.tls_key}: expected PEM files with a certificate and its "
                "private key"
            )
        return grpc.ssl_server_credentials([(key, certificate)])

    def options(self) -> list[tuple[str, int]]:
        """Return the limits as gRPC channel arguments."""

        def milliseconds(seconds: float) -> int:
            return int(seconds * 1000)

        return [
            ("grpc.so_reuseport", 0),  # otherwise a second server on the port would silently receive some of the calls
            ("grpc.max_receive_message_length", self.message_bytes),
            ("grpc.max_send_message_length", self.message_bytes),
            ("grpc.max_metadata_size", self.metadata_bytes),
            ("grpc.absolute_max_metadata_size", self.metadata_bytes),
            # More than ``concurrent``: a caller above that limit is refused immediately instead of queued.
            ("grpc.max_concurrent_streams", 2 * self.concurrent),
            ("grpc.max_connection_idle_ms", milliseconds(self.idle_seconds)),
            ("grpc.max_connection_age_ms", milliseconds(self.connection_seconds)),
            ("grpc.max_connection_age_grace_ms", milliseconds(self.seconds)),
            ("grpc.server_handshake_timeout_ms", milliseconds(min(self.seconds, 20.0))),
            ("grpc.keepalive_time_ms", 60_000),
            ("grpc.keepalive_timeout_ms", 20_000),
            ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
            ("grpc.http2.max_ping_strikes", 3),
        ]


@dataclass(frozen=True)
class RunningEndpoint:
    """A running server, with the full names of its services."""

    endpoint: Endpoint
    port: int
    server: grpc.Server
    services: tuple[str, ...]

    @property
    def address(self) -> str:
        """HOST:PORT for clients."""
        host = f"[{self.endpoint.host}]" if ":" in self.endpoint.host else self.endpoint.host
        return f"{host}:{self.port}"

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the server's end. Return True if it still runs after ``timeout`` seconds."""
        return self.server.wait_for_termination(timeout)


@contextmanager
def serve(
    endpoint: Endpoint, services: Mapping[AddServicer, Any], *, grace: float = 5.0, observe: Observe | None = None
) -> Iterator[RunningEndpoint]:
    """Serve ``{add_XServicer_to_server: servicer}`` during the block; running calls then get ``grace`` more seconds.

    A servicer refuses a call by raising ``Refused(code, message)``. A ``ConfigError`` becomes INVALID_ARGUMENT, another
    ``MetadistError`` FAILED_PRECONDITION, both with their message. Any other exception becomes INTERNAL, with a number
    that identifies its traceback in the log. ``observe(method, status, seconds)`` is called at the end of every call.

    Raises ``ConfigError`` if the address cannot be bound or a file of the endpoint is wrong.
    """
    token, credentials = endpoint.token(), endpoint.credentials()
    guard = GrpcGuard(token, endpoint.seconds, endpoint.stream_seconds, observe)
    pool = ThreadPoolExecutor(endpoint.concurrent, thread_name_prefix="rpc")
    server = grpc.server(
        pool, interceptors=[guard], options=endpoint.options(), maximum_concurrent_rpcs=endpoint.concurrent
    )
    names = _ServiceNames()
    for add, servicer in services.items():
        add(servicer, names)
        add(servicer, server)
    healthy = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
    if endpoint.reflection:
        reflection.enable_server_reflection([*names.found, health.SERVICE_NAME, reflection.SERVICE_NAME], server)
    served = RunningEndpoint(endpoint, _bind(server, endpoint, credentials), server, tuple(names.found))
    server.start()
    for name in ("", *names.found):
        healthy.set(name, health_pb2.HealthCheckResponse.SERVING)
    log.info(
        "serving %s on %s (%s, %s)",
        ", ".join(names.found),
        served.address,
        "TLS" if credentials else "plaintext",
        "token" if token else "no token",
    )
    try:
        yield served
    finally:
        healthy.enter_graceful_shutdown()
        server.stop(grace).wait()
        guard.close()
        pool.shutdown(wait=False)


class _ServiceNames:
    """Has the methods of a server that generated code calls, and collects the full names of the services."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        self.found += [handler.service_name() for handler in handlers]

    def add_registered_method_handlers(self, *_: Any) -> None: ...


def _bind(server: grpc.Server, endpoint: Endpoint, credentials: grpc.ServerCredentials | None) -> int:
    host = f"[{endpoint.host}]" if ":" in endpoint.host else endpoint.host
    address = f"{host}:{endpoint.port}"
    try:
        port = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
    except RuntimeError:
        port = 0
    if not port:
        raise ConfigError(
            f"can't listen on {address}: the port is in use, or the address is not one of this machine; "
            "choose another --port"
        )
    return port
