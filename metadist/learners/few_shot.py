"""The few-shot learner: a pure function (state, shard) → contribution, and the round of a meta-step."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from metadist.core.algorithm import Algorithm, Phi, TaskContext, with_inner_steps
from metadist.core.computation import Evaluate, Gradient
from metadist.core.engine import Engine
from metadist.core.errors import ConfigError, NonFiniteError, one_of
from metadist.core.model import BoundModel, Model
from metadist.core.outer import OuterLoop
from metadist.core.parameters import Parameters
from metadist.core.random import TaskKey
from metadist.core.round import EvaluationRequest, MetaStepKey, Result, Round, Rounds, Shard
from metadist.core.signature import Signature
from metadist.core.state import Contribution, Records, State, TreeSum
from metadist.core.task import Examples, Task, TaskFamily
from metadist.core.task_metrics import TaskMetric, metric_of_tasks, task_metrics_of
from metadist.engine.agreement import compiled_disagrees
from metadist.engine.compiled import Compiled
from metadist.engine.functions import TensorCall, directly
from metadist.engine.meta_gradient import MetaGradient, fixed, held_by_steps
from metadist.engine.plan import Device, EngineRequest, Plan, plan_shards
from metadist.learners.base import Learner, Surround
from metadist.learners.dry_run import task_hashes, try_metrics, try_tasks, try_twice
from metadist.learners.dry_run_paths import try_paths
from metadist.learners.evaluation import Evaluation, score_tasks
from metadist.learners.signature import describe, describe_earlier

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass
class FewShotLearner(Learner):
    """One experiment's mathematics: algorithm, model, tasks and outer loop. Knows nothing of workers or files.

    ``normalization`` is how batch norm treats the query set in evaluation: ``transductive`` (by the query set's own
    statistics) or ``inductive`` (each query in one batch with the support set). ``non_finite`` says what becomes of a
    task whose contribution has NaN or Inf: ``error``, or ``skip`` (it is left out of the sum and of the weight).
    """

    algorithm: Algorithm
    model: Model
    tasks: TaskFamily
    outer: OuterLoop
    normalization: str = "transductive"
    non_finite: str = "error"
    engine: Engine = field(default_factory=Engine)

    def __post_init__(self) -> None:
        one_of("evaluate.normalization", self.normalization, ("transductive", "inductive"))
        one_of("engine.non_finite", self.non_finite, ("error", "skip"))
        if self.tasks.metric_name in TaskMetric.reserved:
            raise ConfigError(f"metric: '{self.tasks.metric_name}' is taken; give it another name")
        reason = self.algorithm.compatible(self.tasks, self.model)
        if reason:
            raise ConfigError(
                f"algorithm '{type(self.algorithm).__name__}' does not suit tasks '{type(self.tasks).__name__}' with "
                "model "
                f"'{type(self.model.module).__name__}': {reason}"
            )
        self.task_metrics = task_metrics_of(self.tasks)
        self.slots = {name: slot for name, (slot, _) in self._declare(0).items()}
        self.device = torch.device("cpu")
        self._prepared = False
        self.set_engine(self.engine)

    # Where it runs ----------------------------------------------------------------------------------------------------

    def set_engine(self, engine: Engine, around: Surround | None = None) -> None:
        super().set_engine(engine)
        self._meta: MetaGradient | None = None
        self._compiled = Compiled(self.device, around or (lambda name: nullcontext()))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prepared": False, "_meta": None, "_compiled": None}

    # What a shard is --------------------------------------------------------------------------------------------------

    def meta_step(self, key: MetaStepKey, state: State) -> Rounds:
        """θ ← outer(θ, Σ contributions / Σ weights), in a single round of gradient (or delta) shards."""
        total = yield Round(0, state, self.shards(key, Gradient(), tasks=self.outer.meta_batch_size))
        new, norms = self.outer.update(self.slots, state, total, key.meta_step)
        return new, {**{n: v / total.weight for n, v in total.metrics.items()}, **norms}

    def evaluation(self, request: EvaluationRequest, state: State) -> Round:
        """Return the round that judges θ. Its records have one row per task."""
        listed = self._listed(request.split)
        tasks = request.tasks if listed is None else min(request.tasks, listed)
        return Round(0, state, self.evaluation_shards(replace(request, tasks=tasks)), reduce=False)

    def _listed(self, split: str) -> int | None:
        return None if split == "train" else self.tasks.listed_tasks(split)

    def summarise(self, request: EvaluationRequest, records: Records) -> Evaluation:
        algorithm = with_inner_steps(self.algorithm, request.inner_steps)
        protocol = {
            "split": request.split,
            "seed": request.key.seed,
            "tasks": records.rows,
            "normalization": self.normalization,
            "inner_steps": algorithm.inner_steps,
            "family": type(self.tasks).__name__,
            **self.tasks.protocol(request.split),
        }
        return score_tasks(records, self.tasks.metric_name, self.task_metrics, self._listed(request.split), protocol)

    def dry_run(self, seed: int) -> None:
        self.splits()  # refuses splits that share classes
        try_tasks(self, seed)
        try_paths(self, seed)
        try_metrics(self, seed)
        try_twice(self, seed)

    def sampled_hashes(self, seed: int) -> dict[str, str]:
        return task_hashes(self, seed)

    def plan(self, request: EngineRequest, device: Device, sharing: float = 1.0) -> Plan:
        return plan_shards(self, request, device, sharing)

    def miscompiled(self, seed: int, memory_bytes: int | None = None) -> str | None:
        return compiled_disagrees(self, seed, memory_bytes)

    def servable(self) -> str | None:
        return None

    def normalize(self, normalization: str) -> None:
        self.normalization = normalization

    def with_algorithm(self, algorithm: Algorithm) -> FewShotLearner:
        other = copy.copy(self)
        other.algorithm, other._compiled, other._prepared = algorithm, self._compiled, self._prepared
        return other

    def eager(self) -> FewShotLearner:
        """Return a copy that does not compile, on the same device and data."""
        other = FewShotLearner(
            self.algorithm, self.model, self.tasks, self.outer, engine=replace(self.engine, compile=False)
        )
        other.prepared_like(self)
        return other

    def in_float64(self, algorithm: Algorithm) -> FewShotLearner:
        """Return a copy with a float64 model, ``algorithm`` and the default engine, on the same device and data."""
        model = Model(self.model.factory, dtype=torch.float64, freeze=self.model.freeze)
        other = FewShotLearner(algorithm, model, self.tasks, self.outer)
        other.prepared_like(self)
        return other

    def warm_up(self, seed: int) -> float:
        theta = {n: p.map(lambda t: t.to(self.device)) for n, p in self.initial(seed).theta(self.slots).items()}
        with suppress(NonFiniteError):
            self.contribute(theta, TaskKey.of(seed, "train", 0, range(self.outer.shard_size)), 0)
        return self._compiled.seconds

    def tasks_alike(self) -> bool:
        """Return whether training tasks have one size (of two shards), so that one graph can serve them."""
        size = self.outer.shard_size
        first, second = (self.sample(TaskKey.of(0, "train", 0, range(i * size, i * size + size))) for i in (0, 1))
        shapes = [[t.shape for t in torch.utils._pytree.tree_leaves(task)] for task in (first, second)]
        return shapes[0] == shapes[1] and first.support.mask is None and first.query.mask is None

    def sample(self, keys: TaskKey) -> Task:
        """Return the tasks of ``keys`` on the learner's device. The keys stay on the CPU."""
        task = self.tasks.sample(keys, keys.split)
        if not isinstance(task, Task):
            raise ConfigError(
                f"tasks: sample of '{type(self.tasks).__name__}' returns {type(task).__name__}; expected "
                "Task(Examples(x, y), Examples(x, y))"
            )
        task = task.to(self.device, self.model.dtype)
        if (task.support.mask is not None or task.query.mask is not None) and self.model.normalises_over_batch:
            raise ConfigError(
                "model: batch normalisation over padded rows would mix padding into the statistics; these tasks "
                "differ in "
                "size, so use norm: group or layer (or a task family whose tasks are of one size)"
            )
        return Task(task.support.cleared(), task.query.cleared())

    def compute(self, shard: Shard, theta: Mapping[str, Tensor], inputs: Sequence[Records] = ()) -> Result:
        keys = TaskKey.of(shard.seed, shard.split, shard.key_step, range(shard.start, shard.start + shard.count))
        named = {name: self.slots[name].layout.unflatten(vector) for name, vector in theta.items()}
        if isinstance(shard.computation, Gradient):
            return self.contribute(named, keys, shard.meta_step)
        if isinstance(shard.computation, Evaluate):
            return self.evaluate(named, keys, shard.meta_step, shard.computation.inner_steps)
        raise ValueError(f"unknown function '{shard.function}'; expected gradient or evaluate")

    # The mathematics --------------------------------------------------------------------------------------------------

    def bind(self, theta: Mapping[str, Parameters], key: TaskKey | None, training: bool) -> BoundModel:
        return self.model.bind(fixed(theta), key, training)

    @property
    def meta_gradient(self) -> MetaGradient:
        if self._meta is None:
            self._meta = self.meta_gradient_under(self.engine)
        return self._meta

    def meta_gradient_under(self, engine: Engine) -> MetaGradient:
        learned = tuple(n for n, slot in self.slots.items() if slot.rule == "gradient")
        layouts = {n: slot.layout for n, slot in self.slots.items()}
        gradient = MetaGradient(self.algorithm, self.model, self.tasks, learned, layouts, engine)
        if not gradient.in_pieces:
            return gradient
        keys = TaskKey.of(0, "train", 0, [0])
        task = torch.utils._pytree.tree_map(lambda t: t[0], self.sample(keys))
        theta = {n: p.map(lambda t: t.to(self.device)) for n, p in self.initial(0).theta(self.slots).items()}
        return replace(gradient, held=held_by_steps(gradient, theta, task, keys.each()[0].to(self.device)))

    def contribute(self, theta: Mapping[str, Parameters], keys: TaskKey, meta_step: int) -> Contribution:
        """Return the sum of the tasks' gradients (or deltas), with loss and metric on the query sets."""
        return self.contribute_tasks(theta, self.sample(keys), keys, meta_step)

    def contribute_tasks(
        self, theta: Mapping[str, Parameters], tasks: Task, keys: TaskKey, meta_step: int
    ) -> Contribution:
        """Return the contribution of sampled tasks, ``engine.chunk`` tasks at a time."""
        count, size = len(keys.tasks), self.engine.chunk
        if size is None or size >= count:
            return self._contribute_chunk(theta, tasks, keys, meta_step)
        starts = range(0, count, size)
        total = TreeSum[Contribution](len(starts), Contribution.absorb)
        for index, start in enumerate(starts):
            # A copy has aligned memory, where kernels compute the same bits as for a whole shard.
            chunk = torch.utils._pytree.tree_map(lambda t, start=start: t[start : start + size].clone(), tasks)
            some = replace(keys, tasks=keys.tasks[start : start + size])
            total.add(index, self._contribute_chunk(theta, chunk, some, meta_step))
        return total.result()

    def _contribute_chunk(
        self, theta: Mapping[str, Parameters], tasks: Task, keys: TaskKey, meta_step: int
    ) -> Contribution:
        keys = keys.to(self.device)
        tasks, keys, keep = self._padded(tasks, keys)
        run = self._compiled.runner(keys.seed, keys.split) if self.engine.compile else directly
        total = self._explained(lambda: self._sum(run, theta, tasks, keys, meta_step, keep))
        if total.is_finite():
            return total
        values, _ = self.meta_gradient.values(theta, tasks, keys, meta_step)
        finite = self._finite_tasks(values) | ~keep.cpu()
        bad = tuple(int(i) for i in keys.tasks.cpu()[~finite])
        if self.non_finite == "skip" and bad:
            # Not with the compiled graph: there, one task with NaN may affect other tasks than here.
            return self._sum(directly, theta, tasks, keys, meta_step, keep & finite.to(keep.device))
        indices = keys.tasks[keep].tolist()
        what = f"tasks {list(bad)} gave NaN or Inf" if bad else f"the sum over tasks {indices} overflows"
        raise NonFiniteError(f"{what} (seed {keys.seed}, meta-step {meta_step})", bad)

    def _sum(
        self, run: TensorCall, theta: Mapping[str, Parameters], tasks: Task, keys: TaskKey, meta_step: int, keep: Tensor
    ) -> Contribution:
        slots, metrics = self.meta_gradient.sums(run, theta, tasks, keys, meta_step, keep)
        count, names = sum(keep.tolist()), ("loss", self.tasks.metric_name)
        return Contribution(
            {n: v.cpu() for n, v in slots.items()}, float(count), count, dict(zip(names, metrics.tolist()))
        )

    def _padded(self, tasks: Task, keys: TaskKey) -> tuple[Task, TaskKey, Tensor]:
        """Pad compiled shards to a full chunk by repeating the last task: one graph then serves all shards."""
        count = len(keys.tasks)
        keep = torch.ones(count, dtype=torch.bool, device=self.device)
        missing = (self.engine.chunk or self.outer.shard_size) - count if self.engine.compile else 0
        if missing <= 0:
            return tasks, keys, keep

        def pad(t: Tensor) -> Tensor:
            return torch.cat([t, t[-1:].expand(missing, *t.shape[1:])])

        return (
            torch.utils._pytree.tree_map(pad, tasks),
            replace(keys, tasks=pad(keys.tasks)),
            torch.cat([keep, keep.new_zeros(missing)]),
        )

    def _explained(self, compute: Callable[[], T]) -> T:
        try:
            return compute()
        except RuntimeError as error:
            if "randomness" in str(error):
                raise ConfigError(
                    f"model: '{type(self.model.module).__name__}' draws random numbers that are not keyed by the task; "
                    "use torch.nn.Dropout (keyed by us), or draw from context.key in the algorithm"
                ) from error
            raise

    @staticmethod
    def _finite_tasks(values: Mapping[str, Parameters]) -> Tensor:
        tensors = [t for p in values.values() for t in p.values()]
        return torch.stack([torch.isfinite(t).reshape(len(t), -1).all(1) for t in tensors]).all(0).cpu()

    def evaluate(
        self, theta: Mapping[str, Parameters], keys: TaskKey, meta_step: int, inner_steps: int | None = None
    ) -> Records:
        """Return loss, metric and metrics of whole tasks after 0, 1, …, k adaptation steps.

        Columns [T, k+1] in float64 (tables [T, k+1, …]), the index of each task [T], and its sources where the family
        names them.
        """
        algorithm = with_inner_steps(self.algorithm, inner_steps)

        def single(task: Task, index: Tensor) -> tuple[Tensor, Tensor]:
            key = replace(keys, tasks=index)
            context = TaskContext(key, meta_step, False, self.tasks)
            model = self.bind(theta, key, False)
            losses, predictions = [], []
            for phi in algorithm.adapt(model, theta, task.support, context):
                predictions.append(self._judge(algorithm, model, phi, task.support.x, task.query.x))
                losses.append(context.loss(predictions[-1], task.query))
            return torch.stack(losses), torch.stack(predictions)

        tasks = self.sample(keys)
        with torch.no_grad():
            losses, predictions = self._explained(lambda: torch.func.vmap(single)(tasks, keys.tasks.to(self.device)))
            by_step = predictions.unbind(1)
            metrics = torch.stack([metric_of_tasks(self.tasks, p.contiguous(), tasks.query) for p in by_step], 1)
            columns = {"loss": losses, self.tasks.metric_name: metrics}
            columns |= {m.name: m.of_tasks(predictions, tasks.query) for m in self.task_metrics}
        sources = {} if (found := self._sources(keys)) is None else {"source": found}
        return Records({"task": keys.tasks, **sources, **{n: column.double().cpu() for n, column in columns.items()}})

    def _sources(self, keys: TaskKey) -> Tensor | None:
        """Return the sources of the tasks, int64 [T, sources of a task], or None where the family names none."""
        found = [self.tasks.sources(key, keys.split) for key in keys.each()]
        if any(source is None for source in found):
            return None
        return torch.tensor([source if isinstance(source, tuple) else (source,) for source in found])

    def _judge(self, algorithm: Algorithm, model: BoundModel, phi: Phi, support: Tensor, x: Tensor) -> Tensor:
        """Return predictions for x [N, …], normalised as ``normalization`` says.

        ``support`` holds the inputs of the support set.
        """
        if self.normalization == "transductive":
            return algorithm.predict(model, phi, x)

        def with_support(single: Tensor) -> Tensor:
            return algorithm.predict(model, phi, torch.cat([support, single.unsqueeze(0)]))[-1]

        return torch.func.vmap(with_support)(x)

    def exported_tasks(self) -> dict[str, Any]:
        return self.tasks.exported()

    # For one task, outside a fleet ------------------------------------------------------------------------------------

    def describe(self, seed: int) -> Signature:
        return describe(self, seed)

    def describe_earlier(self, seed: int) -> Signature:
        return describe_earlier(self, seed)

    def adapt(self, state: State, support: Examples, inner_steps: int | None = None, classes: int | None = None) -> Phi:
        """Return φ_k for one support set: the argument of ``predict``.

        ``classes`` is the number of its classes; None for as many as the family's tasks have.
        """
        algorithm = with_inner_steps(self.algorithm, inner_steps)
        key = TaskKey.of(0, "test", 0, [0]).each()[0]
        context = TaskContext(key, 0, False, self.tasks, classes)
        theta = state.theta(self.slots)
        with torch.no_grad():
            return algorithm.adapt(self.bind(theta, None, False), theta, support, context)[-1]

    def predict(self, state: State, phi: Phi, x: Tensor, support: Examples) -> Tensor:
        """Return predictions for x [N, …] with φ.

        Inductive normalisation puts each query into one batch with ``support``.
        """
        with torch.no_grad():
            return self._judge(self.algorithm, self.bind(state.theta(self.slots), None, False), phi, support.x, x)
