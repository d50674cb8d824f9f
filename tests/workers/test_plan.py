"""Which engine a run gets: every rule of ``auto``, and what is asked for and can't be had."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import tiny
import torch
from tiny import train
from toys import Blobs, Curves, Ragged, learner

from metadist.algorithms import MAML, MetaSGD, ProtoNet, Reptile
from metadist.config.engine import EngineSettings
from metadist.config.groups import WorkerGroup
from metadist.core.engine import Engine
from metadist.core.errors import ConfigError, WorkerError
from metadist.core.outer import OuterLoop
from metadist.engine import plan as plans
from metadist.engine.agreement import mixed_disagrees
from metadist.engine.compiled import Compiled
from metadist.engine.plan import Device
from metadist.learners import FewShotLearner
from metadist.models import MLP, Conv4
from metadist.workers.fingerprint import numerics_fingerprint
from metadist.workers.plan import device_facts, recorded_engine, sharing
from metadist.workers.worker import Worker

GIB = 2**30
LONG, SHORT = (OuterLoop(meta_batch_size=8, shard_size=8, meta_steps=n) for n in (10**6, 10))
CPU = Device("cpu", "a processor", 64 * GIB, None)


def subject(algorithm=MAML(inner_steps=3), outer=LONG, family=Curves(), factory=None, **options):
    build = factory or (lambda: MLP(hidden=(16,)).build(family.input_shape, algorithm.outputs(family)))
    return learner(algorithm, build, family, outer=outer, dtype=torch.float32, **options)


def plan(s=None, device=CPU, groups=(), **settings):
    return (s or subject()).plan(EngineSettings(**settings), device, sharing(device, groups))


# compile --------------------------------------------------------------------------------------------------------------


def test_a_long_run_is_compiled_and_a_short_one_is_not():
    assert plan().engine.compile
    assert "repay" in plan().reasons["compile"]
    short = plan(subject(outer=SHORT))
    assert not short.engine.compile
    assert "fewer than" in short.reasons["compile"]


def test_without_a_compiler(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    bare = device_facts(torch.device("cpu"), "a processor")
    assert bare.no_compiler == "no C++ compiler (g++ or clang++) is on its PATH"
    resolved = plan(device=bare)
    assert not resolved.engine.compile
    assert resolved.reasons["compile"] == f"not: {bare.no_compiler}"
    with pytest.raises(
        ConfigError, match=r"engine.compile: always, but on 'a processor' no C\+\+ compiler .* use never"
    ):
        plan(device=bare, compile="always")
    worker = Worker(subject(), name="w", device="cpu", gpus=0, threads=1)
    with pytest.raises(WorkerError, match=r"worker w can't comply with engine.compile: .* no C\+\+ compiler"):
        worker.configure(Engine(compile=True), 0)


def test_tasks_of_unequal_size_are_not_compiled():
    resolved = plan(subject(family=Ragged(Curves())))
    assert not resolved.engine.compile
    assert "differ in size" in resolved.reasons["compile"]


def test_as_asked_for():
    assert plan(subject(outer=SHORT), compile="always").engine.compile
    assert not plan(compile="never").engine.compile


# differentiation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("algorithm", "why"),
    [
        (MAML(inner_steps=1), "1 inner steps: nothing to save"),
        (MAML(inner_steps=9, first_order=True), "9 inner steps, first order: nothing to save"),
        (Reptile(inner_steps=9), "contributes a delta"),
        (MAML(inner_steps=3), "it fits in the"),
    ],
)
def test_unrolled_where_it_will_do(algorithm, why):
    resolved = plan(subject(algorithm), compile="never")
    assert resolved.engine.differentiation == "unrolled"
    assert why in resolved.reasons["differentiation"]


def test_protonet_has_no_inner_loop():
    s = subject(ProtoNet(), family=Blobs())
    assert "no inner loop stated by descent()" in plan(s, compile="never").reasons["differentiation"]
    with pytest.raises(
        ConfigError, match=r"engine.differentiation: mixed, but ProtoNet has no inner loop .* use unrolled or auto"
    ):
        plan(s, differentiation="mixed", compile="never")


def test_many_compiled_steps_are_mixed():
    resolved = plan(subject(MAML(inner_steps=plans.MAX_COMPILED_STEPS + 1)))
    assert resolved.engine.compile and resolved.engine.differentiation == "mixed"
    assert "takes minutes to compile" in resolved.reasons["differentiation"]


def with_memory(s, count, **settings):
    return plan(s, device=replace(CPU, memory_bytes=int(count / plans.USABLE) + 64), compile="never", **settings)


@pytest.mark.lane("numerics")
def test_less_memory_means_mixed_and_then_fewer_tasks_at_once():
    """From the predicted peaks: just enough, and a byte too little."""
    s = subject(MAML(inner_steps=20))
    memory = plan(s, compile="never").memory
    unrolled, mixed = memory.peak("unrolled", 8), memory.peak("mixed", 8)
    assert mixed < unrolled / 2
    assert with_memory(s, unrolled).engine == Engine()
    less = with_memory(s, unrolled - 1024)
    assert (less.engine.differentiation, less.engine.hessian, less.engine.chunk) == ("mixed", "reverse", None)
    assert "unrolled would take" in less.reasons["differentiation"]
    for budget, chunk in ((mixed - 1024, 4), (memory.peak("mixed", 4) - 1024, 2), (1024, 1)):
        tight = with_memory(s, budget)
        assert (tight.engine.differentiation, tight.engine.chunk) == ("mixed", chunk)
    assert "the smallest chunk still needs" in tight.reasons["chunk"]
    assert with_memory(s, unrolled - 1024, differentiation="unrolled").engine == Engine(chunk=4)
    assert with_memory(s, 1024, chunk=4).engine.chunk == 4


def test_memory_is_shared_by_the_workers_of_a_node():
    group = WorkerGroup(role="learner", min=4, max=4, cpus=1)
    assert sharing(replace(CPU, cores=8), [group]) == 4
    assert sharing(replace(CPU, cores=2), [group]) == 2
    assert sharing(Device("cuda", "a GPU", GIB, None), [replace(group, gpus=0.5)]) == 2
    assert sharing(CPU, []) == 1
    one, four = (plan(device=replace(CPU, cores=8), groups=g, compile="never").memory.budget for g in ((), (group,)))
    assert four == one // 4


# hessian --------------------------------------------------------------------------------------------------------------


class NoForward(torch.autograd.Function):
    """A user's operator: sine, twice differentiable, without a forward derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.sin()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0].cos()


