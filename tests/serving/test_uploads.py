"""Picture files over HTTP: the answers of ``metadist predict`` with names of classes; the page that describes it."""

from __future__ import annotations

import io
import json
import math
import re
import subprocess
import urllib.error
import urllib.request
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from PIL import Image
from serving_toys import learner, served

from metadist.core.task import Examples
from metadist.rpc.endpoint import Endpoint
from metadist.serving import load as serving
from metadist.serving.model import Limits, ServedModel
from metadist.serving.openapi import document
from metadist.serving.service import AdaptationService
from metadist.tasks.decode import Decode

pytestmark = pytest.mark.lane("services")
DECODE = Decode(6, 1, True)


@pytest.fixture(scope="module")
def model():
    own = learner("maml", "inductive")
    return ServedModel("pictures", own, own.initial(5), "toy", Limits(), (6, 1, True, None))


@pytest.fixture(scope="module")
def address(model):
    service = AdaptationService([model, served("maml", name="curves")])
    with serving.serve(service, Endpoint(message_bytes=1 << 20), 0) as running:
        yield running.http_address


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root, generator = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for name in ("few/dog", "few/cat", "few/Ärger", "many"):
        (root / name).mkdir(parents=True)
        for i in range(2):
            Image.fromarray(generator.integers(0, 256, (9, 7, 3), dtype=np.uint8)).save(root / name / f"{i}.png")
    return root


def curl(address, *parts):
    """As users call it."""
    forms = [word for part in parts for word in ("-F", part)]
    done = subprocess.run(["curl", "-sS", f"{address}/v1/classify", *forms], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_same_answer_as_in_this_process(address, folder, model):
    names = ("cat", "dog", "Ärger")
    support = [f"support/{n}=@{folder}/few/{n}/{i}.png" for n in reversed(names) for i in range(2)]
    found = curl(
        address, "model=pictures", "inner_steps=2", *support, *(f"query=@{folder}/many/{i}.png" for i in (1, 0))
    )

    def read(path):
        return torch.from_numpy(DECODE(path.name, path.read_bytes).astype(np.float32) * np.float32(1 / 255))

    x = torch.stack([read(folder / f"few/{n}/{i}.png") for n in reversed(names) for i in range(2)])
    labels = Examples(x, torch.tensor([2, 2, 1, 1, 0, 0]))
    phi = model.learner.adapt(model.state, labels, 2)
    query = torch.stack([read(folder / f"many/{i}.png") for i in (1, 0)])
    probabilities = torch.softmax(model.learner.predict(model.state, phi, query, labels).double(), -1)
    assert found["model"] == "pictures" and found["classes"] == list(names)
    assert [row["image"] for row in found["predictions"]] == ["1.png", "0.png"]
    for row, expected in zip(found["predictions"], probabilities.tolist()):
        assert list(row["probabilities"].values()) == pytest.approx(expected, abs=1e-4)
        assert row["predicted"] == names[expected.index(max(expected))]
        assert math.isclose(sum(row["probabilities"].values()), 1, abs_tol=1e-5)


def bomb():
    buffer = io.BytesIO()
    Image.new("1", (10_000, 10_000)).save(buffer, "png")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            ["support/a=@0.png", "query=@0.png"],
            "1 labelled pictures of fewer than 2 classes, or no query; expected a form",
        ),
        (["support/a=@0.png", "support/b=@0.png"], "or no query"),
        (["support/a=@0.png", "support/b=@x.txt", "query=@0.png"], "'b' is not a readable image"),
        (
            ["support/a=@0.png", "support/b=@0.png", "query=@bomb.png"],
            "'bomb.png' has 10000 × 10000 pixels; send at most",
        ),
        (["support/a=@0.png", "support/=@0.png", "query=@0.png"], "the class name '' is empty"),
        (["support/a=@0.png", "support/\x1b[31mb=@0.png", "query=@0.png"], "has control characters"),
        (["labels=@0.png"], "unknown field 'labels'"),
        (["support/a=@0.png", "support/b=@0.png", "query=@0.png", "inner_steps=-1"], "inner_steps: expected a whole"),
        (["support/a=@0.png", "support/b=@0.png", "query=@0.png", "model=curves"], "model 'curves' does not classify"),
        (["support/a=@0.png", "support/b=@0.png", "query=@0.png", "model=x"], "x"),
        (
            [*(f"support/{i}=@0.png" for i in range(4)), "query=@0.png"],
            "classify: 4 classes; model 'pictures' takes 2 to 3",
        ),
        (["support/a=@0.png", "support/b=@0.png", "query=@big.bin"], "the body exceeds 1 MiB"),
    ],
)
def test_wrong_forms_are_refused_by_name(address, folder, monkeypatch, parts, message):
    monkeypatch.chdir(folder / "many")
    (folder / "many" / "x.txt").write_text("no picture")
    (folder / "many" / "bomb.png").write_bytes(bomb())
    (folder / "many" / "big.bin").write_bytes(bytes(2 << 20))
    model = [] if any(p.startswith("model=") for p in parts) else ["model=pictures"]
    assert message in curl(address, *model, *parts)["error"]


def test_a_body_that_is_no_form_is_refused(address):
    for kind in ("application/json", "multipart/form-data", "multipart/form-data; boundary=x"):
        request = urllib.request.Request(f"{address}/v1/classify", b'{"x": 1}', {"Content-Type": kind})
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=30)
        assert refused.value.code == 400 and "expected a form" in json.load(refused.value)["error"]


def test_the_openapi_document_has_every_call(address, model):
    with urllib.request.urlopen(f"{address}/openapi.json", timeout=30) as answer:
        found = json.load(answer)
    assert found == document([model.describe(), served("maml", name="curves").describe()], token=False)
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{address}/nothing", timeout=30)
    calls = set(re.findall(r"/v1/\w+", json.load(refused.value)["error"]))
    assert set(found["paths"]) == calls
    for path, methods in found["paths"].items():
        for method in ("get", "post"):
            request = urllib.request.Request(address + path, data=b"" if method == "post" else None)
            try:
                status = urllib.request.urlopen(request, timeout=30).status
            except urllib.error.HTTPError as error:
                status = error.code
            assert (status != 405) == (method in methods), f"{method} {path}: {status}"
    models = pytest.importorskip("fastapi.openapi.models")
    models.OpenAPI.model_validate(found)
    assert document([], token=True)["security"] == [{"token": []}]


def test_the_fields_of_the_document_are_those_that_the_service_takes(address):
    with urllib.request.urlopen(f"{address}/openapi.json", timeout=30) as answer:
        paths = json.load(answer)["paths"]
    for name in ("adapt", "predict", "adapt_predict", "forget"):
        schema = paths[f"/v1/{name}"]["post"]["requestBody"]["content"]["application/json"]["schema"]
        request = urllib.request.Request(
            f"{address}/v1/{name}", b'{"nonsense": 1}', {"Content-Type": "application/json"}
        )
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=30)
        assert json.load(refused.value)["error"].endswith("expected " + ", ".join(schema["properties"]))


def test_the_page_for_people(address):
    with urllib.request.urlopen(f"{address}/docs", timeout=30) as answer:
        assert answer.headers["content-type"].startswith("text/html")
        text = answer.read().decode()
    assert "POST /v1/classify" in text and "support/CLASS" in text and "pictures (MAML, classification)" in text
    assert not urlsplit(re.findall(r'(?:href|src)="?([^ >"]+)', text)[0]).netloc, "nothing from elsewhere"
