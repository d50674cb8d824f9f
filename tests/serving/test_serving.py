"""Serve and predict from a run or an exported file, in Python and on the command line."""

from __future__ import annotations

import signal
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from tiny import train
from typer.testing import CliRunner

import metadist
import metadist.rpc.endpoint
import metadist.serving.load
from metadist.cli.app import app
from metadist.core.errors import CheckpointError, ConfigError
from metadist.experiment.load import load_run
from metadist.serving.load import Serving, build_service, open_model
from metadist.serving.prediction import ModelSource, predict_folders
from metadist.tasks.folders import by_class

pytestmark = pytest.mark.lane("services")

SHAPES = {"bar": (slice(2, 10), slice(5, 7)), "beam": (slice(5, 7), slice(2, 10)), "block": (slice(3, 9), slice(3, 9))}


def draw(folder: Path, count: int, seed: int, prefix: str = "") -> None:
    """Noisy dark shapes on light paper, a folder per class."""
    noise = np.random.default_rng(seed)
    for name, where in SHAPES.items():
        (folder / f"{prefix}{name}").mkdir(parents=True)
        for i in range(count):
            pixels = np.full((12, 12), 255.0)
            pixels[where] = 0
            Image.fromarray(np.clip(pixels + noise.normal(0, 20, pixels.shape), 0, 255).astype(np.uint8)).save(
                folder / f"{prefix}{name}" / f"{i}.png"
            )


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A prototypical network trained on the shapes."""
    home = tmp_path_factory.mktemp("images")
    draw(home / "few", 2, 1), draw(home / "many", 4, 2)
    for seed, part in enumerate(("train", "validation", "test"), 3):
        draw(home / "all" / part, 8, seed, f"{part}-")
    document = {
        "name": "shapes",
        "seed": 1,
        "evaluate": {"every": 10, "tasks": 4, "test_tasks": 4},
        "tasks": {
            "name": "image_folder",
            "path": str(home / "all"),
            "image_size": 12,
            "invert": True,
            "n_way": 3,
            "k_shot": 1,
            "query_shots": 2,
        },
        "model": {"name": "mlp", "hidden": [16]},
        "algorithm": {"name": "protonet"},
        "tracking": {"uri": "none"},
        "outer": {"lr": 0.01, "meta_batch_size": 4, "shard_size": 2, "meta_steps": 10},
        "workers": [{"min": 0, "max": 0}],
    }
    from metadist.config.build import build

    train(build(document), run_dir=str(home / "run"), plots=False)
    return home


@pytest.mark.parametrize("algorithm", ["maml", "meta_sgd", "reptile"])
def test_a_run_and_its_export_are_the_same_model(tmp_path, algorithm):
    more = ["algorithm.inner_optimizer=adam", "algorithm.moments=carried"] if algorithm == "reptile" else []
    result = train(
        tiny.experiment(f"algorithm.name={algorithm}", "outer.meta_steps=4", *more),
        run_dir=str(tmp_path / "run"),
        plots=False,
    )
    result.export(tmp_path / "model.safetensors")
    x, y = torch.linspace(-1, 1, 5).unsqueeze(1), torch.linspace(0, 1, 5).unsqueeze(1)
    reference = result.predict(result.adapt(x, y), x)
    assert not torch.equal(reference, torch.zeros_like(reference))
    for source in (str(tmp_path / "run"), f"other={tmp_path}/model.safetensors"):
        model = open_model(source)
        assert (model.params_sha256, model.source) == (result.state.sha256(), result.run_id)
        service = build_service(Serving((source,)))
        with (
            metadist.serving.load.serve(service, metadist.rpc.endpoint.Endpoint()) as running,
            metadist.Client(running.address) as client,
        ):
            assert torch.equal(client.adapt_predict(x, y, x), reference)
            assert client.models()[0]["name"] == ("other" if source.startswith("other") else "tiny")
    # An exported file also initialises another training.
    train(
        tiny.experiment(
            f"algorithm.name={algorithm}", "outer.meta_steps=1", f"init_from={tmp_path}/model.safetensors", *more
        ),
        plots=False,
        run_dir=str(tmp_path / "next"),
    )


def test_sources_that_cannot_be_served(tmp_path):
    with pytest.raises(ConfigError, match="no config.yaml"):
        open_model(str(tmp_path))
    with pytest.raises(CheckpointError, match="no file"):
        open_model(str(tmp_path / "x.safetensors"))
    from metadist.storage.checkpoints import export_parameters

    export_parameters(tmp_path / "bare.safetensors", {"a": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="export it again"):
        open_model(str(tmp_path / "bare.safetensors"))
    result = train(tiny.experiment("outer.meta_steps=1"), run_dir=str(tmp_path / "run"), plots=False)
    result.export(tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match="--device nothing"):
        open_model(str(tmp_path / "run"), device="nothing")
    with pytest.raises(ConfigError, match="did you mean 'inductive'"):
        open_model(str(tmp_path / "run"), normalization="inductiv")


def test_a_trial_run_is_refused(tmp_path):
    from metadist.config.build import build
    from metadist.config.document import override, read_document, set_workers

    document = override(
        read_document("bandit_rl2"),
        [
            "outer.meta_steps=1",
            "outer.meta_batch_size=4",
            "outer.shard_size=2",
            "evaluate.tasks=2",
            "evaluate.test_tasks=2",
            "tracking.uri=none",
            "environment.arms=2",
            "environment.episodes=2",
            "engine.compile=never",
            "algorithm.minibatches=1",
        ],
    )
    document = set_workers(document, "0")
    train(build(document), run_dir=str(tmp_path / "run"), plots=False, test=False)
    with pytest.raises(ConfigError, match="cannot be served: .* is a meta-environment"):
        open_model(str(tmp_path / "run"))


def test_folders_of_images(images):
    """Images are converted as in training: the run's own adapt and predict give the same numbers."""
    report = predict_folders(ModelSource(str(images / "run")), str(images / "few"), str(images / "many"))
    assert report["classes"] == sorted(SHAPES) and report["support"] == 6 and len(report["predictions"]) == 12
    assert report["accuracy"] == 1.0
    result = load_run(str(images / "run"))
    decode = result.experiment.learner.tasks.decode
    x, _, labels = by_class(decode, str(images / "few"))
    assert (
        x.dtype == np.float32 and x.shape == (6, 1, 12, 12) and x.max() > 0.9 and x[:, :, 0, 0].max() < 0.5
    )  # strokes are bright
    query, _, _ = by_class(decode, str(images / "many"))
    adapted = result.adapt(torch.from_numpy(x), torch.tensor([sorted(SHAPES).index(label) for label in labels]))
    best = torch.softmax(result.predict(adapted, torch.from_numpy(query)).double(), -1).max(-1).values
    assert [row["probability"] for row in report["predictions"]] == [round(float(p), 4) for p in best]