class WrongForward(NoForward):
    """Its forward derivative has another sign, which nothing complains about."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def jvp(ctx, t):
        return -t * ctx.saved_tensors[0].cos()


def network(function):
    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = torch.nn.Linear(2, 8), torch.nn.Linear(8, 2)

        def forward(self, x):
            return self.second(function.apply(self.first(x)))

    return Network


def eagerly(self, name, function, spec, tensors):
    """In the place of ``Compiled._compile``: the function itself."""

    def flat(*tensors):
        return torch.utils._pytree.tree_leaves(function(*torch.utils._pytree.tree_unflatten(tensors, spec)))

    returned = function(*torch.utils._pytree.tree_unflatten(tensors, spec))
    return flat, torch.utils._pytree.tree_structure(returned)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=[pytest.mark.lane("compile"), pytest.mark.long])])
@pytest.mark.parametrize(("function", "why"), [(NoForward, "fails"), (WrongForward, "is off by")])
def test_reverse_over_reverse_where_the_forward_derivative_is_missing_or_wrong(function, why, compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(Compiled, "_compile", eagerly)
    s = subject(factory=network(function))
    resolved = plan(s, differentiation="mixed", compile="always")  # eagerly, reverse over reverse comes first anyhow
    assert resolved.engine.hessian == "reverse"
    assert resolved.reasons["hessian"].startswith(f"reverse over reverse, because forward over reverse {why}")
    assert mixed_disagrees(s, resolved.engine) is None


@dataclass(frozen=True)
class DrawnBack(MAML):
    """Every step ends nearer to where the loop began: a path of θ that ``descent`` doesn't state."""

    def step(self, descent, state, step):
        phi, moments = super().step(descent, state, step)
        return phi + (descent.phi - phi) * 0.1, moments


