"""Hostile callers against a server in a process of its own: each gets the right status, the server stays healthy."""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import socket
import time

import grpc
import numpy as np
import psutil
import pyarrow as pa
import pytest
import tiny
import tls
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tiny import train

from metadist import Client
from metadist.rpc.channel import connect
from metadist.serving import adapt_pb2 as pb
from metadist.serving import adapt_pb2_grpc
from metadist.serving.tensors import to_message

pytestmark = [pytest.mark.lane("services"), pytest.mark.long, pytest.mark.timeout(900)]
SERVICE = "/metadist.adapt.v1.Adaptation/"
GROWTH_MIB = 50


class Server:
    def __init__(self, folder, *options):
        self.process = tiny.start(
            "serve", folder / "run", "--port", 0, "--http-port", 0, *options, folder=folder, OMP_NUM_THREADS="1"
        )
        shown = {}
        while "HTTP" not in shown:
            line = self.process.stderr.readline()
            assert line, "the server ended"
            shown[line.split()[0]] = line.split()[1]
        self.address = shown["gRPC"]
        self.http = shown["HTTP"].split("//")[1].partition("/")[0]

    def mib(self):
        return psutil.Process(self.process.pid).memory_info().rss / 2**20


@pytest.fixture(scope="module")
def secrets(tmp_path_factory):
    return tls.make(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    return folder, train(tiny.experiment("outer.meta_steps=2"), run_dir=str(folder / "run"), plots=False)


@pytest.fixture(scope="module")
def server(home, secrets):
    own = Server(home[0], "--token-file", secrets.token, "--budget-mib", 1, "--max-message-mib", 8)
    yield own
    own.process.terminate()
    _, err = own.process.communicate(timeout=60)
    assert own.process.returncode == 0 and "Traceback" not in err, err[-5000:]


X, Y = torch.linspace(-1, 1, 6).unsqueeze(1), torch.linspace(0, 1, 6).unsqueeze(1)


@pytest.fixture
def unharmed(server, home, secrets):
    """The server answers right before and after the test, and needs hardly more memory."""

    def right():
        with Client(server.address, token_file=secrets.token) as client:
            for _ in range(200):
                client.adapt(X, Y)
            assert torch.equal(client.adapt_predict(X, Y, X), home[1].predict(home[1].adapt(X, Y), X))
        health = health_pb2_grpc.HealthStub(connect(server.address))
        assert health.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.SERVING

    right()
    before = server.mib()
    yield
    began = time.monotonic()
    right()
    assert time.monotonic() - began < 30
    print(f"server {before:.0f} → {server.mib():.0f} MiB")
    assert server.mib() - before < GROWTH_MIB


def codes(channel, requests, method="Adapt", at_once=32, **options):
    """Send all requests, ``at_once`` at a time, and return the count of each status."""
    counts, waiting = {}, []
    call = channel.unary_unary(SERVICE + method)

    def take():
        error = waiting.pop(0).exception()
        code = error.code() if error is not None else grpc.StatusCode.OK
        counts[code] = counts.get(code, 0) + 1

    for request in requests:
        waiting.append(call.future(request, timeout=60, **options))
        if len(waiting) >= at_once:
            take()
    while waiting:
        take()
    return counts


def test_ten_thousand_malformed_messages(server, secrets, unharmed):
    draw = random.Random(0)
    good = pb.AdaptRequest(x=to_message(X), y=to_message(Y)).SerializeToString()

    def message(i):
        if i % 2:
            return draw.randbytes(draw.randint(1, 300))
        return good[: draw.randrange(1, len(good))] if i % 4 else bytes(b ^ (draw.random() < 0.05) * 0xFF for b in good)

    counts = codes(connect(server.address, secrets.token), (message(i) for i in range(10_000)))
    print(counts)
    assert sum(counts.values()) == 10_000
    # A message with a flipped bit may be valid, or name an unknown model.
    assert set(counts) <= {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.OK,
        grpc.StatusCode.FAILED_PRECONDITION,
    }
    assert counts[grpc.StatusCode.INVALID_ARGUMENT] > 9_000


def test_no_token_wrong_token_and_too_large(server, secrets, unharmed):
    channel = connect(server.address)
    good = pb.AdaptRequest(x=to_message(X), y=to_message(Y)).SerializeToString()
    assert codes(channel, [good] * 500) == {grpc.StatusCode.UNAUTHENTICATED: 500}
    wrong = [("authorization", "Bearer " + "x" * 64)]
    assert codes(channel, [good] * 500, metadata=wrong) == {grpc.StatusCode.UNAUTHENTICATED: 500}
    assert codes(connect(server.address, secrets.token), [b"\0" * (9 << 20)] * 40, at_once=2) == {
        grpc.StatusCode.RESOURCE_EXHAUSTED: 40
    }


def test_wrong_tensors(server, secrets, unharmed):
    channel = connect(server.address, secrets.token)
    zeros = pa.array(np.zeros(20_000_000))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(
        sink, pa.schema([pa.field("x", zeros.type)]), options=pa.ipc.IpcWriteOptions(compression="zstd")
    ) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays([zeros], names=["x"]))
    bomb = sink.getvalue().to_pybytes()
    longer = bytearray(to_message(X, arrow=True).arrow)
    at = longer.find((6).to_bytes(8, "little"))
    longer[at : at + 8] = (2**40).to_bytes(8, "little")
    many = 10_000
    wrong = [
        pb.AdaptRequest(x=pb.Tensor(arrow=bomb), y=to_message(Y)),
        pb.AdaptRequest(x=pb.Tensor(arrow=bytes(longer)), y=to_message(Y)),
        pb.AdaptRequest(x=pb.Tensor(shape=[2**31 - 1, 1], dtype="float64", data=b"\0" * 8), y=to_message(Y)),
        pb.AdaptRequest(x=to_message(X * float("nan")), y=to_message(Y)),
        pb.AdaptRequest(x=to_message(X), y=to_message(Y * float("inf"))),
        pb.AdaptRequest(x=to_message(torch.zeros(many, 1)), y=to_message(torch.arange(many))),
        pb.AdaptRequest(x=to_message(X), y=to_message(Y), inner_steps=10**6),
    ]
    for request in wrong:
        assert codes(channel, [request.SerializeToString()] * 200) == {grpc.StatusCode.INVALID_ARGUMENT: 200}