def test_folders_of_more_classes_than_in_training(images, tmp_path):
    """A prototypical network has no fixed number of classes."""
    draw(tmp_path / "few", 2, 1), draw(tmp_path / "few", 2, 5, "light-")
    report = predict_folders(ModelSource(str(images / "run")), str(tmp_path / "few"), str(tmp_path / "few"))
    assert report["classes"] == sorted(p.name for p in (tmp_path / "few").iterdir())
    assert len(report["classes"]) == 6 and len(report["predictions"]) == 12 and report["accuracy"] > 0.3


@pytest.mark.parametrize(
    ("support", "query", "words"),
    [
        ("nowhere", "many", "--support nowhere: no such folder"),
        ("few", "nowhere", "--query nowhere"),
        ("few/bar", "many", "in no class folder"),
        ("few", "empty", "there are no images"),
        ("one", "many", "1 classes"),
    ],
)
def test_folders_that_are_wrong(images, monkeypatch, support, query, words):
    monkeypatch.chdir(images)
    Path("empty").mkdir(exist_ok=True)
    if not Path("one").exists():
        Path("one/bar").mkdir(parents=True)
        Path("one/bar/0.png").write_bytes(Path("few/bar/0.png").read_bytes())
    with pytest.raises(metadist.MetadistError, match=words):
        predict_folders(ModelSource("run"), support, query)


@pytest.mark.lane("services")
def test_from_the_command_line(images, tmp_path):
    """Serve in a process of its own, predict with it, stop it: no traceback appears."""
    token = tmp_path / "token"
    token.write_text("t" * 40)
    token.chmod(0o600)
    server = tiny.start("serve", images / "run", "--port", 0, "--http-port", 0, "--token-file", token, folder=tmp_path)
    try:
        shown = {}
        while "HTTP" not in shown:
            line = server.stderr.readline()
            assert line, "the server ended"
            shown[line.split()[0]] = line.split()[1]
        arguments = [
            "predict",
            shown["gRPC"],
            "--support",
            str(images / "few"),
            "--query",
            str(images / "many"),
            "--json",
        ]
        done = CliRunner().invoke(app, [*arguments, "--token-file", str(token)])
        assert done.exit_code == 0, done.stderr
        assert tiny.last_json(done.stdout)["accuracy"] == 1.0 and "accuracy        1.0000" in done.stdout
        refused = CliRunner().invoke(app, arguments)
        assert refused.exit_code == 2 and "refused the token" in refused.stderr
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(shown["HTTP"], timeout=60)
    finally:
        server.send_signal(signal.SIGTERM)
        out, err = server.communicate(timeout=120)
    assert server.returncode == 0 and "stopped: adaptations 1" in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("serve", "nowhere"), "no config.yaml"),
        (("serve", "nowhere", "--host", "0.0.0.0"), "--tls-cert"),
        (("serve", "nowhere", "--token-file", "nothing"), "token-file nothing: can't be read"),
        (("serve", "nowhere", "--ray-serve", "--replicas", "4-2"), "--replicas 4-2"),
        (("serve", "nowhere", "--ray-serve", "--host", "0.0.0.0"), "--token-file"),
        (("predict", "127.0.0.1:1", "--support", ".", "--query", "."), "no server answers there"),
        (("predict", "nowhere", "--support", ".", "--query", "."), "no config.yaml"),
    ],
)
def test_mistakes_are_one_line(arguments, words):
    done = CliRunner().invoke(app, list(arguments))
    assert done.exit_code == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert words in done.stderr