def test_a_step_of_one_s_own_is_unrolled():
    s = subject(DrawnBack(inner_steps=plans.MAX_COMPILED_STEPS + 1))
    with pytest.raises(
        ConfigError, match=r"mixed, but DrawnBack overrides step\(\), .* \(override update\(\)\); use unrolled or auto"
    ):
        plan(s, differentiation="mixed", compile="never")
    resolved = plan(s)
    assert resolved.engine.differentiation == "unrolled"
    assert "overrides step()" in resolved.reasons["differentiation"]


def test_where_no_way_back_is_right(monkeypatch):
    monkeypatch.setattr(plans, "mixed_disagrees", lambda *_: "is off by 1e+00 in slot model")
    s = subject(MAML(inner_steps=plans.MAX_COMPILED_STEPS + 1))
    with pytest.raises(
        ConfigError, match=r"engine.differentiation: mixed is wrong for this model and algorithm .*; use unrolled"
    ):
        plan(s, differentiation="mixed", compile="never")
    resolved = plan(s)
    assert resolved.engine.differentiation == "unrolled"
    assert "mixed is wrong" in resolved.reasons["differentiation"]


# What can't be had ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"precision": "tf32"}, "engine.precision: tf32 .*'a processor'. Use float32"),
        ({"chunk": 3}, "engine.chunk: 3 is not a power of two"),
        ({"chunk": 0}, "engine.chunk: 0 is not a power of two"),
        ({"dtype": "float64", "precision": "bfloat16"}, "engine.precision: bfloat16 .* engine.dtype: float64"),
        ({"deterministic": False}, "engine.deterministic: false needs engine.exact: false"),
        ({"wire": "bfloat16"}, "engine.wire: bfloat16 .* engine.exact: false"),
    ],
)
def test_impossible_wishes_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        plan(**settings)


# Resuming -------------------------------------------------------------------------------------------------------------


@pytest.mark.lane("numerics")
def test_a_resumed_run_keeps_its_engine(tmp_path, monkeypatch):
    """Nothing is planned again, and the parameters are those of the run that went through."""
    settings = (
        "engine.compile=never",
        "engine.differentiation=mixed",
        "algorithm.inner_steps=2",
        "evaluate.test_tasks=4",
    )
    whole = train(tiny.experiment(*settings), run_dir=str(tmp_path / "whole"), plots=False)
    asked = iter([False] * 3)
    half = train(tiny.experiment(*settings), run_dir=str(tmp_path / "run"), plots=False, stop=lambda: next(asked, True))
    assert half.params_sha256 != whole.params_sha256
    monkeypatch.setattr(FewShotLearner, "plan", lambda *_: pytest.fail("planned again"))
    resumed = train(tiny.experiment(*settings), run_dir=str(tmp_path / "run"), plots=False, resume=True)
    assert resumed.params_sha256 == whole.params_sha256


def test_a_manifest_s_engine_is_obeyed():
    recorded = {"compile": False, "differentiation": "mixed", "hessian": "reverse", "chunk": 2}
    assert recorded_engine(recorded)(CPU).engine == Engine(differentiation="mixed", hessian="reverse", chunk=2)
    assert recorded_engine({})(CPU).engine == Engine()


@pytest.mark.parametrize("recorded", [{"compiler": "xla"}, {"differentiation": "backwards"}, {"chunk": 3}])
def test_a_manifest_of_an_unknown_engine(recorded):
    with pytest.raises(ConfigError, match="manifest states an engine that this version doesn't know"):
        recorded_engine(recorded)


def test_learned_rates_and_images_walk_back_too():
    for s in (
        subject(MetaSGD(inner_steps=2)),
        subject(family=Blobs(input_shape=(1, 8, 8)), factory=lambda: Conv4(filters=4, blocks=2).build((1, 8, 8), 3)),
    ):
        assert plan(s, differentiation="mixed", compile="never").engine.hessian == "reverse"
        assert plan(s, differentiation="mixed", compile="always").engine.hessian == "forward"


def test_the_chunk_is_part_of_the_numerics():
    """Kernels may choose otherwise for other batches: conv4's bits differ between chunks."""
    ids = {
        numerics_fingerprint(torch.device("cpu"), 1, torch.float32, Engine(chunk=chunk))["id"] for chunk in (None, 2, 4)
    }
    assert len(ids) == 3