def test_malformed_http(server, secrets, unharmed):
    draw, seen = random.Random(0), {}
    host, _, port = server.http.rpartition(":")
    token = {"Authorization": f"Bearer {open(secrets.token).read().strip()}"}  # noqa: SIM115
    connection = http.client.HTTPConnection(host, int(port), timeout=60)
    many = json.dumps({"x": [[0.0]] * 10_000, "y": [[0.0]] * 10_000}).encode()
    bodies = [
        b"{",
        b"[" * 200_000,
        b'{"x": NaN}',
        b'{"x": 1e999, "y": 1}',
        many,
        b'{"x": ' + b"9" * 5000 + b"}",
        b"\xff" * 100,
    ]
    for i in range(3000):
        body = bodies[i % len(bodies)] if i % 3 else draw.randbytes(draw.randint(0, 200))
        connection.request("POST", "/v1/adapt", body, token)
        answer = connection.getresponse()
        assert json.loads(answer.read())["error"]
        seen[answer.status] = seen.get(answer.status, 0) + 1
    assert seen == {400: 3000}
    connection.close()
    for body, headers, status in ((b" " * (9 << 20), token, 413), (b"{}", {}, 401)):
        connection = http.client.HTTPConnection(host, int(port), timeout=60)
        try:
            connection.request("POST", "/v1/adapt", body, headers)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the server answered before it read the whole body
        assert connection.getresponse().status == status
        connection.close()


