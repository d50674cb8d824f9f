"""The one decision about workers whose numerics differ: refused where the run is exact, else marked."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pulls
import pytest
import tiny
import torch
import toys

from metadist.algorithms import MAML, RL2, ProtoNet, Reptile
from metadist.config.groups import WorkerGroup
from metadist.core.engine import Engine
from metadist.core.errors import ConfigError, WorkerError
from metadist.experiment.fleet import WorkerReports, start_workers
from metadist.models import MLP, Conv4
from metadist.workers.fingerprint import fingerprint_id, numerics_fingerprint
from metadist.workers.numerics import Numerics
from metadist.workers.worker import Worker

LEARNER, ENVIRONMENT = WorkerGroup(), WorkerGroup(role="environment")
MINE = {"torch": "2", "threads": 1, "id": "a"}
OTHER = {"torch": "2", "threads": 2, "id": "b"}


def test_the_first_worker_of_a_role_decides_and_roles_may_differ():
    numerics = Numerics([LEARNER, ENVIRONMENT])
    assert numerics.refusal("learner-0", "here", "learner", MINE) is None
    assert numerics.refusal("environment-0", "here", "environment", OTHER) is None
    assert numerics.refusal("learner-1", "there", "learner", MINE) is None
    refusal = numerics.refusal("learner-2", "there", "learner", OTHER)
    assert refusal == (
        "worker learner-2 on there has other numerics than this run's learners (expected, found: {'threads': (1, 2)}); "
        "use machines of the same kind, or give exactness up with engine.exact: false"
    )


def test_where_exactness_is_given_up_a_difference_is_marked():
    marks = []
    numerics = Numerics([LEARNER], MINE, exact=False, mark=marks.append)
    assert numerics.refusal("learner-0", "there", "learner", OTHER) is None
    assert numerics.refusal("learner-1", "there", "learner", MINE) is None
    assert marks == ["learner on there: threads 2, not 1"]


def test_the_drivers_own_process_is_judged_for_every_role_that_it_serves():
    both = {**MINE, "environment": OTHER}
    marks = []
    assert Numerics([LEARNER]).refusal_of_process("here", ("learner", "environment"), MINE) is None
    assert Numerics([LEARNER], MINE).refusal_of_process("here", ("learner", "environment"), MINE) is None
    assert "this run's learners" in Numerics([LEARNER], MINE).refusal_of_process("here", ("learner",), OTHER)
    apart = Numerics([LEARNER, ENVIRONMENT], both)
    assert apart.refusal_of_process("here", ("learner",), MINE) is None
    assert "this run's environments" in apart.refusal_of_process("here", ("learner", "environment"), MINE)
    inexact = Numerics([LEARNER], both, exact=False, mark=marks.append)
    assert inexact.refusal_of_process("here", ("learner", "environment"), {**MINE, "torch": "3", "id": "c"}) is None
    assert marks == ["learner on here: torch 3, not 2", "environment on here: torch 3, not 2; threads 1, not 2"]


def test_a_new_run_in_this_process_names_no_environments():
    numerics = Numerics([LEARNER])
    numerics.refusal_of_process("here", ("learner", "environment"), MINE)
    assert numerics.expected == {"learner": MINE}


def test_the_runs_fingerprint_is_the_learners_and_names_other_environments():
    numerics = Numerics([LEARNER, ENVIRONMENT], {**MINE, "environment": OTHER})
    workers = {
        "environment-0": {"role": "environment", "fingerprint": OTHER},
        "learner-0": {"role": "learner", "fingerprint": MINE},
    }
    found = numerics.of_run(workers)
    assert list(found) == ["learner-0", "environment-0"]
    assert found["learner-0"]["fingerprint"] == {**MINE, "environment": OTHER}
    assert found["environment-0"]["fingerprint"] == OTHER


def test_impossible_groups():
    with pytest.raises(ConfigError, match="workers: there is no learner"):
        Numerics([ENVIRONMENT])
    with pytest.raises(WorkerError, match="continue with environment workers, or with engine.exact: false"):
        Numerics([LEARNER], {**MINE, "device": "A", "environment": {**OTHER, "device": "B"}})


def test_a_run_in_this_process_obeys_the_same_decision():
    run = tiny.experiment()
    with start_workers(run, "run") as scheduler:
        mine = scheduler.executor.workers()["local"]["fingerprint"]
    other = {**mine, "torch": "1.0.0", "id": "0123"}
    with start_workers(run, "run", expected=mine):
        pass
    match = r"worker local on .* has other numerics .*'torch': \('1.0.0'"
    with pytest.raises(WorkerError, match=match), start_workers(run, "run", expected=other):
        pass
    marks = []
    reports = WorkerReports(mark=marks.append)
    with start_workers(tiny.experiment("engine.exact=false"), "run", expected=other, reports=reports):
        pass
    assert all("not 1.0.0" in mark for mark in marks)
    assert [mark.partition(" on ")[0] for mark in marks] == ["learner", "environment"]


# Facts ----------------------------------------------------------------------------------------------------------------

CPU = torch.device("cpu")
MANIFEST = Path(__file__).parents[1] / "data/version_0_1/sinusoid/checkpoints/step-00000004/manifest.json"


def facts(**engine):
    return numerics_fingerprint(CPU, 1, torch.float32, Engine(**engine))


def test_fingerprints_of_version_0_1_stay_valid():
    stored = json.loads(MANIFEST.read_text())["run"]["fingerprint"]
    assert stored["id"] == fingerprint_id(stored)
    assert facts().keys() == stored.keys(), "nothing that is as it was then has a name"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MKL_CBWR", "COMPATIBLE"),
        ("ONEDNN_MAX_CPU_ISA", "AVX2"),
        ("DNNL_DEFAULT_FPMATH_MODE", "BF16"),
        ("OPENBLAS_CORETYPE", "Haswell"),
        ("CUBLAS_WORKSPACE_CONFIG", ":16:8"),
    ],
)
def test_settings_of_the_mathematical_libraries_are_facts(monkeypatch, name, value):
    before = facts()
    monkeypatch.setenv(name, value)
    after = facts()
    assert after["settings"] == f"{name}={value}" and after["id"] != before["id"]
    refusal = Numerics([LEARNER], before).refusal("w", "there", "learner", after)
    assert f"(expected, found: {{'settings': (None, '{name}={value}')}})" in refusal
    assert "'settings': (" in Numerics([LEARNER], after).refusal("w", "there", "learner", before), "and the other way"


def test_settings_of_this_process_are_facts():
    before = facts()
    torch.set_float32_matmul_precision("medium")
    try:
        assert facts()["settings"] == "float32_matmul_precision=medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    with torch.backends.mkldnn.flags(enabled=False):
        assert facts()["settings"] == "mkldnn=off"
    assert facts() == before


def test_what_every_worker_on_a_gpu_sets_and_settings_of_the_compiler_are_no_facts_of_an_eager_run(monkeypatch):
    before = facts()
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setenv("TORCHINDUCTOR_USE_FAST_MATH", "1")
    monkeypatch.setenv("MKL_CBWR", "")
    assert facts() == before


IMAGE = (1, 16, 16)


def few_shot(algorithm):
    return toys.learner(algorithm, lambda: MLP(hidden=(8,)).build((2,), 2), toys.Curves(), dtype=torch.float32)


@pytest.mark.parametrize(
    ("learner", "release"),
    [
        (few_shot(MAML()), None),
        (few_shot(MAML(inner_optimizer="adam")), None),
        (few_shot(Reptile(inner_optimizer="adam", moments="fresh")), None),
        (few_shot(Reptile(inner_optimizer="adam", moments="carried")), 2),
        (toys.learner(ProtoNet(), lambda: Conv4(filters=4).build(IMAGE, None), toys.Blobs(input_shape=IMAGE)), 2),
        (pulls.learner(), None),
        (pulls.learner(algorithm=RL2(gae_lambda=0.5, final_gae_lambda=1.0, gae_lambda_steps=3, minibatches=2)), 2),
    ],
    ids=["maml", "adam", "reptile-fresh", "reptile-carried", "protonet", "rl2", "rl2-schedule"],
)
def test_workers_state_the_release_of_algorithms_whose_bits_have_changed(learner, release):
    """A run of version 0.1 would otherwise go on with other bits without a word."""
    worker = Worker(learner, name="w", device="cpu", gpus=0.0, threads=1)
    for after in (worker.fingerprint, worker.configure(Engine(), 0)["fingerprint"]):
        assert after.get("release") == release
        before = {name: fact for name, fact in after.items() if name not in ("id", "release")}
        refusal = Numerics([LEARNER], {**before, "id": fingerprint_id(before)}).refusal("w", "there", "learner", after)
        assert refusal is None if release is None else "{'release': (None, 2)}" in refusal


def test_adam_has_other_bits_in_compiled_mixed_mode():
    adam = MAML(inner_optimizer="adam")
    assert adam.release(Engine(compile=True, differentiation="mixed")) == 2
    assert adam.release(Engine(compile=True)) == adam.release(Engine(differentiation="mixed")) == 1


@pytest.mark.lane("compile")  # asks the compiler for its version
def test_the_compiler_is_a_fact_where_shards_are_compiled(monkeypatch):
    assert "compiler" not in facts()
    monkeypatch.setenv("TORCHINDUCTOR_USE_FAST_MATH", "1")
    compiled = facts(compile=True)
    assert re.search(r"\d+\.\d+", compiled["compiler"]) and compiled["settings"] == "TORCHINDUCTOR_USE_FAST_MATH=1"


def test_another_compiler_is_refused_and_one_that_version_0_1_did_not_state_is_taken_over():
    def with_compiler(name):
        found = {**MINE, "compile": True} | ({"compiler": name} if name else {})
        return {**found, "id": fingerprint_id(found)}

    numerics = Numerics([LEARNER, ENVIRONMENT], {**with_compiler(None), "environment": OTHER})
    assert numerics.refusal("w", "there", "learner", with_compiler("g++ 12")) is None
    assert numerics.refusal("w", "there", "learner", with_compiler("g++ 12")) is None
    assert "'compiler': ('g++ 12', 'g++ 13')" in numerics.refusal("w", "there", "learner", with_compiler("g++ 13"))
    assert "environment" in numerics.expected["learner"], "what is known of the run stays"


@pytest.mark.lane("services")
def test_settings_under_which_libraries_compute_other_bits_have_another_id():
    """A matrix product by MKL in a process of its own: Intel's library gives other bits under MKL_CBWR=COMPATIBLE."""
    program = """
import hashlib, torch
from metadist.workers.fingerprint import numerics_fingerprint
torch.set_num_threads(1)
x = torch.randn(257, 511, generator=torch.Generator().manual_seed(0))
print(hashlib.sha256((x @ x.T).numpy().tobytes()).hexdigest())
print(numerics_fingerprint(torch.device("cpu"), 1, torch.float32)["id"])
"""

    def found(**settings):
        environment = {**os.environ, **settings}
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
        return done.stdout.split()

    (bits, id), (other_bits, other_id) = found(), found(MKL_CBWR="COMPATIBLE")
    assert other_id != id
    if torch.backends.mkl.is_available() and "Intel" in facts()["device"]:
        assert other_bits != bits
