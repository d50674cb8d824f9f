"""The Learner: a pure function (state, which tasks) → contribution, and the rounds of a meta-step."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from metadist.core.algorithm import Algorithm, TaskContext
from metadist.core.errors import ConfigError, MetadistError, NonFiniteError, one_of
from metadist.core.executor import Result, Round, Shard
from metadist.core.model import BoundModel, Model
from metadist.core.outer import OuterLoop
from metadist.core.parameters import Layout, Parameters
from metadist.core.random import TaskKey
from metadist.core.state import Contribution, Records, Slot, State
from metadist.core.task import Examples, Task, TaskFamily

log = logging.getLogger(__name__)

BUFFERS = "buffers."


@dataclass
class Learner:
    """One experiment's mathematics: algorithm, model, tasks and outer loop. Knows nothing of workers or files.

    ``normalization`` is how batch norm treats the query set in evaluation: ``transductive`` (by the query set's own
    statistics) or ``inductive`` (each query in one batch with the support set). ``non_finite`` says what becomes of a task
    whose contribution has NaN or Inf: ``error``, or ``skip`` (it is left out of the sum and of the weight).
    """

    algorithm: Algorithm
    model: Model
    tasks: TaskFamily
    outer: OuterLoop
    normalization: str = "transductive"
    non_finite: str = "error"

    def __post_init__(self) -> None:
        one_of("evaluate.normalization", self.normalization, ("transductive", "inductive"))
        one_of("engine.non_finite", self.non_finite, ("error", "skip"))
        if self.tasks.metric_name in ("loss", "task"):
            raise ConfigError(f"metric: '{self.tasks.metric_name}' is taken; give it another name")
        reason = self.algorithm.compatible(self.tasks, self.model)
        if reason:
            raise ConfigError(
                f"algorithm '{type(self.algorithm).__name__}' does not suit tasks '{type(self.tasks).__name__}' with model "
                f"'{type(self.model.module).__name__}': {reason}"
            )
        self.slots = {name: slot for name, (slot, _) in self._declare(0).items()}
        self.device = torch.device("cpu")
        self._prepared = False

    def _declare(self, seed: int) -> dict[str, tuple[Slot, Parameters]]:
        learned, frozen, buffers = self.model.initial(seed)
        declared = {"model": (Slot(Layout.of(learned)), learned)}
        declared.update(self.algorithm.slots(self.model, learned))
        if frozen:
            declared["frozen"] = (Slot(Layout.of(frozen), "constant"), frozen)
        for dtype in sorted({b.dtype for b in buffers.values()}, key=str):
            group = Parameters({n: b for n, b in buffers.items() if b.dtype == dtype})
            declared[BUFFERS + str(dtype).removeprefix("torch.")] = (Slot(Layout.of(group), "constant"), group)
        return declared

    def initial(self, seed: int, start_from: Mapping[str, Tensor] | None = None) -> State:
        """The state before meta-step 0; ``start_from`` replaces initial model parameters by name."""
        declared = self._declare(seed)
        if start_from is not None:
            self._start_from(declared, start_from)
        values = {name: slot.layout.flatten(initial) for name, (slot, initial) in declared.items()}
        return State(values, self.outer.initial(self.slots, values))

    def _start_from(self, declared: dict[str, tuple[Slot, Parameters]], given: Mapping[str, Tensor]) -> None:
        known: set[str] = set()
        for slot_name in [n for n in declared if n in ("model", "frozen") or n.startswith(BUFFERS)]:
            slot, initial = declared[slot_name]
            known |= set(initial)
            for name in set(initial) & set(given):
                if initial[name].shape != given[name].shape:
                    raise ConfigError(
                        f"init_from: '{name}' has shape {list(given[name].shape)}, this model's has {list(initial[name].shape)}"
                    )
            chosen = {n: given[n].to(initial[n].dtype) for n in initial if n in given}
            declared[slot_name] = (slot, initial.replace(chosen))
        if not known & set(given):
            raise ConfigError(f"init_from: none of its parameters ({', '.join(sorted(given)[:4])}, …) is one of this model's")
        if known - set(given):
            log.warning("init_from has no %s; they start anew", ", ".join(sorted(known - set(given))))
        if set(given) - known:
            log.warning("init_from: %s are not parameters of this model and are left out", ", ".join(sorted(set(given) - known)))

    def parameters(self, state: State) -> dict[str, Tensor]:
        """The model's parameters and buffers under their own names, for export and for prediction."""
        theta = state.theta(self.slots)
        return {n: t for slot in theta if slot in ("model", "frozen") or slot.startswith(BUFFERS) for n, t in theta[slot].items()}

    # Where it runs ----------------------------------------------------------------------------------------------------

    def prepare(self, device: torch.device) -> None:
        """Load the tasks' data and move the model to ``device``; once in every process that computes."""
        if not self._prepared or device != self.device:
            self.tasks.prepare(device)
            self.model.to(device)
            self.device, self._prepared = device, True

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prepared": False}

    def check(self, seed: int) -> None:
        """Adapt to one task and compare the prediction's shape with the targets'; see that every learned parameter takes
        part; before anything long starts."""
        state = self.initial(seed)
        for split in ("train", "validation"):
            # As many as in a shard: one task alone is never padded.
            keys = TaskKey.of(seed, split, 0, range(min(self.outer.shard_size, self.outer.meta_batch_size)))
            try:
                task = self.sample(keys)
            except MetadistError:
                raise
            except Exception as error:  # the user's own code
                last = traceback.extract_tb(error.__traceback__)[-1]
                name = type(self.tasks).__name__
                raise ConfigError(f"tasks: '{name}' can't sample {split} tasks: {_first_line(error)} ({last.filename}:{last.lineno})") from error
            one = torch.utils._pytree.tree_map(lambda t: t[0], task)
            try:
                self._check_output(state, one, split)
                if split == "train":
                    self._check_participation(state, one)
            except (RuntimeError, ValueError, TypeError, IndexError) as error:
                raise ConfigError(
                    f"model: '{type(self.model.module).__name__}' fails on {split} tasks with inputs {list(one.support.x.shape)} and "
                    f"targets {list(one.support.y.shape)}: {_first_line(error)}"
                ) from error

    def _check_participation(self, state: State, task: Task) -> None:
        """A missing gradient is an error. Ordinary autograd tells None from zero; torch.func does not."""
        if hasattr(self.algorithm, "delta"):
            return
        theta = {slot: p.map(torch.clone) for slot, p in state.theta(self.slots).items()}
        learned = {(s, n): t.requires_grad_() for s, p in theta.items() if self.slots[s].rule == "gradient" for n, t in p.items()}
        key = TaskKey.of(0, "train", 0, [0]).each()[0].to(self.device)
        loss, _ = self.algorithm.objective(self._bind(theta, key, True), theta, task, TaskContext(key, 0, True, self.tasks))
        found = torch.autograd.grad(loss, list(learned.values()), allow_unused=True) if loss.requires_grad else [None] * len(learned)
        missing = [name if slot == "model" else f"{slot}/{name}" for (slot, name), g in zip(learned, found) if g is None]
        if missing:
            raise ConfigError(
                f"model: the loss does not depend on {', '.join(missing)} (a missing gradient); remove them, name them in "
                "model.freeze, or look for a detach or no_grad on their way"
            )

    def _check_output(self, state: State, task: Task, split: str) -> None:
        needed = self.algorithm.outputs(self.tasks)
        theta = state.theta(self.slots)
        bound = self._bind(theta, None, False)
        classes = self.tasks.kind == "classification"
        ways = self.tasks.ways(split)
        if needed is not None and classes and ways != needed:
            raise ConfigError(
                f"tasks: {split} tasks have {ways} ways and the model {needed} outputs; algorithm "
                f"'{type(self.algorithm).__name__}' needs them equal (only metric methods can train with more ways)"
            )
        context = TaskContext(TaskKey.of(0, split, 0, [0]).each()[0].to(self.device), 0, False, self.tasks)
        with torch.no_grad():
            if needed is not None and classes:
                output = tuple(bound(theta["model"], task.query.x).shape)
                if output != (task.query.x.shape[0], needed):
                    raise ConfigError(
                        f"model: '{type(self.model.module).__name__}' puts out shape {list(output)} for {task.query.x.shape[0]} "
                        f"inputs; tasks.n_way = {needed} needs [{task.query.x.shape[0]}, {needed}]"
                    )
            phi = _at_most_one_step(self.algorithm).adapt(bound, theta, task.support, context)[-1]
            prediction = self.algorithm.predict(bound, phi, task.query.x)
        shape = tuple(prediction.shape)
        expected = (task.query.x.shape[0], ways) if classes else tuple(task.query.y.shape)
        if shape != expected:
            raise ConfigError(
                f"model: '{type(self.model.module).__name__}' predicts shape {list(shape)} where the {split} tasks need {list(expected)}"
            )
        context.loss(prediction, task.query), context.metric(prediction, task.query)

    # What a shard is --------------------------------------------------------------------------------------------------

    def shards(self, run: str, meta_step: int, seed: int, *, function: str, split: str, tasks: int, **settings: Any) -> list[Shard]:
        size = self.outer.shard_size
        key_step = meta_step if split == "train" else 0
        return [
            Shard(
                run, meta_step, 0, index, function, start, min(size, tasks - start), seed, split, key_step,
                settings=tuple(sorted(settings.items())),
            )
            for index, start in enumerate(range(0, tasks, size))
        ]  # fmt: skip

    def rounds(self, run: str, meta_step: int, seed: int, state: State, report: dict[str, float]) -> Iterator[Round]:
        """The rounds of one meta-step: for supervised learning a single one. ``report`` receives metrics as they are known."""
        shards = self.shards(run, meta_step, seed, function="gradient", split="train", tasks=self.outer.meta_batch_size)

        def apply(state: State, total: Contribution) -> State:
            new, extra = self.outer.update(self.slots, state, total, meta_step)
            report.update({n: v / total.weight for n, v in total.metrics.items()}, **extra)
            return new

        yield Round(0, state, shards, apply)

    def evaluation(self, run: str, meta_step: int, seed: int, state: State, *, split: str, tasks: int, inner_steps: int | None) -> Round:
        """A round that judges θ on ``tasks`` tasks of ``split``; its records are one row per task."""
        shards = self.shards(run, meta_step, seed, function="evaluate", split=split, tasks=tasks, inner_steps=inner_steps)
        return Round(0, state, shards, lambda state, _: state, reduce=False)

    def sample(self, keys: TaskKey) -> Task:
        """The shard's tasks, on the learner's device; keys stay on the CPU."""
        task = self.tasks.sample(keys, keys.split).to(self.device, self.model.dtype)
        if self.model.normalises_over_batch and (task.support.mask is not None or task.query.mask is not None):
            raise ConfigError(
                "model: batch normalisation over padded rows would mix padding into the statistics; these tasks differ in "
                "size, so use norm: group or layer (or a task family whose tasks are of one size)"
            )
        return Task(task.support.cleared(), task.query.cleared())

    def compute(self, shard: Shard, theta: Mapping[str, Tensor]) -> Result:
        """What a worker does: slot vectors and a shard in, its result out. A pure function."""
        keys = TaskKey.of(shard.seed, shard.split, shard.key_step, range(shard.start, shard.start + shard.count))
        named = {name: self.slots[name].layout.unflatten(vector) for name, vector in theta.items()}
        if shard.function == "gradient":
            return self.contribute(named, keys, shard.meta_step)
        if shard.function == "evaluate":
            return self.evaluate(named, keys, shard.meta_step, **dict(shard.settings))
        raise ValueError(f"unknown function '{shard.function}'; expected gradient or evaluate")

    # The mathematics --------------------------------------------------------------------------------------------------

    def _bind(self, theta: Mapping[str, Parameters], key: TaskKey | None, training: bool) -> BoundModel:
        fixed = {n: t for slot in theta if slot == "frozen" or slot.startswith(BUFFERS) for n, t in theta[slot].items()}
        return self.model.bind(fixed, key, training)

    def _vmap(self, single: Any, tasks: Task, keys: TaskKey) -> Any:
        try:
            return torch.func.vmap(single)(tasks, keys.tasks.to(self.device))
        except RuntimeError as error:
            if "randomness" in str(error):
                raise ConfigError(
                    f"model: '{type(self.model.module).__name__}' draws random numbers that are not keyed by the task; "
                    "use torch.nn.Dropout (keyed by us), or draw from context.key in the algorithm"
                ) from error
            raise

    def contribute(self, theta: Mapping[str, Parameters], keys: TaskKey, meta_step: int) -> Contribution:
        """Σ over the shard's tasks of each one's gradient (or delta), with loss and metric on the query set.

        vmap of the *per-task* gradient: differentiating through a vmapped loss is wrong for batch norm's second order.
        """
        trainable = {n: p for n, p in theta.items() if self.slots[n].rule == "gradient"}

        def single(task: Task, index: Tensor) -> tuple[dict[str, Parameters], dict[str, Tensor]]:
            key = replace(keys, tasks=index)
            context = TaskContext(key, meta_step, True, self.tasks)
            model = self._bind(theta, key, True)
            delta = getattr(self.algorithm, "delta", None)
            if delta is not None:
                phi = self.algorithm.adapt(model, theta, task.support, context)[-1]
                prediction = self.algorithm.predict(model, phi, task.query.x)
                return delta(theta, phi), {"loss": context.loss(prediction, task.query), **self._metric(context, prediction, task)}

            def objective(learned: dict[str, Parameters]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
                loss, prediction = self.algorithm.objective(model, {**theta, **learned}, task, context)
                return loss, (loss.detach(), prediction.detach())

            gradient, (loss, prediction) = torch.func.grad(objective, has_aux=True)(trainable)
            return gradient, {"loss": loss, **self._metric(context, prediction, task)}

        values, metrics = self._vmap(single, self.sample(keys), keys)
        total = self._sum(values, metrics, None)
        if total.is_finite():
            return total
        finite = self._finite_tasks(values)
        bad = tuple(int(i) for i in keys.tasks[~finite])
        if self.non_finite == "skip" and bad:
            return self._sum(values, metrics, finite)
        what = f"tasks {list(bad)} gave NaN or Inf" if bad else f"the sum over tasks {keys.tasks.tolist()} overflows"
        raise NonFiniteError(f"{what} (seed {keys.seed}, meta-step {meta_step})", bad)

    def _metric(self, context: TaskContext, prediction: Tensor, task: Task) -> dict[str, Tensor]:
        return {self.tasks.metric_name: context.metric(prediction, task.query)}

    @staticmethod
    def _finite_tasks(values: Mapping[str, Parameters]) -> Tensor:
        tensors = [t for p in values.values() for t in p.values()]
        return torch.stack([torch.isfinite(t).reshape(len(t), -1).all(1) for t in tensors]).all(0).cpu()

    def _sum(self, values: Mapping[str, Parameters], metrics: Mapping[str, Tensor], keep: Tensor | None) -> Contribution:
        """Σ over the leading dimension; only over the tasks in ``keep`` where given."""

        def total(t: Tensor) -> Tensor:
            return t.sum(0) if keep is None else t[keep.to(t.device)].sum(0)

        count = len(next(iter(metrics.values()))) if keep is None else int(keep.sum())
        slots = {n: self.slots[n].layout.flatten(p.map(total)).cpu() for n, p in values.items()}
        return Contribution(slots, float(count), count, {n: float(total(v.double())) for n, v in metrics.items()})

    def evaluate(self, theta: Mapping[str, Parameters], keys: TaskKey, meta_step: int, inner_steps: int | None = None) -> Records:
        """Loss and metric of every task after 0, 1, …, k adaptation steps: columns [T, k+1] in float64, and the index [T]."""
        algorithm = with_inner_steps(self.algorithm, inner_steps)

        def single(task: Task, index: Tensor) -> tuple[Tensor, Tensor]:
            key = replace(keys, tasks=index)
            context = TaskContext(key, meta_step, False, self.tasks)
            model = self._bind(theta, key, False)
            losses, metrics = [], []
            for phi in algorithm.adapt(model, theta, task.support, context):
                prediction = self._judge(algorithm, model, phi, task.support.x, task.query.x)
                losses.append(context.loss(prediction, task.query))
                metrics.append(context.metric(prediction, task.query))
            return torch.stack(losses), torch.stack(metrics)

        with torch.no_grad():
            losses, metrics = self._vmap(single, self.sample(keys), keys)
        return Records({"task": keys.tasks, "loss": losses.double().cpu(), self.tasks.metric_name: metrics.double().cpu()})

    def _judge(self, algorithm: Algorithm, model: BoundModel, phi: Any, support: Tensor, x: Tensor) -> Tensor:
        """Predictions for x [N, …], normalised as ``normalization`` says; ``support`` holds the support set's inputs."""
        if self.normalization == "transductive":
            return algorithm.predict(model, phi, x)

        def beside_support(single: Tensor) -> Tensor:
            return algorithm.predict(model, phi, torch.cat([support, single.unsqueeze(0)]))[-1]

        return torch.func.vmap(beside_support)(x)

    # For one task, outside a fleet ------------------------------------------------------------------------------------

    def adapt(self, state: State, support: Examples, inner_steps: int | None = None) -> Any:
        """φ_k for one support set: what ``predict`` takes."""
        algorithm = with_inner_steps(self.algorithm, inner_steps)
        key = TaskKey.of(0, "test", 0, [0]).each()[0]
        context = TaskContext(key, 0, False, self.tasks)
        theta = state.theta(self.slots)
        with torch.no_grad():
            return algorithm.adapt(self._bind(theta, None, False), theta, support, context)[-1]

    def predict(self, state: State, phi: Any, x: Tensor, support: Examples) -> Tensor:
        """Predictions for x [N, …] with φ adapted to ``support``, beside which inductive normalisation sees each of them."""
        with torch.no_grad():
            return self._judge(self.algorithm, self._bind(state.theta(self.slots), None, False), phi, support.x, x)


def with_inner_steps(algorithm: Algorithm, inner_steps: int | None) -> Algorithm:
    """The same algorithm with another number of inner steps, where it has inner steps at all."""
    if inner_steps is None or not is_dataclass(algorithm) or "inner_steps" not in {f.name for f in fields(algorithm)}:
        return algorithm
    return replace(algorithm, inner_steps=inner_steps)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def _at_most_one_step(algorithm: Algorithm) -> Algorithm:
    return with_inner_steps(algorithm, min(1, getattr(algorithm, "inner_steps", 0)))
