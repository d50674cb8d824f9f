"""What must hold on a GPU: the same mathematics as on the CPU, the same bits every time."""

from __future__ import annotations

import pytest
import torch

from metadist import config as configuration
from metadist.core.random import TaskKey
from metadist.experiment import Experiment, train
from metadist.runtime.worker import Worker

pytestmark = pytest.mark.gpu


def experiment(name: str, *overrides: str) -> Experiment:
    short = ["tracking.uri=none", "outer.meta_steps=6", "evaluate.every=3", "evaluate.tasks=8", "evaluate.test_tasks=8"]
    document = configuration.override(configuration.read_document(name), [*short, *overrides])
    return Experiment.of(configuration.build(configuration.set_workers(document, "0")))


def test_gradient_on_the_gpu_is_the_cpus() -> None:
    sums = {}
    for device in ("cpu", "cuda"):
        learner = experiment("sinusoid_maml", "engine.dtype=float64").learner
        worker = Worker(learner, name="w", device=device, gpus=1, threads=1)
        theta = {n: v.to(worker.device) for n, v in learner.initial(0).slots.items()}
        named = {n: learner.slots[n].layout.unflatten(v) for n, v in theta.items()}
        sums[device] = learner.contribute(named, TaskKey.of(0, "train", 0, range(8)), 0).slots["model"]
    assert torch.allclose(sums["cpu"], sums["cuda"], rtol=1e-10, atol=1e-12)


@pytest.mark.data
def test_conv4_repeats_bit_for_bit(tmp_path) -> None:
    hashes = {
        train(experiment("omniglot_maml_5w1s", "engine.device=cuda"), run_dir=str(tmp_path / str(i)), plots=False).params_sha256
        for i in range(2)
    }
    assert len(hashes) == 1


def test_workers_share_a_gpu(tmp_path) -> None:
    alone = train(experiment("sinusoid_maml", "engine.device=cuda"), run_dir=str(tmp_path / "alone"), plots=False)
    document = configuration.override(
        configuration.read_document("sinusoid_maml"),
        ["tracking.uri=none", "outer.meta_steps=6", "evaluate.every=3", "evaluate.tasks=8", "evaluate.test_tasks=8", "workers.0.gpus=0.5"],
    )
    shared = train(Experiment.of(configuration.build(document)), run_dir=str(tmp_path / "shared"), plots=False)
    assert shared.params_sha256 == alone.params_sha256
