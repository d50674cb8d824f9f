"""Compare one shard's meta-gradient by this engine with other libraries, after a proof that all compute the same.

The floor is the time of the loop's floating-point operations at the best measured rate of matrix products: no
implementation of the same operations is faster.
"""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from metadist.benchmarks.contestants import peers as known
from metadist.benchmarks.contestants.base import Contestant, Problem
from metadist.benchmarks.contestants.jax import limit_threads
from metadist.benchmarks.contestants.peers import Gradient
from metadist.benchmarks.timing import GemmRate, compare, gemm_rate, interleaved
from metadist.config.build import build as build_config
from metadist.config.document import read_document
from metadist.config.schema import Document
from metadist.core.errors import ConfigError, MetadistError, one_of
from metadist.core.random import TaskKey
from metadist.core.state import State
from metadist.learners import supervised
from metadist.learners.few_shot import FewShotLearner
from metadist.workers.worker import resolve_device

#: The shipped (and published) experiment of each family of tasks.
DOCUMENTS: dict[str, Callable[[], Document]] = {
    "sinusoid": lambda: read_document("sinusoid_maml"),
    "omniglot": lambda: read_document("omniglot_maml_5w1s"),
    "images84": lambda: {
        "name": "images84-maml-5w1s",
        "tasks": {"name": "metadist.benchmarks.random_images:RandomImages"},
        "model": {"name": "conv4", "filters": 32, "pooling": "max", "norm": "batch"},
        "algorithm": {"name": "maml", "inner_lr": 0.01},
    },
}
#: The number of tasks in the paper's Omniglot runs: meta-steps × meta-batch size.
PAPER = 60_000 * 32
BLOCK = 5


@dataclass(frozen=True)
class Tolerance:
    """The largest relative error of the whole gradient against the plain loop in float64."""

    float32: float
    float64: float | None = None

    @classmethod
    def of(cls, module: nn.Module) -> Tolerance:
        """Return the tolerance for a network.

        Batch norm over nearly constant patches divides by √ε, and float32 loses digits: then float64 must agree as
        well.
        """
        normalised = any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in module.modules())
        return cls(2e-2, 1e-8) if normalised else cls(1e-5)


class DisagreementError(MetadistError):
    """Contestants did not compute the same gradient, so their times can't be compared."""


@dataclass(frozen=True)
class InnerLoopOptions:
    """The options of ``bench inner-loop``; None means the value of the shipped config.

    ``inner_steps`` are the numbers of inner steps, a case each. ``against`` names the peers, separated by commas.
    ``tasks`` is the number of tasks per shard, ``seconds`` the time of measurement per case. ``compiled`` includes
    metadist's compiled engine.
    """

    inner_steps: list[int]
    model: str = "mlp"
    task: str | None = None
    against: str = "loop"
    n_way: int | None = None
    k_shot: int | None = None
    query_shots: int | None = None
    tasks: int | None = None
    inner_lr: float | None = None
    threads: int = 1
    device: str = "cpu"
    seconds: float = 30.0
    compiled: bool = True

    @property
    def shape(self) -> dict[str, int | None]:
        """The options that set the shape of a task."""
        return {"n_way": self.n_way, "k_shot": self.k_shot, "query_shots": self.query_shots}


