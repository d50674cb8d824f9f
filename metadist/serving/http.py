"""Serve adaptation as JSON over HTTP, with the same token and limits as gRPC."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from metadist.core.errors import ConfigError
from metadist.core.task import Examples
from metadist.core.tree import Tree, as_lists, first
from metadist.rpc.endpoint import Endpoint
from metadist.rpc.grpc_guard import Refused
from metadist.rpc.http_guard import BodyTooLarge, FirstRequestTimeout, HttpGuard, error_response
from metadist.serving import uploads
from metadist.serving.model import ServedModel
from metadist.serving.openapi import document, page
from metadist.serving.service import AdaptationService, TimeLeft
from metadist.serving.tensors import tree_from_json


def app(service: AdaptationService, *, token: str | None, seconds: float, message_bytes: int, concurrent: int) -> Any:
    """Return the ASGI application. ``/healthz`` needs no token."""
    pool = ThreadPoolExecutor(concurrent, thread_name_prefix="http")
    calls = {"adapt": _adapt, "predict": _predict, "adapt_predict": _adapt_predict, "forget": _forget}

    def route(call: Callable[[AdaptationService, dict[str, Any], TimeLeft], dict[str, Any]]) -> Any:
        async def reply(request: Request) -> Response:
            end = time.monotonic() + seconds
            body = await _body(request, message_bytes)
            work = lambda: call(service, _parsed(body), lambda: end - time.monotonic())  # noqa: E731
            return JSONResponse(_strict(await asyncio.get_running_loop().run_in_executor(pool, work)))

        return reply

    async def classify(request: Request) -> Response:
        end = time.monotonic() + seconds
        body, kind = await _body(request, message_bytes), request.headers.get("content-type", "")
        work = lambda: _classify(service, body, kind, lambda: end - time.monotonic())  # noqa: E731
        return JSONResponse(await asyncio.get_running_loop().run_in_executor(pool, work))

    async def described(request: Request) -> Response:
        about = document([m.describe() for m in service.models.values()], token=token is not None)
        return JSONResponse(about) if request.url.path.endswith(".json") else HTMLResponse(page(about))

    async def models(request: Request) -> Response:
        counts = await asyncio.get_running_loop().run_in_executor(pool, service.statistics)
        return JSONResponse({"models": [m.describe() for m in service.models.values()], "statistics": counts})

    async def metrics(request: Request) -> Response:
        text = await asyncio.get_running_loop().run_in_executor(pool, service.metrics.text)
        return Response(text, media_type="text/plain; version=0.0.4")

    async def health(request: Request) -> Response:
        return PlainTextResponse("SERVING\n")

    routes = [Route(f"/v1/{name}", route(call), methods=["POST"]) for name, call in calls.items()]
    routes += [Route("/v1/classify", classify, methods=["POST"]), Route("/v1/models", models)]
    routes += [Route("/docs", described), Route("/openapi.json", described)]
    routes += [Route("/metrics", metrics), Route("/healthz", health)]
    return HttpGuard(
        Starlette(
            routes=routes,
            exception_handlers=dict.fromkeys((Refused, ConfigError, BodyTooLarge, HTTPException, Exception), _failed),
        ),
        token,
        seconds,
        concurrent,
        service.metrics.observe,
    )


# The calls ------------------------------------------------------------------------------------------------------------


def _adapt(service: AdaptationService, body: dict[str, Any], left: TimeLeft) -> dict[str, Any]:
    _only(body, "model", "x", "y", "inner_steps")
    model = service.model(_text(body, "model"))
    handle, size = service.adapt(model, _support(model, body), _steps(model, body), left)
    return {"handle": handle, "bytes": size}


def _predict(service: AdaptationService, body: dict[str, Any], left: TimeLeft) -> dict[str, Any]:
    _only(body, "handle", "x")
    model, adapted = service.find(_text(body, "handle"))
    x = _inputs(model, "x", body, model.limits.queries)
    return {"prediction": as_lists(service.predict(model, adapted, x, left))}


def _adapt_predict(service: AdaptationService, body: dict[str, Any], left: TimeLeft) -> dict[str, Any]:
    _only(body, "model", "x", "y", "query", "inner_steps")
    model = service.model(_text(body, "model"))
    query = _inputs(model, "query", body, model.limits.queries)
    predicted = service.adapt_predict(model, _support(model, body), query, _steps(model, body), left)
    return {"prediction": as_lists(predicted)}


def _classify(service: AdaptationService, body: bytes, content_type: str, left: TimeLeft) -> dict[str, Any]:
    upload = uploads.parse(body, content_type)
    model = service.model(upload.model)
    about = model.describe()
    images, most = about.get("images"), about["outputs"]
    if images is None or not model.classification:
        raise ConfigError(f"classify: model '{model.name}' does not classify pictures; use /v1/adapt_predict")
    if len(upload.classes) > most and not about["any_classes"]:
        raise ConfigError(f"classify: {len(upload.classes)} classes; model '{model.name}' takes 2 to {most}")
    answer = _adapt_predict(service, upload.request(images), left)
    return {"model": model.name, **upload.answer(_strict(answer["prediction"]))}


def _forget(service: AdaptationService, body: dict[str, Any], left: TimeLeft) -> dict[str, Any]:
    _only(body, "handle")
    return {"existed": service.forget(_text(body, "handle"))}


def _only(body: dict[str, Any], *known: str) -> None:
    unknown = [key for key in body if key not in known]
    if unknown:
        raise ConfigError(f"unknown key '{unknown[0][:40]}'; expected {', '.join(known)}")


def _text(body: dict[str, Any], key: str) -> str:
    value = body.get(key, "")
    if not isinstance(value, str):
        raise ConfigError(f"{key}: expected text")
    return value


def _steps(model: ServedModel, body: dict[str, Any]) -> int | None:
    value = body.get("inner_steps")
    if value is not None and type(value) is not int:
        raise ConfigError("inner_steps: expected a whole number")
    return model.check_steps(value)


def _inputs(model: ServedModel, name: str, body: dict[str, Any], max_rows: int) -> Tree:
    return model.inputs(name, _tree_x(model, name, body, max_rows))


def _support(model: ServedModel, body: dict[str, Any]) -> Examples:
    x = _tree_x(model, "x", body, model.limits.support)

    def check(part: str, shape: list[int]) -> None:
        model.signature.check_target_shape(shape, len(first(x)), part)

    return model.support(x, tree_from_json("y", body.get("y"), model.signature.y, check))


def _tree_x(model: ServedModel, name: str, body: dict[str, Any], max_rows: int) -> Tree:
    def check(part: str, shape: list[int]) -> None:
        model.check_shape(name, shape, max_rows, part)

    return tree_from_json(name, body.get(name), model.signature.x, check)


# Requests and responses -----------------------------------------------------------------------------------------------


async def _body(request: Request, max_bytes: int) -> bytes:
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > max_bytes:
            raise BodyTooLarge(
                f"the body exceeds {max_bytes / 2**20:g} MiB; send fewer rows in one call, or raise the server's limit "
                "(metadist serve --max-message-mib)"
            )
        parts.append(part)
    return b"".join(parts)


def _parsed(body: bytes) -> dict[str, Any]:
    def refuse(token: str) -> None:
        raise ConfigError(f"{token} is not JSON; every number must be finite")

    try:
        value = json.loads(body, parse_constant=refuse)
    except (ValueError, RecursionError):
        raise ConfigError("the body is not JSON") from None
    if not isinstance(value, dict):
        raise ConfigError("the body must be one JSON object")
    return value


def _strict(value: Any) -> Any:
    """Return ``value`` with null for −∞ (a class that the support set lacks) and NaN, which JSON does not have."""
    if isinstance(value, list):
        return [_strict(v) for v in value]
    if isinstance(value, dict):
        return {k: _strict(v) for k, v in value.items()}
    return None if isinstance(value, float) and value - value != 0 else value


async def _failed(request: Request, error: Exception) -> Response:
    return error_response(error)


@contextmanager
def serve_http(service: AdaptationService, endpoint: Endpoint, *, grace: float = 5.0) -> Iterator[int]:
    """Serve in a thread on the endpoint's port during the block; yields the port.

    Raises ``ConfigError`` if the port cannot be bound or a file of the endpoint is wrong.
    """
    token = endpoint.token()
    endpoint.credentials()  # raises ConfigError for a wrong certificate or key
    family = socket.AF_INET6 if ":" in endpoint.host else socket.AF_INET
    try:
        listening = socket.create_server((endpoint.host, endpoint.port), family=family, backlog=512)
        # asyncio sets this option only on sockets with a protocol number, and create_server gives none. Without it, an
        # answer on an open connection took 48 ms instead of 2 ms (Nagle's algorithm and delayed ACKs).
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except OSError as error:
        raise ConfigError(
            f"can't listen on {endpoint.host}:{endpoint.port} ({error.strerror}); choose another --http-port"
        ) from None
    application = app(
        service,
        token=token,
        seconds=endpoint.seconds,
        message_bytes=endpoint.message_bytes,
        concurrent=endpoint.concurrent,
    )
    config = uvicorn.Config(
        application,
        http=FirstRequestTimeout,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        ssl_certfile=endpoint.tls_cert,
        ssl_keyfile=endpoint.tls_key,
        timeout_keep_alive=int(min(endpoint.idle_seconds, 60)),
        timeout_graceful_shutdown=int(grace),
        h11_max_incomplete_event_size=endpoint.metadata_bytes,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, name="http", daemon=True)
    thread.start()
    try:
        yield listening.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(grace + 5)
        listening.close()
