"""Test functions of tensors as compiled graphs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import tiny
import torch
from toys import relative_error

import metadist.engine.compiled as compiled
from metadist.core.errors import ConfigError
from metadist.core.parameters import Parameters
from metadist.engine.compiled import Compiled, trace

pytestmark = pytest.mark.lane("compile")

HERE = Path(__file__).parent


def test_a_graph_per_name_static_part_and_shapes():
    seen = []

    @contextmanager
    def around(name):
        seen.append(name)
        yield

    engine = Compiled(torch.device("cpu"), around)

    def double(p, n):
        return {"p": p * 2 + n, "n": n}

    run = engine.runner(0)
    for n in (1, 5):  # a number is an input like any other
        got = run("double", double, Parameters({"a": torch.ones(3)}), n)
        assert got["p"]["a"].tolist() == [2.0 + n] * 3
        assert int(got["n"]) == n
    assert seen == ["double"]
    run("double", double, Parameters({"a": torch.ones(4)}), 1)
    engine.runner(1)("double", double, Parameters({"a": torch.ones(3)}), 1)
    assert seen == ["double"] * 3
    assert engine.seconds > 0


def test_too_many_shapes_are_named(monkeypatch):
    monkeypatch.setattr(compiled, "MAX_SIGNATURES", 2)
    run = Compiled(torch.device("cpu")).runner()
    for n in (1, 2):
        run("one", lambda t: t + 1, torch.ones(n))
    run("other", lambda t: t + 1, torch.ones(3))  # counted by name: mixed has many pieces
    with pytest.raises(ConfigError, match="more than 2 different shapes .* use engine.compile=never"):
        run("one", lambda t: t + 1, torch.ones(3))


def test_branches_on_values_can_t_be_traced():
    run = Compiled(torch.device("cpu")).runner()
    with pytest.raises(RuntimeError, match="data-dependent|branch"):
        run("f", torch.func.vmap(lambda t: t if t.sum() > 0 else -t), torch.ones(2, 3))


def test_the_hessian_behind_an_index():
    """Inductor writes in place into the expanded zeros of a tangent (pytorch#183986): a wrong result, and no error."""
    generator, order = torch.Generator().manual_seed(0), torch.tensor([2, 0, 3, 1, 1])
    p, t, x = (torch.randn(*s, dtype=torch.float64, generator=generator) for s in ((3, 4), (3, 4), (3, 6, 4)))

    def loss(p, x):
        return torch.tanh((x * p)[:, order]).square().sum()

    def product(p, t, x):
        return torch.func.vmap(lambda p, t, x: torch.func.jvp(lambda p: torch.func.grad(loss)(p, x), (p,), (t,))[1])(
            p, t, x
        )

    got = Compiled(torch.device("cpu")).runner()("product", product, p, t, x)
    assert relative_error(got, product(p, t, x)) < 1e-14


def test_a_graph_computes_the_function():
    def f(a, b):
        return {"sum": a + b, "both": [a, b * 2]}

    _, spec = torch.utils._pytree.tree_flatten((torch.ones(2), torch.ones(2)))
    graph, returned = trace(f, spec, [torch.ones(2), torch.ones(2)])
    results = torch.utils._pytree.tree_unflatten(list(graph(torch.ones(2), torch.full((2,), 3.0))), returned)
    assert results["sum"].tolist() == [4.0, 4.0] and results["both"][1].tolist() == [6.0, 6.0]


def test_a_run_begun_as_a_long_one_stays_compiled(tmp_path):
    """A long run is compiled; with fewer meta-steps than repay it, a resumed run still is, and has the same bits."""
    long, short = "outer.meta_steps=100000", "outer.meta_steps=9"
    stops = iter([False] * 4 + [True])
    options = {"plots": False, "test": False}
    begun = tiny.train(tiny.experiment(long), run_dir=str(tmp_path / "run"), stop=lambda: next(stops), **options)
    assert begun.outcome.stopped == "interrupted"
    ended = tiny.train(tiny.experiment(short), run_dir=str(tmp_path / "run"), resume=True, **options)
    whole = tiny.train(tiny.experiment(short, "engine.compile=always"), run_dir=str(tmp_path / "whole"), **options)
    assert ended.params_sha256 == whole.params_sha256


PROGRAM = """
import json, sys sys.path.insert(0, {tests!r}) import torch torch.set_num_threads(1) from toys import Curves, keys,
learner from metadist.algorithms import MAML from metadist.core.engine import Engine from metadist.core.outer import
OuterLoop from metadist.models import MLP s = learner(MAML(inner_lr=0.1, inner_steps=2), lambda:
MLP(hidden=(16,)).build((2,), 2), Curves(), dtype=torch.float32, outer=OuterLoop(shard_size=4)) theta, sums =
s.initial(0).theta(s.slots), dict() for way in ("unrolled", "mixed"): s.set_engine(Engine(compile=True,
differentiation=way)) sums[way] = s.contribute(theta, keys(0, 1, 2), 3).slots["model"].tolist() print(json.dumps(sums))
"""


@pytest.mark.long
def test_the_same_bits_in_every_process_with_a_cold_and_a_warm_cache(tmp_path):
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    outputs = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM.format(tests=str(HERE.parent))],
            capture_output=True,
            text=True,
            env=environment,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        outputs.append(json.loads(done.stdout.splitlines()[-1]))
    assert outputs[0] == outputs[1]
    assert any((tmp_path / "cache").iterdir())