def run(**given: Any) -> dict[str, Any]:
    """Measure a case per number of inner steps; the arguments are the fields of ``InnerLoopOptions``."""
    options = InnerLoopOptions(**given)
    task = options.task or {"mlp": "sinusoid"}.get(options.model, "omniglot")
    one_of("--model", options.model, ("mlp", "conv4"))
    one_of("--task", task, DOCUMENTS)
    peers = known.chosen_peers(options.against)
    torch.set_num_threads(options.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if "jax" in peers:
        limit_threads(options.threads)
    device = resolve_device(options.device, 1.0)
    entrants = {**known.OURS, **{name: known.PEERS[name] for name in peers}}
    if not options.compiled:
        entrants.pop("metadist compiled")
    cases = {}
    for steps in options.inner_steps:
        document = document_of(options.model, task, steps, options.tasks, options.inner_lr, options.shape)
        title = f"{steps} inner step{'s' * (steps != 1)}"
        _say(f"{title}: do all compute the same gradient?")
        cases[title] = _case(document, entrants, device, options.seconds)
    settings = {
        "model": options.model,
        "task": task,
        **{k: v for k, v in document["tasks"].items() if k in options.shape},
        "inner_lr": document["algorithm"]["inner_lr"],
        "tasks": document["outer"]["shard_size"],
        "threads": options.threads,
        "device": str(device),
        "dtype": "float32",
    }
    return {"settings": settings, "cases": cases, "versions": known.versions(peers)}


def document_of(
    model: str, task: str, inner_steps: int, tasks: int | None, inner_lr: float | None, shape: Mapping[str, int | None]
) -> Document:
    """Return the shipped experiment with the given options; its shard is one meta-batch."""
    document = DOCUMENTS[task]()
    count = tasks or {"sinusoid": 25, "omniglot": 8, "images84": 4}[task]
    given = {k: v for k, v in shape.items() if v is not None}
    if task == "sinusoid" and given.pop("n_way", None) is not None:
        raise ConfigError("--n-way is for classification; sinusoids have no classes, so leave it out")
    algorithm = {**document["algorithm"], "inner_steps": inner_steps}
    if inner_lr is None and task == "omniglot" and given.get("n_way", 5) > 5:
        inner_lr = 0.1  # the paper's value for 20 ways
    if inner_lr is not None:
        algorithm["inner_lr"] = inner_lr
    network = document["model"] if document["model"]["name"] == model else {"name": model}
    return {
        **document,
        "tasks": {**document["tasks"], **given},
        "model": network,
        "algorithm": algorithm,
        "outer": {**document.get("outer", {}), "meta_batch_size": count, "shard_size": count},
    }


def problem_of(document: Document, dtype: str, device: torch.device, offset: int = 0) -> Problem:
    """Return the problem of a document; ``offset`` seeds the shift of batch norm's biases from their initial zeros."""
    config = build_config({**document, "engine": {"dtype": dtype}})
    learner = supervised(config.learner)
    learner.prepare(device)
    keys = TaskKey.of(config.seed, "train", 0, range(learner.outer.shard_size))
    algorithm: Any = config.algorithm.made
    return Problem(
        learner,
        _off_the_kinks(learner, learner.initial(config.seed), offset),
        learner.sample(keys),
        keys,
        algorithm.inner_lr,
        algorithm.inner_steps,
    )


def _off_the_kinks(learner: FewShotLearner, state: State, offset: int) -> State:
    """Shift batch norm's biases from their initial zeros.

    The output of a channel that is constant over a batch equals its bias. With a bias of zero the output is on ReLU's
    kink, and one rounding error decides the gradient of all its positions: float32 gradients then differ by up to a
    tenth although both are right.
    """
    biases = {
        f"{n}.bias"
        for n, layer in learner.model.module.named_modules()
        if isinstance(layer, nn.modules.batchnorm._BatchNorm)
    }
    theta, generator = state.theta(learner.slots)["model"], torch.Generator().manual_seed(offset)
    # The shift is computed in float32 for every dtype, so that θ has the same values.
    moved = {
        n: (t.float() + 0.1 * torch.randn(t.shape, generator=generator)).to(t.dtype)
        for n, t in theta.items()
        if n in biases
    }
    vector = learner.slots["model"].layout.flatten(theta.replace(moved))
    return replace(state, slots={**state.slots, "model": vector})


def steady(document: Document, device: torch.device, attempts: int = 16) -> tuple[Problem, Problem, Gradient]:
    """Return the problem in float64, the problem in float32, and the plain loop's gradient in float64.

    θ is chosen such that changes of the size of rounding errors do not change the loop's gradient. At another θ, a
    constant patch may be so near to a ReLU's kink that the contestants differ although all are right. If no such θ is
    found, the last θ is used, and the tolerance decides.
    """
    for offset in range(attempts):
        exact, problem = (
            problem_of(document, "float64", device, offset),
            problem_of(document, "float32", device, offset),
        )
        reference = _gradient(known.loop(exact))
        if all(
            known.relative_error(_gradient(known.loop(p)), reference) < 1e-4
            for p in (problem, _shaken(exact, 1), _shaken(exact, 2))
        ):
            break
    return exact, problem, reference


def _shaken(problem: Problem, seed: int, size: float = 1e-7) -> Problem:
    generator = torch.Generator().manual_seed(seed)

    def shake(t: torch.Tensor) -> torch.Tensor:
        if not t.is_floating_point():
            return t
        return t + size * torch.randn(t.shape, generator=generator, dtype=t.dtype).to(t.device)

    slots = {n: vector * (1 + shake(torch.zeros_like(vector))) for n, vector in problem.state.slots.items()}
    return replace(problem, state=replace(problem.state, slots=slots), tasks=tree_map(shake, problem.tasks))


# One case -------------------------------------------------------------------------------------------------------------


def _case(
    document: Document, entrants: Mapping[str, Callable[[Problem], Contestant]], device: torch.device, seconds: float
) -> dict[str, Any]:
    exact, problem, reference = steady(document, device)
    tolerance = Tolerance.of(problem.module())
    entries = {}
    for name, enter in entrants.items():
        # A second compilation, in float64, takes minutes; the tests compare compiled graphs with the loop in float64.
        in_float64 = tolerance.float64 is not None and name not in ("loop", "metadist compiled")
        entries[name] = _enter(enter, problem, exact if in_float64 else None, reference)
        _say(f"  {name:<18} " + ", ".join(f"{dtype} {error:.1e}" for dtype, error in entries[name].errors.items()))
    _require_agreement({name: entry.errors for name, entry in entries.items()}, tolerance)
    turn = BLOCK * sum(entry.second for entry in entries.values())
    rounds = min(max(3, math.ceil(seconds / turn)), 200)
    _say(f"  timing {rounds} turns of {BLOCK} each, about {rounds * turn:.0f} s")
    times = interleaved({name: entry.call for name, entry in entries.items()}, rounds=rounds, block=BLOCK)

    count = len(problem.keys.tasks)
    rates = {name: [count / s for s in values] for name, values in times.items()}
    operations, peak = operations_of(problem), gemm_rate(products_of(problem), torch.float32, device)
    rows = compare(rates, "loop", block=BLOCK)
    for name, row in rows.items():
        milliseconds = 1e3 * count / row["median"]
        achieved = operations / milliseconds * 1e3
        row.update(
            ms=_short(milliseconds),
            gflops=_short(achieved / 1e9),
            peak_percent=_short(100 * achieved / peak.best),
            compile_s=_short(max(0.0, entries[name].first - entries[name].second), 3),
            **{f"error_{d}": _short(e, 2) for d, e in entries[name].errors.items()},
        )
    ours = max((name for name in rows if name in known.OURS), key=lambda name: rows[name]["median"])
    return {
        "unit": "tasks/s",
        "contestants": rows,
        "ahead": _ahead(rates, ours),
        "tolerance": {
            d: t for d, t in (("float32", tolerance.float32), ("float64", tolerance.float64)) if t is not None
        },
        "floor": _floor(operations, peak, rows[ours]["ms"]),
        **(
            {"paper": {"tasks": PAPER, "minutes": _short(PAPER / rows[ours]["median"] / 60)}}
            if document["tasks"]["name"] == "omniglot"
            else {}
        ),
        **_utilisation(entries[ours].call, device),
    }


@dataclass(frozen=True)
class _Entry:
    """A contestant's call, the seconds of its first and second call, and its relative errors by dtype."""

    call: Callable[[], Any]
    first: float
    second: float
    errors: dict[str, float]


def _enter(
    enter: Callable[[Problem], Contestant], problem: Problem, exact: Problem | None, reference: Gradient
) -> _Entry:
    """Compute a contestant's gradient, in float64 only where ``exact`` is given, and compare it with the reference."""
    errors = {}
    if exact is not None:
        errors["float64"] = known.relative_error(_gradient(enter(exact)), reference)
    contestant = enter(problem)
    first, gradient = _timed(partial(_gradient, contestant))
    second, _ = _timed(contestant.call)
    errors["float32"] = known.relative_error(gradient, reference)
    return _Entry(contestant.call, first, second, errors)


def _gradient(contestant: Contestant) -> Gradient:
    return {n: t.detach().cpu() for n, t in contestant.read(contestant.call()).items()}


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = call()
    return time.perf_counter() - began, result


def _require_agreement(errors: Mapping[str, Mapping[str, float]], tolerance: Tolerance) -> None:
    for name, by_dtype in errors.items():
        for dtype, error in by_dtype.items():
            allowed = getattr(tolerance, dtype)
            if not error <= allowed:
                raise DisagreementError(
                    f"bench: '{name}' computed another gradient than the plain loop in float64: relative error "
                    f"{error:.1e} in {dtype}, allowed is {allowed:.0e}; nothing was timed"
                )


def _ahead(rates: dict[str, list[float]], ours: str) -> dict[str, Any]:
    """Return the rate of metadist's fastest contestant as a multiple of each peer's, with the 95 % interval."""
    peers = [name for name in rates if name not in known.OURS]
    rows = {peer: compare({ours: rates[ours], peer: rates[peer]}, peer, block=BLOCK)[ours] for peer in peers}
    return {"of": ours, **{peer: {"ratio": row["ratio"], "ci95": row["ratio_ci95"]} for peer, row in rows.items()}}


def _floor(operations: int, peak: GemmRate, milliseconds: float) -> dict[str, Any]:
    return {
        "mflop": _short(operations / 1e6),
        "ms": _short(operations / peak.best * 1e3),
        "distance": _short(milliseconds * peak.best / operations / 1e3),
        "peak_gflops": _short(peak.best / 1e9),
        "at": peak.at,
        "ms_at_these_sizes": _short(operations / peak.occurring * 1e3),
    }


def operations_of(problem: Problem) -> int:
    """Return the floating-point operations of the plain loop's matrix products and convolutions, over all tasks."""
    with FlopCounterMode(display=False) as counter:
        known.loop(problem).call()
    return counter.get_total_flops()


def products_of(problem: Problem) -> set[tuple[int, int, int, int]]:
    """Return (tasks, m, k, n) of every layer's product and its two gradients; a convolution is patches times kernel."""
    products, count = set[tuple[int, int, int, int]](), len(problem.keys.tasks)

    def note(layer: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(layer, nn.Linear):
            rows, ins, outs = output.shape[0], layer.in_features, layer.out_features
        elif isinstance(layer, nn.Conv2d):
            rows, ins, outs = output.numel() // layer.out_channels, layer.weight[0].numel(), layer.out_channels
        else:
            return
        products.update({(count, rows, ins, outs), (count, rows, outs, ins), (count, ins, rows, outs)})

    module = problem.module()
    hooks = [layer.register_forward_hook(note) for layer in module.modules()]
    with torch.no_grad():
        module(problem.tasks.support.x[0])
    for hook in hooks:
        hook.remove()
    return products


def _utilisation(call: Callable[[], Any], device: torch.device, seconds: float = 3.0) -> dict[str, Any]:
    """Return NVIDIA's mean utilisation in percent while ``call`` repeats; nothing on a CPU."""
    if device.type != "cuda":
        return {}
    readings, done = list[float](), threading.Event()

    def read() -> None:
        with suppress(ModuleNotFoundError, RuntimeError):  # needs NVIDIA's management library
            while not done.wait(0.1):
                readings.append(float(torch.cuda.utilization(device)))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        call()
    done.set()
    reader.join()
    settled = readings[len(readings) // 3 :]
    return {"gpu_percent": _short(sum(settled) / len(settled)) if settled else "unknown: pip install nvidia-ml-py"}


def _short(value: float, digits: int = 4) -> float:
    return float(f"{value:.{digits}g}")


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
