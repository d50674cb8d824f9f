"""Check resources by KubeRay's schemas; an unknown field is an error, as for ``kubectl apply --validate=strict``."""

from __future__ import annotations

import functools
import gzip
from pathlib import Path

import jsonschema
import yaml

PLURALS = {"RayCluster": "rayclusters", "RayJob": "rayjobs", "RayService": "rayservices"}


def strict(schema):
    """Add ``additionalProperties: false`` to every object with named fields, unless the CRD keeps unknown fields."""
    if isinstance(schema, list):
        return [strict(s) for s in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    if schema.get("x-kubernetes-int-or-string"):
        made.pop("type", None)
    return made


@functools.cache
def validator(folder: str, kind: str):
    path = Path(folder) / "kuberay" / f"ray.io_{PLURALS[kind]}.yaml.gz"
    crd = yaml.load(gzip.decompress(path.read_bytes()), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    [version] = [v for v in crd["spec"]["versions"] if v["name"] == "v1"]
    schema = strict(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {
        "type": "object",
        "additionalProperties": False,
        "required": ["name"],
        "properties": {
            "name": {"type": "string", "maxLength": 63, "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"},
            "namespace": {"type": "string"},
            "labels": {"type": "object"},
        },
    }
    return jsonschema.Draft7Validator(schema)


def errors(folder, document):
    return [
        f"{'.'.join(map(str, e.absolute_path))}: {e.message}"
        for e in validator(folder, document["kind"]).iter_errors(document)
    ]
