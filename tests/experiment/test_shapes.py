"""One signature of inputs and targets, from training to ``adapt``, ``predict``, export, server and MLflow model."""

from __future__ import annotations

import base64
import json
import urllib.error
import urllib.request
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import shaped
import torch
from serving_toys import network
from tiny import last_json
from tiny import learner as tiny_learner
from torch import nn
from typer.testing import CliRunner

import metadist
from metadist.algorithms import MAML, ProtoNet
from metadist.cli.app import app
from metadist.core.errors import CheckpointError, ConfigError, MetadistError
from metadist.core.outer import OuterLoop
from metadist.core.random import TaskKey
from metadist.core.signature import DivergedAdaptation, InvalidInput, Signature
from metadist.experiment.load import load_run
from metadist.experiment.request import RunRequest
from metadist.experiment.result import Result
from metadist.experiment.train import train
from metadist.rpc.endpoint import Endpoint
from metadist.serving import load as serving
from metadist.serving.load import open_model
from metadist.serving.mlflow_model import _load_pyfunc
from metadist.testing.toys import Blobs, Curves

pytestmark = pytest.mark.lane("services")

STEPS, RATE = 3, 0.05


@pytest.fixture(scope="module", autouse=True)
def trusting():
    """Let run directories and exports of this module name its parts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METADIST_TRUST", f"{shaped.__name__} {network.__module__} {__name__}")
        yield


def trained(folder: Path, tasks, model, algorithm=None, *, dtype="float64") -> Result:
    experiment = metadist.compose(
        tasks=tasks,
        model=model,
        algorithm=algorithm or MAML(inner_steps=STEPS, inner_lr=RATE),
        outer=OuterLoop(meta_batch_size=2, shard_size=2, meta_steps=1),
        engine=metadist.EngineSettings(compile="never", dtype=dtype),
        evaluate=metadist.EvaluateSettings(tasks=2, test_tasks=2),
        tracking="none",
    )
    return train(experiment, RunRequest(run_dir=str(folder / "run"), plots=False))


@pytest.fixture(scope="module")
def flat(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("flat"), shaped.Flat(), shaped.flat_net)


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("three"), shaped.Three(), shaped.three_net)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("tokens"), shaped.Tokens(), shaped.Reader)


@pytest.fixture(scope="module")
def prototypes(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("prototypes"), Blobs(), shaped.embedding, ProtoNet())


def by_autograd(result: Result, x, y, query, loss):
    """Adapt by ordinary autograd, one step of gradient descent after the other."""
    module = result.experiment.learner.model.module
    module.load_state_dict(result.experiment.learner.parameters(result.state))
    theta = {n: p.detach().clone().requires_grad_() for n, p in module.named_parameters()}
    for _ in range(STEPS):
        value = loss(torch.func.functional_call(module, theta, (x,)), y)
        gradients = torch.autograd.grad(value, list(theta.values()))
        theta = {n: (p - RATE * g).detach().requires_grad_() for (n, p), g in zip(theta.items(), gradients)}
    return torch.func.functional_call(module, theta, (query,)).detach()


def mse(prediction, target):
    return (prediction - target).square().mean()


X, QUERY = torch.linspace(-1, 1, 12).view(6, 2), torch.linspace(-2, 2, 8).view(4, 2)
WIDE, ASK = X.repeat(1, 2), QUERY.repeat(1, 2)
IDS, ASKED = torch.arange(30).view(6, 5) % 20, torch.arange(10).view(2, 5)
#: fixture, targets of another shape that would broadcast
BROADCASTING = [
    ("flat", torch.ones(6, 1), r"y has shape \[6, 1\]; with 6 rows of x it must be \[6\]"),
    ("three", torch.ones(6), r"must be \[6, 3\]"),
    ("three", torch.ones(6, 1), r"must be \[6, 3\]"),
    ("three", torch.ones(1, 3), r"must be \[6, 3\]"),
]


@pytest.fixture(scope="module")
def everywhere(tmp_path_factory):
    """``everywhere(result)``: functions (x, y, query) → prediction by name, one for each way to adapt."""
    made, stack = {}, ExitStack()

    def ways(result):
        if result.run_dir not in made:
            made[result.run_dir] = _ways(result, tmp_path_factory.mktemp("export") / "model.safetensors", stack)
        return made[result.run_dir]

    with stack:
        yield ways


def _ways(result: Result, path: Path, stack: ExitStack):
    result.export(path)
    pyfunc = _load_pyfunc(str(path))
    running = stack.enter_context(
        serving.serve(serving.build_service(serving.Serving((result.run_dir,))), Endpoint(), 0)
    )
    client = stack.enter_context(metadist.Client(running.address))

    def of(result):
        return lambda x, y, query: result.predict(result.adapt(x, y), query)

    def as_mlflow(x, y, query):
        arrays = {n: np.asarray(t) for n, t in (("support_x", x), ("support_y", y), ("query_x", query))}
        return torch.from_numpy(pyfunc.predict(arrays))

    def over_http(x, y, query):
        body = {"x": packed(x), "y": packed(y), "query": packed(query)}
        try:
            answer = urllib.request.urlopen(f"{running.http_address}/v1/adapt_predict", json.dumps(body).encode(), 60)
        except urllib.error.HTTPError as error:
            raise InvalidInput(f"{error.code}: {json.loads(error.read())['error']}") from None
        rows = json.loads(answer.read())["prediction"]
        return torch.tensor(json.loads(json.dumps(rows).replace("null", "-Infinity")), dtype=torch.float64)

    return {
        "train": of(result),
        "load": of(load_run(result.run_dir)),
        "run": open_model(result.run_dir).adapt_predict,
        "export": open_model(str(path)).adapt_predict,
        "mlflow": as_mlflow,
        "grpc": client.adapt_predict,
        "http": over_http,
    }


def packed(t):
    data = base64.b64encode(t.contiguous().numpy().tobytes()).decode()
    return {"shape": list(t.shape), "dtype": str(t.dtype).removeprefix("torch."), "data": data}


@pytest.mark.parametrize(
    ("name", "x", "y", "query", "loss"),
    [
        ("flat", X, torch.linspace(0, 1, 6), QUERY, mse),
        ("three", X, torch.linspace(0, 1, 18).view(6, 3), QUERY, mse),
        ("tokens", IDS, torch.arange(6) % 3, ASKED, nn.functional.cross_entropy),
    ],
)
def test_every_way_gives_the_answer_of_autograd(request, everywhere, name, x, y, query, loss):
    result = request.getfixturevalue(name)
    real = [t.double() if t.is_floating_point() else t for t in (x, y, query)]
    reference = by_autograd(result, *real, loss)
    ways = everywhere(result)
    for way, answer in ways.items():
        torch.testing.assert_close(answer(x, y, query), reference, rtol=1e-10, atol=1e-12, msg=way)


@pytest.mark.parametrize(("name", "y", "words"), BROADCASTING)
def test_targets_that_would_broadcast_are_refused_everywhere(request, everywhere, name, y, words):
    ways = everywhere(request.getfixturevalue(name))
    for answer in ways.values():
        with pytest.raises(MetadistError, match=words):
            answer(X, y, QUERY)


@pytest.mark.parametrize(
    ("x", "y", "query", "words"),
    [
        (X, torch.arange(6) % 3, ASK, r"x has shape \[6, 2\]; the model takes \[N, 4\]"),
        (WIDE, torch.arange(6) % 3 + 1, ASK, r"y holds class 3; expected 3 classes, 0 to 2.*y - 1"),
        (WIDE, torch.arange(6) % 3 - 1, ASK, "y holds class -1"),
        (WIDE, torch.arange(6) % 3 * 1.0, ASK, r"y holds floating-point numbers.*y.long\(\)"),
        (WIDE, torch.arange(6) > 3, ASK, "bool"),
        (WIDE, nn.functional.one_hot(torch.arange(6) % 3), ASK, r"must be \[6\]"),
        (WIDE * float("nan"), torch.arange(6) % 3, ASK, "x holds NaN or Inf"),
        (WIDE, torch.arange(5) % 3, ASK, r"must be \[6\]"),
        ((WIDE * 9).long(), torch.arange(6) % 3, ASK, r"x holds int64; expected floating-point"),
        (WIDE[:0], torch.arange(0), ASK, "rows"),
        (WIDE, torch.arange(6) % 3, ASK / 0, "holds NaN or Inf"),
        (WIDE, torch.arange(6) % 3, QUERY, r"has shape \[4, 2\]"),
    ],
)
def test_what_does_not_fit_is_refused_everywhere(prototypes, fixed_ways, everywhere, x, y, query, words):
    for result in (prototypes, fixed_ways):
        ways = everywhere(result)
        for answer in ways.values():
            with pytest.raises(MetadistError, match=words) as caught:
                answer(x, y, query)
            assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def fixed_ways(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("fixed"), Blobs(), shaped.wide_net)


def test_prototypes_take_more_classes_than_in_training(prototypes, fixed_ways, everywhere):
    """Eight classes after training with three: nearest class means, as scikit-learn finds them."""
    from sklearn.neighbors import NearestCentroid

    generator = torch.Generator().manual_seed(0)
    x, query = torch.randn(24, 4, generator=generator), torch.randn(30, 4, generator=generator)
    y = torch.arange(24) % 8
    module = prototypes.experiment.learner.model.module
    module.load_state_dict(prototypes.experiment.learner.parameters(prototypes.state))
    with torch.no_grad():
        embedded, asked = module(x.double()).numpy(), module(query.double()).numpy()
    reference = NearestCentroid().fit(embedded, y.numpy())
    distances = ((asked[:, None] - reference.centroids_) ** 2).sum(-1)
    ways = everywhere(prototypes)
    for answer in ways.values():
        logits = answer(x, y, query)
        assert logits.argmax(-1).tolist() == reference.predict(asked).tolist()
        np.testing.assert_allclose(logits.numpy(), -distances, rtol=1e-6, atol=1e-9)
        few = answer(x[y < 2], y[y < 2], query)  # fewer: the columns of training, as before
        assert few.shape == (30, 3) and bool(few[:, 2].isneginf().all())
        with pytest.raises(MetadistError, match="class 1000000; expected 3 classes, 0 to 2, or more if each"):
            answer(x, torch.where(y == 7, 1_000_000, y), query)
    ways = everywhere(fixed_ways)
    for answer in ways.values():
        with pytest.raises(MetadistError, match="class 7; expected 3 classes, 0 to 2"):
            answer(x, y, query)


def test_token_ids(tokens, everywhere):
    y = torch.arange(6) % 3
    ways = everywhere(tokens)
    for answer in ways.values():
        reference = answer(IDS, y, ASKED)
        assert torch.equal(answer(IDS.int(), y.int(), ASKED.to(torch.uint8)), reference)
        with pytest.raises(MetadistError, match=r"x holds floating-point numbers \(float32\); expected whole numbers"):
            answer(IDS.float(), y, ASKED)
        with pytest.raises(MetadistError, match="x holds a number that the model does not know.*out of range"):
            answer(IDS + 20, y, ASKED)


def test_token_ids_of_another_dtype_and_with_values(tmp_path):
    result = trained(tmp_path, shaped.ByteTokens(), shaped.ByteReader)
    assert result.signature.x[""].dtype == torch.uint8
    y = torch.arange(6) % 3
    assert torch.equal(
        result.predict(result.adapt(IDS, y), ASKED), result.predict(result.adapt(IDS.to(torch.uint8), y), ASKED)
    )
    with pytest.raises(InvalidInput, match="numbers that uint8 cannot hold"):
        result.adapt(IDS + 300, y)
    values = trained(tmp_path / "values", shaped.Values(), shaped.one_reader)
    target = torch.linspace(0, 1, 6).unsqueeze(1)
    reference = by_autograd(values, IDS, target.double(), ASKED, mse)
    torch.testing.assert_close(values.predict(values.adapt(IDS, target), ASKED), reference)


def test_adaptations_that_diverge_are_refused(flat):
    with pytest.raises(DivergedAdaptation, match="scaled as in training"):
        flat.adapt(X, torch.ones(6, dtype=torch.float64) * 1e300, inner_steps=9)
    with pytest.raises(ConfigError, match="inner_steps"):
        flat.adapt(X, torch.ones(6), inner_steps=-1)


# The record -----------------------------------------------------------------------------------------------------------


def test_the_signature_stands_in_checkpoint_and_export(three, tmp_path):
    from safetensors import safe_open

    expected = {
        "input": {"shape": [2], "dtype": "float64"},
        "target": {"shape": [3], "dtype": "float64"},
        "classes": None,
        "any_classes": False,
        "finite": True,
    }
    (manifest,) = Path(three.run_dir).glob("checkpoints/*/manifest.json")
    assert json.loads(manifest.read_text())["run"]["signature"] == expected
    three.export(tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["signature"]) == expected
    assert load_run(three.run_dir).recorded == three.signature == Signature.of_dict(expected)
    assert open_model(str(tmp_path / "model.safetensors")).describe()["outputs"] == 3


@pytest.mark.parametrize("damage", [[], {}, {"input": {}}, {"input": {"shape": [-1], "dtype": "os"}}, 5])
def test_a_damaged_signature_is_refused(damage):
    with pytest.raises(CheckpointError, match="damaged"):
        Signature.of_dict(damage)


def test_an_earlier_run_is_described_by_its_tasks(flat, three, tokens):
    for result in (flat, three, tokens):
        earlier = Result(*(getattr(result, n) for n in ("run_id", "run_dir", "experiment", "outcome")), [], "", {}, 0.0)
        assert earlier.recorded is None and earlier.signature == result.signature
    assert tiny_learner().describe_earlier(0).y[""].shape == (1,)


class NoData(Curves):
    def sample(self, keys, split):
        raise OSError("this machine has no such data")


def test_an_earlier_run_without_its_data_is_described_by_its_statements():
    from toys import learner

    assert learner(MAML(), network(2, 2), NoData()).describe_earlier(0).y[""].shape == (2,)


def test_sizes_that_vary(tmp_path):
    from toys import learner

    class Longer(shaped.Tokens):
        def sample(self, keys, split):
            task = super().sample(keys, split)
            return shaped.changed(task, x=lambda x: x.repeat(1, 1, 1 + (split != "train")))

    signature = learner(MAML(), shaped.Reader, Longer()).describe(0)
    assert signature.x[""].shape == (None,)
    assert signature.inputs("x", torch.zeros(3, 9, dtype=torch.int64)).shape == (3, 9)
    with pytest.raises(InvalidInput, match=r"the model takes \[N, any\]"):
        signature.inputs("x", torch.zeros(3, 9, 1, dtype=torch.int64))
    assert Signature.of_dict(json.loads(json.dumps(signature.as_dict()))) == signature


def test_tasks_with_missing_values_of_their_own():
    """A model that handles NaN keeps handling it after training."""
    from toys import learner

    class Missing(Curves):
        def sample(self, keys, split):
            return shaped.changed(super().sample(keys, split), x=lambda x: torch.where(x > 1, float("nan"), x))

    class Filled(nn.Sequential):
        def forward(self, x):
            return super().forward(torch.nan_to_num(x))

    own = learner(MAML(), lambda: Filled(nn.Linear(2, 2)), Missing())
    own.dry_run(0)
    signature = own.describe(0)
    assert not signature.finite and signature.inputs("x", X * float("nan")).isnan().all()


def test_a_few_shot_signature_has_the_tasks_dtype():
    task = Blobs().sample(TaskKey.of(0, "test", 0, [0]), "test")
    signature = Signature.of_tasks([task], 3, False)
    assert (signature.x[""].shape, signature.y[""].shape, signature.classes) == ((4,), (), 3)
    assert signature.ways(torch.tensor([0, 1])) == 3 and signature.prediction[""].shape == (3,)


# The command line -----------------------------------------------------------------------------------------------------


def predicted(*arguments):
    done = CliRunner().invoke(app, ["predict", *map(str, arguments), "--json"])
    return done.exit_code, last_json(done.stdout) if done.exit_code == 0 else done.stderr


def test_arrays_on_the_command_line(tokens, three, tmp_path):
    y, values = torch.arange(6) % 3, torch.linspace(0, 1, 18).view(6, 3)
    np.savez(tmp_path / "few.npz", x=IDS, y=y)
    np.savez(tmp_path / "many.npz", x=ASKED.repeat(600, 1), y=torch.zeros(1200, dtype=torch.int64))
    code, report = predicted(tokens.run_dir, "--support", tmp_path / "few.npz", "--query", tmp_path / "many.npz")
    reference = tokens.predict(tokens.adapt(IDS, y), ASKED).softmax(-1)
    assert code == 0 and [r["predicted"] for r in report["predictions"]] == reference.argmax(-1).tolist() * 600
    assert report["predictions"][0]["probability"] == round(float(reference[0].max()), 4)
    assert report["accuracy"] == float((reference.argmax(-1) == 0).double().mean())
    np.savez(tmp_path / "values.npz", x=X, y=values)
    code, report = predicted(three.run_dir, "--support", tmp_path / "values.npz", "--query", tmp_path / "values.npz")
    reference = three.predict(three.adapt(X, values), X)
    assert code == 0 and [r["predicted"] for r in report["predictions"]] == reference.tolist()
    assert report["mse"] == pytest.approx(float((reference - values).square().mean()))
    (tmp_path / "bad.npz").write_bytes(b"no arrays")
    np.savez(tmp_path / "bare.npz", x=X)
    np.savez(tmp_path / "float.npz", x=IDS.float(), y=y)
    for support, words in (
        ("bad.npz", "can't be read as arrays"),
        ("bare.npz", "has no array y"),
        ("nowhere.npz", "can't be read"),
        ("float.npz", "expected whole numbers"),
    ):
        code, error = predicted(tokens.run_dir, "--support", tmp_path / support, "--query", tmp_path / "many.npz")
        assert code == 2 and words in error and error.count("\n") == 1, error
