"""What stands before an application over HTTP, as ``guard`` does before servicers: token, limits, errors, impatience."""

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
from metadist.rpc.grpc_guard import Observe, Refused

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


class TooLarge(Exception):
    pass


def answer(error: Exception) -> Response:
    if isinstance(error, Refused):
        status, message = _STATUS.get(error.code, 500), str(error)
    elif isinstance(error, HTTPException):
        status, message = (
            error.status_code,
            f"{error.detail}; the calls are POST /v1/adapt, /v1/predict, /v1/adapt_predict, /v1/forget and GET /v1/models",
        )
    elif isinstance(error, ConfigError):
        status, message = 400, str(error)
    elif isinstance(error, TooLarge):
        status, message = 413, str(error)
    else:
        number = uuid.uuid4().hex[:12]
        log.error("a call over HTTP failed (error %s)", number, exc_info=error)
        status, message = 500, f"internal error {number}; the server's log has it under this number"
    return JSONResponse(
        {"error": " ".join(message.split())[:400]}, status, {"WWW-Authenticate": "Bearer"} if status == 401 else None
    )


class Guarded:
    """Token, number of calls and time, before and around the application. A reader that doesn't read is cut off."""

    def __init__(self, inner: Any, token: str | None, seconds: float, concurrent: int, observe: Observe) -> None:
        self._inner, self._seconds, self._concurrent, self._running, self._observe = (
            inner,
            seconds,
            concurrent,
            0,
            observe,
        )
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
                grpc.StatusCode.UNAUTHENTICATED, "this server wants a token, and the call has none or a wrong one"
            )
            await self._bounded(answer(refusal)(scope, receive, send))
        elif self._running >= self._concurrent:
            refusal = Refused(
                grpc.StatusCode.RESOURCE_EXHAUSTED, f"{self._running} calls are running already; try again"
            )
            await self._bounded(answer(refusal)(scope, receive, send))
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
        except Exception as error:  # Starlette has answered, and raises what it doesn't know for the server's log
            if not began:
                await answer(error)(scope, receive, send)

    async def _bounded(self, work: Any) -> None:
        with contextlib.suppress(asyncio.TimeoutError, TimeoutError):
            await asyncio.wait_for(work, self._seconds + 1.0)


class Impatient(H11Protocol):
    """Closes a connection whose first request doesn't arrive: uvicorn's own timeout begins after it."""

    PATIENCE = 20.0

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._waiting = self.loop.call_later(self.PATIENCE, self._close_if_idle)

    def connection_lost(self, exc: Exception | None) -> None:
        self._waiting.cancel()  # or it would hold on to the connection's buffers
        super().connection_lost(exc)

    def _close_if_idle(self) -> None:
        if self.cycle is None and not self.transport.is_closing():
            self.transport.close()
