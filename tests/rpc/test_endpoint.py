"""The secure endpoint: access, limits, statuses and error messages."""

from __future__ import annotations

import importlib
import logging
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import grpc
import pytest
import tls
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

import metadist
from metadist.core.errors import ConfigError, DataError
from metadist.rpc.endpoint import Endpoint, Refused, ServiceError, calling, connect, explain, serve
from metadist.serving import adapt_pb2 as pb
from metadist.serving import adapt_pb2_grpc

pytestmark = pytest.mark.lane("services")

ADD = adapt_pb2_grpc.add_AdaptationServicer_to_server
PACKAGE = Path(metadist.__file__).parent
METHOD = "/metadist.adapt.v1.Adaptation/Adapt"


class Servicer(adapt_pb2_grpc.AdaptationServicer):
    """Behaves as the request's field ``model`` says."""

    def __init__(self):
        self.release = threading.Event()
        self.entered = threading.Semaphore(0)

    def Adapt(self, request, context):
        if request.model == "refuse":
            raise Refused(grpc.StatusCode.NOT_FOUND, "no such\n  thing")
        if request.model == "abort":
            context.abort(grpc.StatusCode.ALREADY_EXISTS, "is there")
        if request.model == "config":
            raise ConfigError("key x: wrong")
        if request.model == "data":
            raise DataError("no data")
        if request.model == "bug":
            raise RuntimeError("secret at /home/somebody")
        if request.model == "wait":
            self.entered.release()
            self.release.wait(120)
        return pb.AdaptReply(handle=request.model, bytes=round(context.time_remaining()))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return tls.make(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def servicer():
    own = Servicer()
    yield own
    own.release.set()


@pytest.fixture
def plain(servicer):
    with serve(Endpoint(message_bytes=100_000), {ADD: servicer}) as served:
        yield served


def call(channel, model="x", **options):
    return adapt_pb2_grpc.AdaptationStub(channel).Adapt(pb.AdaptRequest(model=model), **options)


def refused(work):
    with pytest.raises(grpc.RpcError) as caught:
        work()
    return caught.value


def raw(channel, data, method=METHOD):
    return refused(lambda: channel.unary_unary(method)(data, timeout=60))


# Addresses, TLS and tokens --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "myhost"])
def test_other_hosts_than_loopback_need_tls_and_a_token(host, files):
    for given in ({}, {"token_file": files.token}, {"tls_cert": files.certificate, "tls_key": files.key}):
        with pytest.raises(ConfigError, match=r"--tls-cert.*--token-file"):
            Endpoint(host, **given)
    Endpoint(host, tls_cert=files.certificate, tls_key=files.key, token_file=files.token)


def test_loopback_needs_neither():
    for host in ("127.0.0.1", "localhost", "::1", "127.3.2.1"):
        Endpoint(host)


@pytest.mark.parametrize(
    ("content", "message"), [("short", "16 or more"), ("two words and more text", "without spaces"), ("", "openssl")]
)
def test_a_token_file_must_hold_a_token(tmp_path, content, message):
    (tmp_path / "token").write_text(content)
    with pytest.raises(ConfigError, match=message):
        Endpoint(token_file=str(tmp_path / "token")).token()


def test_unreadable_files_are_named(tmp_path, files):
    nowhere = str(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=f"token-file {nowhere}"):
        Endpoint(token_file=nowhere).token()
    with pytest.raises(ConfigError, match=f"tls-cert {nowhere}"):
        Endpoint(tls_cert=nowhere, tls_key=nowhere).credentials()
    with pytest.raises(ConfigError, match="both the certificate"):
        Endpoint(tls_cert=files.certificate)
    with pytest.raises(ConfigError, match="PEM"):
        Endpoint(tls_cert=files.token, tls_key=files.key).credentials()


def test_a_taken_port_is_an_error(plain, servicer):
    with pytest.raises(ConfigError, match=f"{plain.port}.*--port"), serve(Endpoint(port=plain.port), {ADD: servicer}):
        pass


def test_only_the_right_token_is_accepted(servicer, files, tmp_path, caplog):
    wrong = tmp_path / "wrong"
    wrong.write_text("x" * 64)
    wrong.chmod(0o600)
    caplog.set_level(logging.DEBUG)
    with serve(Endpoint(token_file=files.token), {ADD: servicer}) as served:
        assert call(connect(served.address, files.token)).handle == "x"
        for channel in (connect(served.address), connect(served.address, str(wrong))):
            error = refused(lambda channel=channel: call(channel))
            assert error.code() == grpc.StatusCode.UNAUTHENTICATED and "--token-file" in explain(error)
        token = Path(files.token).read_text().strip()
        for metadata in (
            [("authorization", token)],
            [("authorization", f"bearer {token}")],
            [("authorization", f"Bearer {token}")] * 2,
        ):
            assert (
                refused(lambda m=metadata: call(connect(served.address), metadata=m)).code()
                == grpc.StatusCode.UNAUTHENTICATED
            )
        # Unknown methods and reflection need the token too; only the health check does not.
        assert raw(connect(served.address), b"", "/no.Such/Method").code() == grpc.StatusCode.UNAUTHENTICATED
        reflected = reflection_pb2_grpc.ServerReflectionStub(connect(served.address))
        asked = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        assert refused(lambda: list(reflected.ServerReflectionInfo(asked))).code() == grpc.StatusCode.UNAUTHENTICATED
        health = health_pb2_grpc.HealthStub(connect(served.address))
        assert health.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.SERVING
    assert token not in caplog.text


def test_tls(servicer, files, tmp_path):
    endpoint = Endpoint("0.0.0.0", tls_cert=files.certificate, tls_key=files.key, token_file=files.token)
    other = tls.make(tmp_path / "other")
    with serve(endpoint, {ADD: servicer}) as served:
        address = f"127.0.0.1:{served.port}"
        assert call(connect(address, files.token, files.authority)).handle == "x"
        assert refused(lambda: call(connect(address, tls_ca=files.authority))).code() == grpc.StatusCode.UNAUTHENTICATED
        for channel, words in (
            (connect(address, files.token), "--tls-ca"),
            (connect(address, files.token, other.authority), "TLS"),
        ):
            error = refused(lambda channel=channel: call(channel, timeout=60))
            assert error.code() == grpc.StatusCode.UNAVAILABLE and words in explain(error)
        with socket.create_connection(("127.0.0.1", served.port), timeout=60) as plain:
            plain.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            assert b"200" not in plain.recv(1000)
        assert call(connect(address, files.token, files.authority)).handle == "x"


def test_a_token_is_not_sent_without_encryption(files):
    with pytest.raises(ConfigError, match="without encryption"):
        connect("192.0.2.1:443", files.token)
    connect("grpcs://192.0.2.1:443", files.token)


@pytest.mark.parametrize("address", ["host", "host:", ":80", "host:99999", "http://host:80", "host:x"])
def test_addresses(address):
    with pytest.raises(ConfigError, match="HOST:PORT"):
        connect(address)


# Limits, statuses and messages ----------------------------------------------------------------------------------------


def test_statuses(plain, caplog):
    channel = connect(plain.address)
    expected = {
        "refuse": (grpc.StatusCode.NOT_FOUND, "no such thing"),
        "abort": (grpc.StatusCode.ALREADY_EXISTS, "is there"),
        "config": (grpc.StatusCode.INVALID_ARGUMENT, "key x: wrong"),
        "data": (grpc.StatusCode.FAILED_PRECONDITION, "no data"),
    }
    for model, (code, message) in expected.items():
        error = refused(lambda model=model: call(channel, model))
        assert (error.code(), error.details()) == (code, message)
    error = refused(lambda: call(channel, "bug"))
    assert error.code() == grpc.StatusCode.INTERNAL and "secret" not in error.details()
    number = error.details().split()[2].rstrip(";")
    assert number in caplog.text and "secret at" in caplog.text  # only the log has the details
    stub = adapt_pb2_grpc.AdaptationStub(channel)
    assert refused(lambda: stub.Predict(pb.PredictRequest())).code() == grpc.StatusCode.UNIMPLEMENTED
    with pytest.raises(ServiceError, match=f"{plain.address}: no such thing") as caught, calling(plain.address):
        call(channel, "refuse")
    assert caught.value.code == grpc.StatusCode.NOT_FOUND


def test_malformed_oversized_and_empty_requests(plain):
    channel = connect(plain.address)
    for data in (b"\xff" * 10, b"\x12\x7f", b"\x0a\x05ab", b"\x0a\x02\xff\xfe"):
        error = raw(channel, data)
        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT and "Error" not in error.details()
    assert raw(channel, b"\x0a" * 200_000).code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    big = [("key", "v" * 60_000)]
    assert refused(lambda: call(channel, metadata=big)).code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert raw(channel, b"", "/metadist.adapt.v1.Adaptation/Nothing").code() == grpc.StatusCode.UNIMPLEMENTED
    nothing = channel.stream_unary(METHOD)
    assert refused(lambda: nothing(iter(()), timeout=60)).code() == grpc.StatusCode.INVALID_ARGUMENT
    assert call(channel).handle == "x"


def test_calls_end(servicer):
    """Calls whose request never arrives end too: each of them would hold a thread."""
    with serve(Endpoint(seconds=1.0, concurrent=2), {ADD: servicer}) as served:
        channel = connect(served.address)
        assert call(channel, timeout=300).bytes <= 1  # the server's limit, not the client's

        heard = threading.Event()

        def never():
            heard.wait(120)
            yield b""

        began = time.monotonic()
        waiting = [channel.stream_unary(METHOD).future(never(), timeout=120) for _ in range(2)]
        for future in waiting:
            assert isinstance(future.exception(), grpc.RpcError)
        assert time.monotonic() - began < 60
        heard.set()
        assert call_when_free(channel).handle == "x"


def call_when_free(channel):
    """Call until the server accepts. A client sees the end of a call before the server's thread is free."""
    deadline = time.monotonic() + 60
    while True:
        try:
            return call(channel)
        except grpc.RpcError as error:
            if error.code() != grpc.StatusCode.RESOURCE_EXHAUSTED or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def test_calls_above_the_limit_are_refused(servicer):
    with serve(Endpoint(concurrent=3), {ADD: servicer}) as served:
        channel = connect(served.address)
        stub = adapt_pb2_grpc.AdaptationStub(channel)
        waiting = [stub.Adapt.future(pb.AdaptRequest(model="wait")) for _ in range(3)]
        for _ in waiting:
            assert servicer.entered.acquire(timeout=60)
        error = refused(lambda: call(channel))
        assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED and "limit" in explain(error)
        servicer.release.set()
        assert [w.result(60).handle for w in waiting] == ["wait"] * 3
        assert call_when_free(channel).handle == "x"


def test_running_calls_end_before_the_server_stops(servicer):
    with serve(Endpoint(), {ADD: servicer}, grace=60) as served:
        waiting = adapt_pb2_grpc.AdaptationStub(connect(served.address)).Adapt.future(pb.AdaptRequest(model="wait"))
        assert servicer.entered.acquire(timeout=60)
        threading.Timer(0.5, servicer.release.set).start()
    assert waiting.result(60).handle == "wait"
    error = refused(lambda: call(connect(served.address), timeout=60))
    assert error.code() == grpc.StatusCode.UNAVAILABLE and "no server" in explain(error)


def test_reflection_and_health_name_the_service(plain):
    channel = connect(plain.address)
    reflected = reflection_pb2_grpc.ServerReflectionStub(channel)
    (answer,) = reflected.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
    assert plain.services[0] in {s.name for s in answer.list_services_response.service}
    health = health_pb2_grpc.HealthStub(channel)
    request = health_pb2.HealthCheckRequest(service=plain.services[0])
    assert health.Check(request).status == health_pb2.HealthCheckResponse.SERVING
    assert next(iter(health.Watch(request, timeout=60))).status == health_pb2.HealthCheckResponse.SERVING


def test_the_environment_of_grpc_is_set_before_every_import_of_grpc():
    """gRPC reads it once; Python runs the ``__init__`` of a package before the modules of the package."""
    importing = re.compile(r"^(import grpc|from grpc)", re.MULTILINE)
    packages = {path.parent for path in PACKAGE.rglob("*.py") if importing.search(path.read_text())}
    for package in packages - {PACKAGE / "rpc"}:
        assert "import metadist.rpc" in (package / "__init__.py").read_text(), package
    assert packages >= {PACKAGE / "control", PACKAGE / "rpc", PACKAGE / "serving", PACKAGE / "workers" / "remote"}


# The generated code ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("proto", sorted(p.relative_to(PACKAGE.parent).as_posix() for p in PACKAGE.rglob("*.proto")))
def test_generated_code_matches_its_proto(proto, tmp_path):
    """`make protos` ran after the last change of the proto."""
    subprocess.run(
        [
            sys.executable,
            "-m",
            "grpc_tools.protoc",
            "-I",
            str(PACKAGE.parent),
            f"--descriptor_set_out={tmp_path}/set",
            proto,
        ],
        cwd=PACKAGE.parent,
        check=True,
    )
    (now,) = descriptor_pb2.FileDescriptorSet.FromString((tmp_path / "set").read_bytes()).file
    module = importlib.import_module(f"{proto.removesuffix('.proto').replace('/', '.')}_pb2")
    then = descriptor_pb2.FileDescriptorProto.FromString(module.DESCRIPTOR.serialized_pb)

    def plain(messages):
        for message in messages:
            for field in message.field:  # only later compilers write this field
                field.ClearField("json_name")
            plain(message.nested_type)

    plain(now.message_type), plain(then.message_type)
    assert now == then
