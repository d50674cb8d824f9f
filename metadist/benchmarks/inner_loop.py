"""One shard's meta-gradient: this engine against what people use, after a proof that all compute the same one.

The floor is the loop's floating-point operations at the best rate of matrix products measured here: no way of doing the
same operations is quicker.
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

#: what was shipped (and published) for each family of tasks
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
#: tasks of the paper's Omniglot runs: meta-steps × meta-batch size
PAPER = 60_000 * 32
BLOCK = 5


@dataclass(frozen=True)
class Tolerance:
    """Relative error of the whole gradient against the plain loop in float64."""

    float32: float
    float64: float | None = None

    @classmethod
    def of(cls, module: nn.Module) -> Tolerance:
        """Batch norm over nearly blank patches divides by √ε and float32 loses digits, so float64 has to agree as well."""
        normalised = any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in module.modules())
        return cls(2e-2, 1e-8) if normalised else cls(1e-5)


class DisagreementError(MetadistError):
    """Contestants did not compute the same gradient, so their times can't be compared."""


def run(
    *,
    model: str = "mlp",
    task: str | None = None,
    inner_steps: list[int],
    against: str = "loop",
    n_way: int | None = None,
    k_shot: int | None = None,
    query_shots: int | None = None,
    tasks: int | None = None,
    inner_lr: float | None = None,
    threads: int = 1,
    device: str = "cpu",
    seconds: float = 30.0,
    compiled: bool = True,
) -> dict[str, Any]:
    """A case per number of inner steps; ``seconds`` of measurement each."""
    task = task or {"mlp": "sinusoid"}.get(model, "omniglot")
    one_of("--model", model, ("mlp", "conv4"))
    one_of("--task", task, DOCUMENTS)
    peers = known.chosen_peers(against)
    torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if "jax" in peers:
        limit_threads(threads)
    where = resolve_device(device, 1.0)
    entrants = {**known.OURS, **{name: known.PEERS[name] for name in peers}}
    if not compiled:
        entrants.pop("metadist compiled")
    shape = {"n_way": n_way, "k_shot": k_shot, "query_shots": query_shots}
    cases = {}
    for steps in inner_steps:
        document = document_of(model, task, steps, tasks, inner_lr, shape)
        title = f"{steps} inner step{'s' * (steps != 1)}"
        _say(f"{title}: do all compute the same gradient?")
        cases[title] = _case(document, entrants, where, seconds)
    given = document["tasks"]
    settings = {
        "model": model,
        "task": task,
        **{k: v for k, v in given.items() if k in shape},
        "inner_lr": document["algorithm"]["inner_lr"],
        "tasks": document["outer"]["shard_size"],
        "threads": threads,
        "device": str(where),
        "dtype": "float32",
    }
    return {"settings": settings, "cases": cases, "versions": known.versions(peers)}


def document_of(
    model: str, task: str, inner_steps: int, tasks: int | None, inner_lr: float | None, shape: Mapping[str, int | None]
) -> Document:
    """The shipped experiment, its shard one meta-batch, with what was asked for in place."""
    document = DOCUMENTS[task]()
    count = tasks or {"sinusoid": 25, "omniglot": 8, "images84": 4}[task]
    given = {k: v for k, v in shape.items() if v is not None}
    if task == "sinusoid" and given.pop("n_way", None) is not None:
        raise ConfigError("--n-way goes with classification; sinusoids have no classes")
    algorithm = {**document["algorithm"], "inner_steps": inner_steps}
    if inner_lr is None and task == "omniglot" and given.get("n_way", 5) > 5:
        inner_lr = 0.1  # the paper's for 20 ways
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
    """``offset`` seeds how far batch norm's biases are from their initial zeros."""
    config = build_config({**document, "engine": {"dtype": dtype}})
    learner = supervised(config.learner)
    learner.prepare(device)
    keys = TaskKey.of(config.seed, "train", 0, range(learner.outer.shard_size))
    algorithm: Any = config.algorithm
    return Problem(
        learner,
        _off_the_kinks(learner, learner.initial(config.seed), offset),
        learner.sample(keys),
        keys,
        algorithm.inner_lr,
        algorithm.inner_steps,
    )


