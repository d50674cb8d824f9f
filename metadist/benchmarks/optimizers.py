"""Judge a learned optimiser against Adam and SGD with momentum, on the same tasks, networks and minibatches.

Every contestant trains the networks of the test tasks from the same initial parameters. The loss is that of the whole
support set. A contestant whose loss becomes NaN or Inf counts with its loss at the start.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.func import vmap

from metadist.algorithms.learned_optimizer import LearnedOptimizer, Memory
from metadist.config.build import build_foreign
from metadist.config.document import override
from metadist.config.schema import parse_document
from metadist.core.algorithm import Theta
from metadist.core.errors import ConfigError
from metadist.core.parameters import Parameters
from metadist.core.random import TaskKey
from metadist.core.task import Task, TaskFamily
from metadist.experiment.load import load_run
from metadist.learners.carried import CarriedLearner
from metadist.learners.particles import Contexts, stacked
from metadist.storage.run_directory import RunDirectory

ADAM = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
MOMENTUM = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
MARKS = (0, 1, 2, 5, 10, 20, 50, 100, 200, 300, 500, 700, 1000, 2000, 5000)
LEARNED = "learned"
EMPTY = Parameters({})


@dataclass(frozen=True, kw_only=True)
class HandMade(LearnedOptimizer):
    """Adam (Kingma & Ba 2015, ε outside the root) or SGD with momentum 0.9, whose memory holds the rate."""

    adam: bool = True

    def memory(self, parameters: Tensor) -> Memory:
        zeros = torch.zeros_like(parameters)
        return {"rate": parameters.new_zeros(()), "count": parameters.new_zeros(()), "first": zeros, "second": zeros}

    def update(
        self, weights: Parameters, parameters: Tensor, gradient: Tensor, memory: Memory, sizes: Sequence[int]
    ) -> tuple[Tensor, Memory]:
        count, rate = memory["count"] + 1, memory["rate"]
        if not self.adam:
            first = 0.9 * memory["first"] + gradient
            return parameters - rate * first, {**memory, "count": count, "first": first}
        first = 0.9 * memory["first"] + 0.1 * gradient
        second = 0.999 * memory["second"] + 0.001 * gradient.square()
        step = first / (1 - 0.9**count) / ((second / (1 - 0.999**count)).sqrt() + 1e-8)
        return parameters - rate * step, {**memory, "count": count, "first": first, "second": second}


@dataclass(frozen=True)
class _Group:
    """Consecutive test tasks whose networks have one shape."""

    contexts: Contexts
    keys: TaskKey
    tasks: Task

    def context(self, index: Tensor, task: Task) -> Any:
        key = TaskKey(self.keys.seed, self.keys.split, 0, index)
        return self.contexts.of(key, 0, 0, task)


def run(
    *, run_dir: str, overrides: Sequence[str] = (), tasks: int = 100, steps: int = 1000, threads: int = 1
) -> dict[str, Any]:
    """Train on the first ``tasks`` test tasks of the run, or of its config with ``overrides``, for ``steps`` steps."""
    torch.set_num_threads(threads)
    learner, learned, theta, seed = _loaded(run_dir, overrides)
    marks = [m for m in MARKS if m < steps] + [steps]
    found: dict[str, list[Mapping[str, Tensor]]] = {}
    for group in _groups(learner, theta, seed, tasks):
        for name, curves in _contestants(learned, theta, group, marks).items():
            found.setdefault(name, []).append(curves)
    whole = {name: {n: torch.cat([p[n] for p in parts]) for n in parts[0]} for name, parts in found.items()}
    settings = {"run": run_dir, "overrides": list(overrides), "tasks": tasks, "steps": steps, "seed": seed}
    return {"settings": settings, "cases": {f"loss after {steps} steps, {tasks} test tasks": _case(whole, marks)}}


def _loaded(run_dir: str, overrides: Sequence[str]) -> tuple[CarriedLearner, LearnedOptimizer, Theta, int]:
    text = RunDirectory(run_dir).read("config.yaml")
    if text is None:
        raise ConfigError(f"run directory '{run_dir}' has no config.yaml; is it the folder that train printed?")
    document = override(parse_document(text, f"{run_dir}/config.yaml"), overrides)
    experiment = build_foreign(document, f"run directory '{run_dir}'")
    learner = experiment.learner
    learned = experiment.algorithm.made
    if not isinstance(learner, CarriedLearner) or not isinstance(learned, LearnedOptimizer):
        raise ConfigError(f"bench optimizers: the run '{run_dir}' learned no optimiser; use metadist evaluate")
    result = load_run(run_dir, experiment)
    learner.prepare(torch.device("cpu"))
    return learner, learned, result.state.theta(learner.slots), experiment.evaluation_seed


def _groups(learner: CarriedLearner, theta: Theta, seed: int, tasks: int) -> list[_Group]:
    """Return the test tasks by the shape of their networks; their order in a group is that of their numbers."""
    numbers: dict[Any, list[int]] = {}
    for index in range(tasks):
        numbers.setdefault(learner.model.variant("test", index), []).append(index)
    found = []
    for model, chosen in numbers.items():
        keys = TaskKey.of(seed, "test", 0, chosen)
        contexts = Contexts(model, learner.tasks, theta, learner.device)
        found.append(_Group(contexts, keys, learner.sample(keys)))
    return found


def _contestants(
    learned: LearnedOptimizer, theta: Theta, group: _Group, marks: Sequence[int]
) -> dict[str, Mapping[str, Tensor]]:
    found = {LEARNED: _curves(learned, theta, group, marks, (0.0,))[0]}
    shared = {f.name: getattr(learned, f.name) for f in fields(LearnedOptimizer)}
    nothing = {**theta, "optimizer": EMPTY}
    for name, rates, adam in (("adam", ADAM, True), ("momentum", MOMENTUM, False)):
        for rate, curves in zip(rates, _curves(HandMade(**shared, adam=adam), nothing, group, marks, rates)):
            found[f"{name} {rate:g}"] = curves
    return found


@torch.no_grad()
def _curves(
    rule: LearnedOptimizer, theta: Theta, group: _Group, marks: Sequence[int], rates: Sequence[float]
) -> list[Mapping[str, Tensor]]:
    """Return for each rate the loss at the marks [T, marks], and loss and metric of the query set at the end [T]."""
    keys, family = group.keys, group.contexts.family
    each = [pytree.tree_map(lambda t, i=i: t[i], group.tasks) for i in range(len(keys.tasks))]
    starts = [rule.start(theta, group.contexts.starting(k, 0, t)) for k, t in zip(keys.each(), each)]
    one = stacked(starts)
    state = pytree.tree_map(lambda t: t.expand(len(rates), *t.shape).clone(), one)
    if "rate" in state["memory"]:
        like = state["memory"]["rate"]
        state["memory"]["rate"] = like.new_tensor(rates).unsqueeze(1).expand_as(like).clone()

    def over_all(function: Any) -> Any:
        """Map over the rates and, inside, over the tasks."""
        return vmap(vmap(function), (0, None, None))

    def loss(state: Any, task: Task, index: Tensor) -> Tensor:
        context = group.context(index, task)
        return context.loss(rule.predict(theta, state, task.support.x, context), task.support)

    losses = []
    for step in range(marks[-1] + 1):
        if step in marks:
            losses.append(over_all(loss)(state, group.tasks, keys.tasks))
        if step < marks[-1]:
            advance = over_all(lambda s, t, i, step=step: rule.step(theta, s, group.context(i, t), step))
            state = advance(state, group.tasks, keys.tasks)
    query = over_all(lambda s, t, i: _judged(rule, theta, family, group.context(i, t), s))
    query_loss, metric = query(state, group.tasks, keys.tasks)
    curves = torch.stack(losses, -1).double()
    curves = torch.where(torch.isfinite(curves), curves, curves[..., :1])
    return [
        {"loss": curves[r], "query_loss": query_loss[r].double(), "metric": metric[r].double()}
        for r in range(len(rates))
    ]


def _judged(
    rule: LearnedOptimizer, theta: Theta, family: TaskFamily, context: Any, state: Any
) -> tuple[Tensor, Tensor]:
    query = context.task.query
    prediction = context.possible(rule.predict(theta, state, query.x, context))
    return context.loss(prediction, query), query.mean(family.metric(prediction, query.y))


def _case(found: Mapping[str, Mapping[str, Tensor]], marks: Sequence[int]) -> dict[str, Any]:
    """Compare final losses: the best rate of each kind by the mean over the tasks, and by task."""
    final = {name: curves["loss"][:, -1] for name, curves in found.items()}
    rows: dict[str, dict[str, float]] = {}
    for name, curves in found.items():
        difference = final[LEARNED] - final[name]
        rows[name] = {
            "loss": float(final[name].mean()),
            "learned_minus_it": float(difference.mean()),
            "ci95": 1.96 * float(difference.std()) / len(difference) ** 0.5,
            "learned_wins": float((difference < 0).double().mean()),
            "query_loss": float(curves["query_loss"].mean()),
            "query_metric": float(curves["metric"].mean()),
        }
    best = {
        kind: min((name for name in final if name.startswith(kind)), key=lambda n: rows[n]["loss"])
        for kind in ("adam", "momentum")
    }
    oracle = torch.stack([loss for name, loss in final.items() if name.startswith("adam")]).amin(0)
    return {
        "unit": "mean loss of the support set",
        "contestants": rows,
        "best": best,
        "best_adam_rate_of_each_task": float(oracle.mean()),
        "curves": {name: dict(zip(map(str, marks), c["loss"].mean(0).tolist())) for name, c in found.items()},
    }
