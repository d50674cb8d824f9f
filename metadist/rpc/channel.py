"""Open gRPC channels with the limits of ``endpoint``, and translate failed calls into one line for users."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import grpc

from metadist.core.errors import ConfigError, MetadistError
from metadist.rpc.credentials import is_loopback, read_file, read_token
from metadist.rpc.proxies import bypass_proxies

log = logging.getLogger(__name__)

MESSAGE_BYTES = 64 << 20
UNARY_SECONDS = 60.0


class ServiceError(MetadistError):
    """A server refused a call, or no server answered. ``code`` is gRPC's status."""

    def __init__(self, message: str, code: grpc.StatusCode = grpc.StatusCode.UNKNOWN) -> None:
        super().__init__(message)
        self.code = code


def connect(
    address: str,
    token_file: str | None = None,
    tls_ca: str | None = None,
    *,
    message_bytes: int = MESSAGE_BYTES,
    seconds: float = UNARY_SECONDS,
) -> grpc.Channel:
    """Return a channel to ``HOST:PORT``. The channel connects at its first call.

    The channel uses TLS if ``tls_ca`` (a PEM file) is given, or if the address begins with ``grpcs://`` (then with the
    system's certificate authorities). A token is sent over TLS or to loopback only. Unary calls without a timeout get
    ``seconds``.

    Raises ``ConfigError`` for a wrong address, an unreadable file, or a token without TLS to another machine.
    """
    target, secure = _target(address)
    secure = secure or tls_ca is not None
    host = target.rpartition(":")[0]
    if token_file is not None and not secure and not is_loopback(host):
        raise ConfigError(
            f"{address}: the token would be sent without encryption; give the server's certificate authority "
            "(--tls-ca FILE), or use grpcs:// if this machine trusts the server's certificate already"
        )
    options = [
        ("grpc.max_receive_message_length", message_bytes),
        ("grpc.max_send_message_length", message_bytes),
        ("grpc.max_metadata_size", 16 << 10),
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.enable_http_proxy", 0),
    ]
    bypass_proxies()
    if secure:
        channel = grpc.secure_channel(target, grpc.ssl_channel_credentials(_authority(tls_ca)), options)
    else:
        channel = grpc.insecure_channel(target, options)
    return grpc.intercept_channel(channel, _CallOptions(read_token(token_file) if token_file else None, seconds))


@contextmanager
def calling(address: str) -> Iterator[None]:
    """Convert a failed call inside the block into a ``ServiceError`` of one line."""
    try:
        yield
    except grpc.RpcError as error:
        code = error.code() if isinstance(error, grpc.Call) else grpc.StatusCode.UNKNOWN
        raise ServiceError(f"{address}: {explain(error)}", code) from None


_TOO_LARGE = re.compile(r"message larger than max \((\d+) vs\. (\d+)\)")
_MEANINGS = {
    grpc.StatusCode.UNAUTHENTICATED: "the server refused the token; give the file with its token (--token-file)",
    grpc.StatusCode.PERMISSION_DENIED: "the server does not allow this call",
    grpc.StatusCode.DEADLINE_EXCEEDED: "the server did not answer in time",
    grpc.StatusCode.UNIMPLEMENTED: "the server at this address does not offer this service; is the port right?",
    grpc.StatusCode.CANCELLED: "the call was cancelled",
}


def explain(error: grpc.RpcError) -> str:
    """Describe a failed call in one line for users."""
    if not isinstance(error, grpc.Call):
        return "the call failed"
    code, details = error.code(), " ".join((error.details() or "").split())[:400]
    if code == grpc.StatusCode.UNAVAILABLE:
        if "SSL" in details or "handshake" in details.lower() or "certificate" in details.lower():
            return f"the TLS handshake failed; does the server use TLS, and is --tls-ca its authority? ({details})"
        if "refused" in details.lower() or "resolution" in details.lower() or "DNS" in details:
            return "no server answers there; is the server running, and are host and port right?"
        return f"the connection failed; is the server running, and does it use TLS (--tls-ca)? ({details})"
    if code == grpc.StatusCode.RESOURCE_EXHAUSTED and (sizes := _TOO_LARGE.search(details)):
        size, limit = (int(n) / 2**20 for n in sizes.groups())
        return (
            f"a message of {size:.1f} MiB is above the limit of {limit:g} MiB; send fewer rows in one call, or raise "
            f"the server's limit (metadist serve --max-message-mib {math.ceil(size)})"
        )
    if code == grpc.StatusCode.RESOURCE_EXHAUSTED:
        return f"a limit is exceeded: {details or 'too many calls run simultaneously'}"
    if code in _MEANINGS:
        return _MEANINGS[code] + (f" ({details})" if details and code != grpc.StatusCode.UNAUTHENTICATED else "")
    return details or code.name.lower().replace("_", " ")


def _target(address: str) -> tuple[str, bool]:
    """Return HOST:PORT, and whether the address asks for TLS."""
    secure = address.startswith("grpcs://")
    target = address.removeprefix("grpcs://").removeprefix("grpc://")
    host, _, port = target.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536 or "/" in host:
        raise ConfigError(f"address '{address}': expected HOST:PORT, such as 127.0.0.1:8470, or grpcs://HOST:PORT")
    return target, secure


def _authority(path: str | None) -> bytes | None:
    if path is None:
        return None
    pem = read_file("tls-ca", path)
    if b"BEGIN CERTIFICATE" not in pem:
        raise ConfigError(f"tls-ca {path}: expected a PEM file with the certificate of the server or of its authority")
    return pem


class _Fields(NamedTuple):
    method: str
    timeout: float | None
    metadata: Any
    credentials: Any
    wait_for_ready: bool | None
    compression: Any


class _Details(_Fields, grpc.ClientCallDetails):
    pass


class _CallOptions(
    grpc.UnaryUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamUnaryClientInterceptor,
    grpc.StreamStreamClientInterceptor,
):
    """Adds the token to every call, and a timeout to unary calls that have none."""

    def __init__(self, token: str | None, seconds: float) -> None:
        self._token, self._seconds = token, seconds

    def _call(self, continuation: Callable[..., Any], details: Any, request: Any, streams: bool) -> Any:
        metadata = list(details.metadata or ())
        if self._token is not None:
            metadata.append(("authorization", f"Bearer {self._token}"))
        timeout = details.timeout if details.timeout is not None or streams else self._seconds
        options = details.credentials, details.wait_for_ready, details.compression
        return continuation(_Details(details.method, timeout, metadata, *options), request)

    def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return self._call(continuation, client_call_details, request, False)

    def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return self._call(continuation, client_call_details, request, True)

    def intercept_stream_unary(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        return self._call(continuation, client_call_details, request_iterator, True)

    def intercept_stream_stream(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        return self._call(continuation, client_call_details, request_iterator, True)