def _off_the_kinks(learner: FewShotLearner, state: State, offset: int) -> State:
    """θ with batch norm's biases off their initial zeros. A channel that is constant over a batch has an output equal to its
    bias; at zero it stands on ReLU's kink, and one rounding error decides the gradient of all its positions: there float32
    gradients differ by up to a tenth while both are right.
    """
    biases = {
        f"{n}.bias"
        for n, layer in learner.model.module.named_modules()
        if isinstance(layer, nn.modules.batchnorm._BatchNorm)
    }
    theta, generator = state.theta(learner.slots)["model"], torch.Generator().manual_seed(offset)
    # In float32 whatever the dtype, so that θ is the same numbers.
    moved = {
        n: (t.float() + 0.1 * torch.randn(t.shape, generator=generator)).to(t.dtype)
        for n, t in theta.items()
        if n in biases
    }
    vector = learner.slots["model"].layout.flatten(theta.replace(moved))
    return replace(state, slots={**state.slots, "model": vector})


def steady(document: Document, device: torch.device, attempts: int = 16) -> tuple[Problem, Problem, Gradient]:
    """(in float64, in float32, the plain loop's gradient in float64), at a θ where rounding decides nothing: changes of its
    size leave the loop's gradient as it is. Elsewhere a blank patch is so near to a ReLU's kink that contestants which all
    are right differ. Judged by the loop alone; if no such θ is found, the last is taken, and the tolerance decides.
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
    errors: dict[str, dict[str, float]] = {name: {} for name in entrants}
    calls, first, second = {}, {}, {}
    for name, enter in entrants.items():
        # Compiling once more in float64 would take minutes; compiled graphs are held against the loop in float64 by the tests.
        if tolerance.float64 is not None and name not in ("loop", "metadist compiled"):
            errors[name]["float64"] = known.relative_error(_gradient(enter(exact)), reference)
        contestant = enter(problem)
        first[name], gradient = _timed(partial(_gradient, contestant))
        second[name], _ = _timed(contestant.call)
        errors[name]["float32"] = known.relative_error(gradient, reference)
        calls[name] = contestant.call
        _say(f"  {name:<18} " + ", ".join(f"{dtype} {error:.1e}" for dtype, error in errors[name].items()))
    _require_agreement(errors, tolerance)
    turn = BLOCK * sum(second.values())
    rounds = min(max(3, math.ceil(seconds / turn)), 200)
    _say(f"  timing {rounds} turns of {BLOCK} each, about {rounds * turn:.0f} s")
    times = interleaved(calls, rounds=rounds, block=BLOCK)

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
            compile_s=_short(max(0.0, first[name] - second[name]), 3),
            **{f"error_{d}": _short(e, 2) for d, e in errors[name].items()},
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
        **_utilisation(calls[ours], device),
    }


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
                    f"bench: '{name}' computed another gradient than the plain loop in float64: relative error {error:.1e} in {dtype}, "
                    f"allowed is {allowed:.0e}; nothing was timed"
                )


def _ahead(rates: dict[str, list[float]], ours: str) -> dict[str, Any]:
    """Our best one's rate as a multiple of each peer's, with the 95 % interval."""
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
    """Floating-point operations of the plain loop's matrix products and convolutions, all tasks."""
    with FlopCounterMode(display=False) as counter:
        known.loop(problem).call()
    return counter.get_total_flops()


def products_of(problem: Problem) -> set[tuple[int, int, int, int]]:
    """(tasks, m, k, n) of every layer's product and of its two gradients; a convolution as patches times kernel."""
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
    """Mean of NVIDIA's own reading while ``call`` runs over and over."""
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
