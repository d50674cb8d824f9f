"""Helm's own rendering of a chart: ``helm install`` against a listener that answers as an empty Kubernetes API would.

``python helm_install.py CHART VALUES.json RELEASE NAMESPACE`` prints what Helm sent, as a JSON list. Run with a Python that has helm-sdkpy.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

RESOURCES = {
    "v1": [("secrets", "Secret"), ("configmaps", "ConfigMap")],
    "ray.io/v1": [("rayjobs", "RayJob"), ("rayclusters", "RayCluster"), ("rayservices", "RayService")],
    "networking.k8s.io/v1": [("networkpolicies", "NetworkPolicy")],
}
VERBS = ["create", "delete", "get", "list", "patch", "update"]
sent = []


class Empty(BaseHTTPRequestHandler):
    """An API server with those resources and nothing in it."""

    protocol_version = "HTTP/1.1"

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
            self.answer(
                {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": 404}, 404
            )

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if "json" in self.headers["Content-Type"]:
            sent.append(json.loads(body))
            self.answer({**sent[-1], "metadata": {**sent[-1]["metadata"], "uid": "1", "resourceVersion": "1"}}, 201)
        else:  # Helm's own record of the release, in protobuf: it gets it back
            self.answer(body, 201, self.headers["Content-Type"])

    do_PUT = do_PATCH = do_POST

    def log_message(self, *_):
        pass


def main(chart, values, release, namespace):
    import helm_sdkpy as helm

    server = ThreadingHTTPServer(("127.0.0.1", 0), Empty)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    cluster = {"name": "c", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}
    kubeconfig = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [cluster],
        "users": [{"name": "u", "user": {}}],
        "current-context": "c",
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
    }
    with open(values) as file:
        given = json.load(file)
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        json.dump(kubeconfig, file)
        file.flush()
        configuration = helm.Configuration(namespace=namespace, kubeconfig=file.name)
        asyncio.run(helm.Lint(configuration).run(chart))
        asyncio.run(helm.Install(configuration).run(release, chart, values=given, wait=False))
    print(json.dumps(sent))


if __name__ == "__main__":
    main(*sys.argv[1:])
