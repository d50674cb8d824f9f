"""Check every HTTP call before its application, as ``grpc_guard`` does for gRPC: token, limits, time-outs, errors."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import time
import uuid
from typing import Any

import grpc
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from uvicorn.protocols.http.h11_impl import H11Protocol

from metadist.core.errors import ConfigError
from metadist.rpc.grpc_guard import MAX_ERROR_CHARACTERS, Observe, Refused

log = logging.getLogger(__name__)

_STATUS = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.UNAUTHENTICATED: 401,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.FAILED_PRECONDITION: 422,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
}
_CODES = {200: "OK"} | {status: code.name for code, status in _STATUS.items()}


class BodyTooLarge(Exception):
    """The body of a request exceeds the limit."""


def error_response(error: Exception) -> Response:
    """Return the JSON response for an exception: one line that reveals nothing about this machine."""
    if isinstance(error, Refused):
        status, message = _STATUS.get(error.code, 500), str(error)
    elif isinstance(error, HTTPException):
        status, message = (
            error.status_code,
            f"{error.detail}; the calls are POST /v1/adapt, /v1/predict, /v1/adapt_predict, /v1/classify, /v1/forget "
            "and GET /v1/models, /docs, /openapi.json",
        )
    elif isinstance(error, ConfigError):
        status, message = 400, str(error)
    elif isinstance(error, BodyTooLarge):
        status, message = 413, str(error)
    else:
        number = uuid.uuid4().hex[:12]
        log.error("a call over HTTP failed (error %s)", number, exc_info=error)
        status, message = 500, f"internal error {number}; the server's log has the details"
    headers = {"WWW-Authenticate": "Bearer"} if status == 401 else None
    return JSONResponse({"error": " ".join(message.split())[:MAX_ERROR_CHARACTERS]}, status, headers)


class HttpGuard:
    """An ASGI application that checks the token and bounds the number and duration of the calls of ``inner``.

    The bound on a call includes the sending of its answer, so it also ends calls whose client does not read.
    """

    def __init__(self, inner: Any, token: str | None, seconds: float, concurrent: int, observe: Observe) -> None:
        self._inner, self._seconds, self._concurrent = inner, seconds, concurrent
        self._running, self._observe = 0, observe
        self._token = None if token is None else b"Bearer " + token.encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            began, status = time.perf_counter(), 0

            async def sending(message: Any) -> None:
                nonlocal status
                status = message.get("status", status)
                await send(message)

            await self._answered(scope, receive, sending)
            method = "".join(part.title() for part in scope["path"].rpartition("/")[2].split("_"))
            self._observe(
                {"Models": "ListModels"}.get(method, method),
                _CODES.get(status, str(status)),
                time.perf_counter() - began,
            )
        elif scope["type"] == "lifespan":
            await self._inner(scope, receive, send)

    async def _answered(self, scope: Any, receive: Any, send: Any) -> None:
        given = [value for key, value in scope["headers"] if key == b"authorization"]
        allowed = self._token is None or hmac.compare_digest(given[0] if len(given) == 1 else b"", self._token)
        if not allowed and scope["path"] != "/healthz":
            refusal = Refused(
                grpc.StatusCode.UNAUTHENTICATED, "this server requires a token; the call has none or a wrong one"
            )
            await self._bounded(error_response(refusal)(scope, receive, send))
        elif self._running >= self._concurrent:
            refusal = Refused(
                grpc.StatusCode.RESOURCE_EXHAUSTED, f"{self._running} calls are running already; try again"
            )
            await self._bounded(error_response(refusal)(scope, receive, send))
        else:
            self._running += 1
            try:
                await self._bounded(self._caught(scope, receive, send))
            finally:
                self._running -= 1

    async def _caught(self, scope: Any, receive: Any, send: Any) -> None:
        began = False

        async def sending(message: Any) -> None:
            nonlocal began
            began = True
            await send(message)

        try:
            await self._inner(scope, receive, sending)
        except Exception as error:  # Starlette answers first, then raises unknown errors again for the server's log
            if not began:
                await error_response(error)(scope, receive, send)

    async def _bounded(self, work: Any) -> None:
        with contextlib.suppress(asyncio.TimeoutError, TimeoutError):
            await asyncio.wait_for(work, self._seconds + 1.0)


class FirstRequestTimeout(H11Protocol):
    """Closes a connection whose first request does not arrive in time. uvicorn's own timeout begins after a request.

    ``cycle`` (None until the first request) is the only attribute of uvicorn's protocol that this class reads; see
    docs/decisions/0030-http-server.md.
    """

    SECONDS = 20.0

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._first_request = asyncio.get_running_loop().call_later(self.SECONDS, self._close_if_idle, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._first_request.cancel()  # otherwise the timer would keep the connection's buffers in memory
        super().connection_lost(exc)

    def _close_if_idle(self, transport: Any) -> None:
        if self.cycle is None and not transport.is_closing():
            transport.close()
