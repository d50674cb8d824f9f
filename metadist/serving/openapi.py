"""Describe the HTTP service: an OpenAPI 3.1 document, and a page for people made from it, without foreign scripts."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

import metadist

TENSOR: dict[str, Any] = {
    "description": "Nested lists of numbers, or a packed tensor; for several, an object by name or a list by place.",
    "anyOf": [
        {"type": "array", "items": {}},
        {
            "type": "object",
            "required": ["shape", "dtype", "data"],
            "properties": {
                "shape": {"type": "array", "items": {"type": "integer"}},
                "dtype": {"type": "string", "examples": ["float32", "int64"]},
                "data": {"type": "string", "contentEncoding": "base64", "description": "Row by row, little-endian."},
            },
        },
        {"type": "object", "additionalProperties": {"$ref": "#/components/schemas/Tensor"}},
    ],
}
MODEL = {"type": "string", "description": "The model's name; may be missing where the server has one model."}
STEPS = {"type": ["integer", "null"], "minimum": 0, "description": "Inner steps; default: as in training."}
HANDLE = {"type": "string", "description": "Names adapted parameters that the server keeps."}
PREDICTION = {"type": "object", "properties": {"prediction": {"type": ["array", "object"]}}}
PICTURE = {"type": "string", "contentMediaType": "application/octet-stream"}
PICTURES = {"type": "array", "items": PICTURE}


def _tensor(what: str) -> dict[str, Any]:
    return {"$ref": "#/components/schemas/Tensor", "description": what}


def _object(required: Sequence[str], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": list(required), "properties": properties, "additionalProperties": False}


SUPPORT_X, SUPPORT_Y = _tensor("Inputs of the support set [N, …]."), _tensor("Targets [N, …], or classes [N] from 0.")
QUERY = _tensor("Inputs to predict [Q, …].")
#: call → (what it does, the schema of its JSON body, the schema of its answer)
CALLS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "adapt": (
        "Adapt to a support set; the server keeps the adapted parameters under a handle.",
        _object(["x", "y"], model=MODEL, x=SUPPORT_X, y=SUPPORT_Y, inner_steps=STEPS),
        {"type": "object", "properties": {"handle": HANDLE, "bytes": {"type": "integer"}}},
    ),
    "predict": (
        "Predict with adapted parameters: values [Q, …], or logits [Q, classes].",
        _object(["handle", "x"], handle=HANDLE, x=_tensor("Inputs to predict [Q, …].")),
        PREDICTION,
    ),
    "adapt_predict": (
        "Adapt and predict in one call; the server keeps nothing.",
        _object(["x", "y", "query"], model=MODEL, x=SUPPORT_X, y=SUPPORT_Y, query=QUERY, inner_steps=STEPS),
        PREDICTION,
    ),
    "forget": (
        "Remove adapted parameters.",
        _object(["handle"], handle=HANDLE),
        {"type": "object", "properties": {"existed": {"type": "boolean"}}},
    ),
}
CLASSIFY = {
    "summary": "Classify picture files: labelled ones in fields support/CLASS, those to classify in fields query.",
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["query"],
                    "properties": {"model": MODEL, "inner_steps": {"type": "integer", "minimum": 0}, "query": PICTURES},
                    "patternProperties": {"^support/.+$": PICTURES},
                    "additionalProperties": False,
                }
            }
        },
    },
}
CLASSIFIED = {
    "type": "object",
    "properties": {
        "classes": {"type": "array", "items": {"type": "string"}},
        "predictions": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "image": {"type": "string"},
                    "predicted": {"type": "string"},
                    "probabilities": {"type": "object", "additionalProperties": {"type": "number"}},
                },
            },
        },
    },
}


def document(models: Sequence[Mapping[str, Any]], *, token: bool) -> dict[str, Any]:
    """Return the OpenAPI document of a server with these models (``ServedModel.describe``)."""
    paths: dict[str, Any] = {}
    for name, (summary, body, answer) in CALLS.items():
        content = {"required": True, "content": {"application/json": {"schema": body}}}
        paths[f"/v1/{name}"] = {"post": _operation(name, {"summary": summary, "requestBody": content}, answer)}
    paths["/v1/classify"] = {"post": _operation("classify", CLASSIFY, CLASSIFIED)}
    listed = {"type": "object", "properties": {"models": {"type": "array", "items": {"type": "object"}}}}
    about = {"summary": "List the models with the shapes and limits of their inputs, and counts."}
    paths["/v1/models"] = {"get": _operation("models", about, listed)}
    names = ", ".join(f"{m['name']} ({m['algorithm']}, {m['kind']})" for m in models)
    found: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": "metadist adaptation service",
            "version": metadist.__version__,
            "description": f"Adapts models to small support sets. Models: {names}.",
        },
        "paths": paths,
        "components": {"schemas": {"Tensor": TENSOR}},
    }
    if token:
        found["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        found["security"] = [{"token": []}]
    return found


def _operation(name: str, about: Mapping[str, Any], answer: Mapping[str, Any]) -> dict[str, Any]:
    error = {"type": "object", "properties": {"error": {"type": "string"}}}

    def reply(description: str, schema: Mapping[str, Any]) -> dict[str, Any]:
        return {"description": description, "content": {"application/json": {"schema": schema}}}

    replies = {"200": reply("The answer.", answer), "default": reply("One line that says what is wrong.", error)}
    return {"operationId": name, **about, "responses": replies}


def page(described: Mapping[str, Any]) -> str:
    """Return an HTML page for an OpenAPI document."""
    rows = []
    for path, methods in described["paths"].items():
        for method, about in methods.items():
            contents = about.get("requestBody", {}).get("content", {})
            for kind, content in contents.items() or [("", {"schema": {}})]:
                schema = content["schema"]
                fields = [*schema.get("properties", {}), *schema.get("patternProperties", {})]
                cells = [f"<code>{method.upper()} {path}</code>", about["summary"], kind, ", ".join(fields)]
                escaped = [cells[0], *map(html.escape, cells[1:])]
                rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in escaped) + "</tr>")
    info = described["info"]
    head = "<tr><th>call</th><th>purpose</th><th>body</th><th>fields</th></tr>"
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(info['title'])}</title>"
        "<style>body{font:16px sans-serif;margin:2em}td,th{padding:.4em 1em;text-align:left;vertical-align:top}</style>"
        f"<h1>{html.escape(info['title'])} {html.escape(info['version'])}</h1><p>{html.escape(info['description'])}</p>"
        f"<table>{head}{''.join(rows)}</table><p><a href=openapi.json>openapi.json</a></html>\n"
    )
