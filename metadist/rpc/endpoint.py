"""The one gRPC server that every service uses: loopback by default, TLS and a token anywhere else, limits on everything."""

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
from metadist.rpc.grpc_guard import Guard, Observe, Refused

__all__ = ["Endpoint", "Refused", "Served", "ServiceError", "calling", "connect", "explain", "is_loopback", "serve"]

log = logging.getLogger(__name__)

Add = Callable[[Any, Any], None]
"""``add_XServicer_to_server`` as generated."""


@dataclass(frozen=True)
class Endpoint:
    """Where a server listens, who may call it, and what a call may cost.

    Without TLS *and* a token it listens on loopback only. ``port`` 0 takes a free one. ``seconds`` bounds a call, the arrival of its
    request included, whatever deadline its client set; ``stream_seconds`` bounds one with a stream, whose client then reopens it.
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
            raise ConfigError(f"port {self.port}: expected 0 (any free one) to 65535")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigError(
                "TLS takes two files: give both the certificate (--tls-cert) and its private key (--tls-key)"
            )
        if not is_loopback(self.host) and not (self.secure and self.token_file):
            missing = " and ".join(
                what for what, there in (("TLS", self.secure), ("a token", self.token_file)) if not there
            )
            raise ConfigError(
                f"host {self.host}: any other machine could connect, and there is no {missing}; give --tls-cert, --tls-key and "
                "--token-file, or stay on 127.0.0.1"
            )

    @property
    def secure(self) -> bool:
        return self.tls_cert is not None and self.tls_key is not None

    def token(self) -> str | None:
        return None if self.token_file is None else read_token(self.token_file)

    def credentials(self) -> grpc.ServerCredentials | None:
        if not self.secure:
            return None
        assert self.tls_cert is not None
        assert self.tls_key is not None
        certificate, key = read_file("tls-cert", self.tls_cert), read_file("tls-key", self.tls_key)
        if b"BEGIN CERTIFICATE" not in certificate or b"PRIVATE KEY" not in key:
            raise ConfigError(
                f"tls-cert {self.tls_cert}, tls-key {self.tls_key}: expected PEM files: a certificate and its private key"
            )
        return grpc.ssl_server_credentials([(key, certificate)])

    def options(self) -> list[tuple[str, int]]:
        def milliseconds(seconds: float) -> int:
            return int(seconds * 1000)

        return [
            ("grpc.so_reuseport", 0),  # a second server on the port is an error, not a silent share of its calls
            ("grpc.max_receive_message_length", self.message_bytes),
            ("grpc.max_send_message_length", self.message_bytes),
            ("grpc.max_metadata_size", self.metadata_bytes),
            ("grpc.absolute_max_metadata_size", self.metadata_bytes),
            (
                "grpc.max_concurrent_streams",
                2 * self.concurrent,
            ),  # more than are served: a caller is told, and does not wait
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
class Served:
    """A running server."""

    endpoint: Endpoint
    port: int
    server: grpc.Server
    services: tuple[str, ...]

    @property
    def address(self) -> str:
        host = f"[{self.endpoint.host}]" if ":" in self.endpoint.host else self.endpoint.host
        return f"{host}:{self.port}"

    def wait(self, timeout: float | None = None) -> bool:
        """Until the server has stopped; True where it still runs when ``timeout`` seconds have passed."""
        return self.server.wait_for_termination(timeout)


@contextmanager
def serve(
    endpoint: Endpoint, services: Mapping[Add, Any], *, grace: float = 5.0, observe: Observe | None = None
) -> Iterator[Served]:
    """Serve ``{add_XServicer_to_server: servicer}`` until the block is left; running calls then get ``grace`` seconds.

    Servicers refuse a call by raising ``Refused(code, message)``; a ConfigError becomes INVALID_ARGUMENT, another MetadistError
    FAILED_PRECONDITION, both with their message; anything else INTERNAL, with a number under which the log has it.
    ``observe(method, status, seconds)`` hears of every call.
    """
    token, credentials = endpoint.token(), endpoint.credentials()
    guard = Guard(token, endpoint.seconds, endpoint.stream_seconds, observe)
    pool = ThreadPoolExecutor(endpoint.concurrent, thread_name_prefix="rpc")
    server = grpc.server(
        pool, interceptors=[guard], options=endpoint.options(), maximum_concurrent_rpcs=endpoint.concurrent
    )
    names = _Names()
    for add, servicer in services.items():
        add(servicer, names)
        add(servicer, server)
    healthy = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
    if endpoint.reflection:
        reflection.enable_server_reflection([*names.found, health.SERVICE_NAME, reflection.SERVICE_NAME], server)
    served = Served(endpoint, _bind(server, endpoint, credentials), server, tuple(names.found))
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


class _Names:
    """Stands in for a server, to learn the full names of the services that are added to it."""

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
            f"can't listen on {address}: the port is taken, or the address is not this machine's; choose another --port"
        )
    return port
