"""What must hold on a GPU: the same mathematics as on the CPU, the same bits every time."""

from __future__ import annotations

import pytest
import torch
from tiny import train

from metadist.config.build import build
from metadist.config.document import override, read_document, set_workers
from metadist.config.experiment import Experiment
from metadist.core.engine import Engine
from metadist.core.random import TaskKey
from metadist.workers.worker import Worker

pytestmark = [pytest.mark.lane("compile"), pytest.mark.gpu]


def experiment(name: str, *overrides: str) -> Experiment:
    short = ["tracking.uri=none", "outer.meta_steps=6", "evaluate.every=3", "evaluate.tasks=8", "evaluate.test_tasks=8"]
    document = override(read_document(name), [*short, *overrides])
    return build(set_workers(document, "0"))


def contribution(name: str, device: str, engine: Engine, *overrides: str) -> torch.Tensor:
    learner = experiment(name, *overrides).learner
    worker = Worker(learner, name="w", device=device, gpus=1, threads=1)
    worker.configure(engine, 0)
    theta = {n: learner.slots[n].layout.unflatten(v.to(worker.device)) for n, v in learner.initial(0).slots.items()}
    return learner.contribute(theta, TaskKey.of(0, "train", 0, range(8)), 0).slots["model"]


ENGINES = [
    Engine(),
    Engine(differentiation="mixed"),
    Engine(differentiation="mixed", hessian="reverse"),
    Engine(chunk=2),
    Engine(compile=True),
    Engine(compile=True, differentiation="mixed", chunk=4),
]


@pytest.mark.parametrize("engine", ENGINES, ids=str)
def test_gradient_on_the_gpu_is_the_cpus(engine) -> None:
    shape = ("engine.dtype=float64", "algorithm.inner_steps=3", "outer.shard_size=8")
    expected, got = (
        contribution("sinusoid_maml", "cpu", Engine(), *shape),
        contribution("sinusoid_maml", "cuda", engine, *shape),
    )
    assert torch.allclose(expected, got, rtol=1e-10, atol=1e-12)


@pytest.mark.data
@pytest.mark.parametrize("engine", ENGINES, ids=str)
def test_conv4_on_the_gpu_is_the_cpus_and_repeats(engine) -> None:
    shape = ("engine.dtype=float64", "algorithm.inner_steps=2")
    expected = contribution("omniglot_maml_5w1s", "cpu", Engine(), *shape)
    once, again = (contribution("omniglot_maml_5w1s", "cuda", engine, *shape) for _ in range(2))
    assert once.equal(again)
    assert float((once - expected).norm() / expected.norm()) < 1e-8


@pytest.mark.data
def test_tf32_is_asked_for() -> None:
    """Products that round their inputs differ from those that don't, and only where that was asked for."""
    exact, explicit, rounded = (
        contribution("omniglot_maml_5w1s", "cuda", Engine(precision=p)) for p in ("float32", "float32", "tf32")
    )
    assert exact.equal(explicit) and not exact.equal(rounded)


@pytest.mark.data
def test_conv4_repeats_bit_for_bit(tmp_path) -> None:
    hashes = {
        train(
            experiment("omniglot_maml_5w1s", "engine.device=cuda"), run_dir=str(tmp_path / str(i)), plots=False
        ).params_sha256
        for i in range(2)
    }
    assert len(hashes) == 1


@pytest.mark.lane("ray")
def test_workers_share_a_gpu(tmp_path) -> None:
    alone = train(experiment("sinusoid_maml", "engine.device=cuda"), run_dir=str(tmp_path / "alone"), plots=False)
    document = override(
        read_document("sinusoid_maml"),
        [
            "tracking.uri=none",
            "outer.meta_steps=6",
            "evaluate.every=3",
            "evaluate.tasks=8",
            "evaluate.test_tasks=8",
            "workers.0.gpus=0.5",
        ],
    )
    shared = train(build(document), run_dir=str(tmp_path / "shared"), plots=False)
    assert shared.params_sha256 == alone.params_sha256
