"""HTTP proxies: what this machine says to itself does not go through them."""

from __future__ import annotations

import os
import platform
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from metadist.rpc import proxies

NAMES = [name for each in (*proxies.PROXIES, "no_proxy") for name in (each, each.upper())]


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in NAMES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def test_without_a_proxy_nothing_changes():
    proxies.bypass_proxies()
    assert "no_proxy" not in os.environ and "NO_PROXY" not in os.environ


@pytest.mark.parametrize("name", ["HTTP_PROXY", "https_proxy", "grpc_proxy", "ALL_PROXY"])
def test_this_machine_is_excepted_and_the_users_exceptions_stay(monkeypatch, name):
    monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "intranet.example, 10.0.0.0/8")
    proxies.bypass_proxies()
    for each in ("no_proxy", "NO_PROXY"):
        listed = os.environ[each].split(",")
        assert listed[:2] == ["intranet.example", "10.0.0.0/8"]
        assert {"localhost", "127.0.0.1", "::1", platform.node()} <= set(listed)
        assert len(set(listed)) == len(listed)
    before = os.environ["no_proxy"]
    proxies.bypass_proxies()
    assert os.environ["no_proxy"] == before


def test_no_proxy_at_all_stays(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "*")
    proxies.bypass_proxies()
    assert os.environ["no_proxy"] == "*"


@pytest.mark.lane("services")
def test_grpc_and_mlflows_client_reach_a_local_server(monkeypatch):
    import grpc
    import requests

    from metadist.rpc.channel import connect
    from metadist.tracking.mlflow_uri import prepare_environment

    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nothing listens there

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"here")

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    with pytest.raises(requests.exceptions.ProxyError):
        requests.get(url, timeout=10)
    prepare_environment()
    assert requests.get(url, timeout=10).text == "here"
    server.shutdown()

    service = grpc.server(ThreadPoolExecutor(1))
    port = service.add_insecure_port("127.0.0.1:0")
    service.start()
    call = connect(f"127.0.0.1:{port}").unary_unary("/none/none")
    with pytest.raises(grpc.RpcError) as refused:
        call(b"", timeout=20)
    assert refused.value.code() == grpc.StatusCode.UNIMPLEMENTED, "the answer of the server"
    service.stop(None)