def test_a_thousand_idle_and_slow_connections(server, secrets, unharmed):
    """Half of them on each port; then some that send part of a request, and some that do not read."""
    token = open(secrets.token).read().strip()  # noqa: SIM115
    ports = [server.address.rpartition(":"), server.http.rpartition(":")]
    idle = [socket.create_connection((ports[i % 2][0], int(ports[i % 2][2])), timeout=30) for i in range(1000)]
    with Client(server.address, token_file=secrets.token) as client:
        assert client.adapt_predict(X, Y, X).shape == X.shape
    request = f"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n\r\n".encode()
    for i, connection in enumerate(idle[1::2]):
        connection.sendall(request * 20 if i % 2 else request[: i % len(request)])
    host, _, port = server.http.rpartition(":")
    statuses = []
    while not statuses or (statuses[-1] == 429 and len(statuses) < 100):  # above the limit of simultaneous calls
        connection = http.client.HTTPConnection(host, int(port), timeout=60)
        connection.request("GET", "/v1/models", headers={"Authorization": f"Bearer {token}"})
        statuses.append(connection.getresponse().status)
        connection.close()
        time.sleep(0.1)
    assert statuses[-1] == 200 and set(statuses) <= {200, 429}
    with Client(server.address, token_file=secrets.token) as client:
        assert client.adapt_predict(X, Y, X).shape == X.shape
    time.sleep(25)  # longer than the time limit of a first request
    closed = 0
    for connection in idle[0::2]:
        connection.settimeout(5)
        try:
            while data := connection.recv(4096):  # gRPC's server sends first
                assert data
            closed += 1
        except (ConnectionResetError, TimeoutError) as error:
            closed += isinstance(error, ConnectionResetError)
    assert closed == 500
    for connection in idle:
        connection.close()


def test_clients_that_do_not_read(server, secrets, unharmed):
    for _ in range(3):
        _deaf(server, secrets)
        time.sleep(3)
        print(f"server {server.mib():.0f} MiB")


def _deaf(server, secrets):
    """Request large answers over HTTP without reading them, and over gRPC with cancelled calls; others are answered."""
    stub = adapt_pb2_grpc.AdaptationStub(connect(server.address, secrets.token))
    handle = stub.Adapt(pb.AdaptRequest(x=to_message(X), y=to_message(Y))).handle
    body = json.dumps({"handle": handle, "x": torch.rand(1000, 1).tolist()}).encode()
    token = open(secrets.token).read().strip()  # noqa: SIM115
    authorization = f"Authorization: Bearer {token}\r\n"
    head = f"POST /v1/predict HTTP/1.1\r\nHost: x\r\n{authorization}Content-Length: {len(body)}\r\n\r\n".encode()
    host, _, port = server.http.rpartition(":")
    deaf = []
    for _ in range(40):
        one = socket.socket()
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        one.connect((host, int(port)))
        one.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            for _ in range(200):
                one.send(head + body)
        deaf.append(one)
    query = pb.PredictRequest(handle=handle, x=to_message(torch.rand(1000, 1)))
    for _ in range(5):
        futures = [
            adapt_pb2_grpc.AdaptationStub(connect(server.address, secrets.token)).Predict.future(query)
            for _ in range(40)
        ]
        for future in futures:
            future.cancel()
    with Client(server.address, token_file=secrets.token) as client:
        assert client.adapt_predict(X, Y, X).shape == X.shape
    connection = http.client.HTTPConnection(host, int(port), timeout=60)
    connection.request("GET", "/v1/models", headers={"Authorization": f"Bearer {token}"})
    assert connection.getresponse().status == 200
    connection.close()
    for one in deaf:
        one.close()


def test_plaintext_to_tls(home, secrets):
    server = Server(home[0], "--tls-cert", secrets.certificate, "--tls-key", secrets.key, "--token-file", secrets.token)
    try:
        for address in (server.address, server.http):
            host, _, port = address.rpartition(":")
            for _ in range(200):
                with socket.create_connection((host, int(port)), timeout=30) as plain:
                    plain.sendall(b"POST /v1/adapt HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}")
                    try:
                        assert b"200" not in plain.recv(1000)
                    except ConnectionResetError:
                        pass
        counts = codes(connect(server.address, secrets.token), [b"x"] * 20)
        assert counts == {grpc.StatusCode.UNAVAILABLE: 20}
        with Client(server.address, token_file=secrets.token, tls_ca=secrets.authority) as client:
            assert torch.equal(client.adapt_predict(X, Y, X), home[1].predict(home[1].adapt(X, Y), X))
    finally:
        server.process.terminate()
        _, err = server.process.communicate(timeout=60)
    assert server.process.returncode == 0 and "Traceback" not in err, err[-5000:]
