"""Connections without a request, clients that do not read, and calls without a token."""

from __future__ import annotations

import asyncio
import http.client
import socket
import time

import pytest
from serving_toys import served

from metadist.rpc.endpoint import Endpoint
from metadist.rpc.http_guard import FirstRequestTimeout, HttpGuard
from metadist.serving import load as serving
from metadist.serving.service import AdaptationService

pytestmark = pytest.mark.lane("services")


@pytest.mark.lane("services")
def test_a_connection_without_a_request_is_closed(monkeypatch):
    monkeypatch.setattr(FirstRequestTimeout, "SECONDS", 0.3)
    with serving.serve(AdaptationService([served()]), Endpoint(), 0) as running:
        host, _, port = running.http_address.removeprefix("http://").rpartition(":")
        for sent in (b"", b"GET /v1/mod"):
            with socket.create_connection((host, int(port)), timeout=90) as idle:
                idle.sendall(sent)
                began = time.monotonic()
                assert idle.recv(100) == b"" and time.monotonic() - began < 60
        monkeypatch.setattr(FirstRequestTimeout, "SECONDS", 2.0)  # a busy machine needs time for the first request
        with socket.create_connection((host, int(port)), timeout=90) as connection:
            for _ in range(2):  # a connection with a request stays open
                connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
                answer = b""
                while b"SERVING" not in answer:  # headers and body may arrive separately
                    answer += (more := connection.recv(1000))
                    assert more
                assert b"200" in answer
                time.sleep(2.5)


def test_the_call_of_a_client_that_does_not_read_ends():
    seen = []

    async def inner(scope, receive, send):
        await send({"type": "http.response.start", "status": 200})

    async def never(message):
        await asyncio.sleep(600)

    async def call():
        guarded = HttpGuard(inner, None, -0.7, 4, lambda *call: seen.append(call))
        await guarded({"type": "http", "headers": [], "path": "/v1/predict"}, None, never)

    began = time.monotonic()
    asyncio.run(call())
    assert time.monotonic() - began < 60 and seen[0][0] == "Predict"


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/v1/adapt", "/nothing"])
def test_only_the_health_check_needs_no_token(path):
    answers = []

    async def inner(scope, receive, send):
        await send({"type": "http.response.start", "status": 200})

    async def keep(message):
        answers.append(message.get("status"))

    guarded = HttpGuard(inner, "right" * 4, 5.0, 4, lambda *call: None)
    for headers in ([], [(b"authorization", b"Bearer wrong")], [(b"authorization", b"Bearer " + b"right" * 4)] * 2):
        asyncio.run(guarded({"type": "http", "headers": headers, "path": path}, None, keep))
    assert {a for a in answers if a is not None} == {401}
    asyncio.run(
        guarded({"type": "http", "headers": [(b"authorization", b"Bearer " + b"right" * 4)], "path": path}, None, keep)
    )
    asyncio.run(guarded({"type": "http", "headers": [], "path": "/healthz"}, None, keep))
    assert answers[-2:] == [200, 200]


def test_connections_do_not_delay_small_packets(monkeypatch):
    """Without TCP_NODELAY, an answer on an open connection waits 40 ms for a delayed ACK."""
    options, made = [], FirstRequestTimeout.connection_made

    def connection_made(protocol, transport):
        options.append(transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        made(protocol, transport)

    monkeypatch.setattr(FirstRequestTimeout, "connection_made", connection_made)
    with serving.serve(AdaptationService([served()]), Endpoint(), 0) as running:
        connection = http.client.HTTPConnection(running.http_address.removeprefix("http://"), timeout=90)
        connection.request("GET", "/healthz")
        assert connection.getresponse().read() == b"SERVING\n"
        connection.close()
    assert options == [1]
