"""A stand-in for the Kubernetes API: an empty cluster that accepts resources and keeps a list of them."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import yaml

RESOURCES = {
    "v1": [("secrets", "Secret"), ("configmaps", "ConfigMap"), ("namespaces", "Namespace")],
    "ray.io/v1": [("rayjobs", "RayJob"), ("rayclusters", "RayCluster"), ("rayservices", "RayService")],
    "networking.k8s.io/v1": [("networkpolicies", "NetworkPolicy")],
}
VERBS = ["create", "delete", "get", "list", "patch", "update"]


class EmptyCluster(BaseHTTPRequestHandler):
    """Serve the discovery documents of ``RESOURCES`` and store what is created."""

    protocol_version = "HTTP/1.1"
    created: list[dict]

    def answer(self, document, code=200, kind="application/json"):
        body = document if isinstance(document, bytes) else json.dumps(document).encode()
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        path = self.path.partition("?")[0].rstrip("/")
        version = path.removeprefix("/apis/").removeprefix("/api/")
        groups = [v.split("/")[0] for v in RESOURCES if "/" in v]
        if path == "/version":
            self.answer({"major": "1", "minor": "33", "gitVersion": "v1.33.0", "platform": "linux/amd64"})
        elif path == "/api":
            self.answer({"kind": "APIVersions", "apiVersion": "v1", "versions": ["v1"]})
        elif path == "/apis":
            listed = [{"groupVersion": f"{g}/v1", "version": "v1"} for g in groups]
            items = [{"name": g, "versions": [v], "preferredVersion": v} for g, v in zip(groups, listed)]
            self.answer({"kind": "APIGroupList", "apiVersion": "v1", "groups": items})
        elif version in RESOURCES:
            items = [
                {"name": name, "singularName": "", "namespaced": True, "kind": kind, "verbs": VERBS}
                for name, kind in RESOURCES[version]
            ]
            self.answer({"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": version, "resources": items})
        elif path.endswith("/secrets"):
            self.answer({"kind": "SecretList", "apiVersion": "v1", "metadata": {"resourceVersion": "1"}, "items": []})
        else:
            missing = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": 404}
            self.answer(missing, 404)

    def do_POST(self):
        body, kind = self.rfile.read(int(self.headers["Content-Length"])), self.headers["Content-Type"]
        if "protobuf" in kind:  # Helm's own record of the release
            self.answer(body, 201, kind)
            return
        document = yaml.safe_load(body)
        self.created.append(document)
        self.answer({**document, "metadata": {**document["metadata"], "uid": "1", "resourceVersion": "1"}}, 201)

    do_PUT = do_PATCH = do_POST

    def log_message(self, *_):
        pass


@contextmanager
def empty_cluster(folder: Path) -> Iterator[tuple[Path, list[dict]]]:
    """Yield (a kubeconfig file in ``folder``, the list of resources that clients create)."""
    handler = type("Handler", (EmptyCluster,), {"created": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        kubeconfig = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}],
            "users": [{"name": "u", "user": {}}],
            "current-context": "c",
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        }
        (folder / "kubeconfig").write_text(yaml.safe_dump(kubeconfig))
        yield folder / "kubeconfig", handler.created
    finally:
        server.shutdown()
        server.server_close()
