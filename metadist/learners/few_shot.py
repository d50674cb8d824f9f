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
from metadist.core.computation import Computation, Evaluate, Gradient, StageSum
from metadist.core.engine import Engine
from metadist.core.errors import ConfigError, NonFiniteError, one_of
from metadist.core.meta_step import MetaStep
from metadist.core.model import BoundModel, Model
from metadist.core.outer import OuterLoop
from metadist.core.parameters import Parameters
from metadist.core.random import TaskKey
from metadist.core.round import EvaluationRequest, MetaStepKey, Result, Round, Rounds, Shard
from metadist.core.signature import Signature
from metadist.core.state import Contribution, Records, State, TreeSum
from metadist.core.task import Examples, Task, TaskFamily
from metadist.core.task_metrics import TaskMetric, metric_of_tasks, task_metrics_of
from metadist.core.tree import Tree, column, joined, mapped, stacked
from metadist.engine.agreement import compiled_disagrees
from metadist.engine.compiled import Compiled
from metadist.engine.contributions import given_slots, receivers
from metadist.engine.dependences import held_by_steps
from metadist.engine.functions import TensorCall, directly
from metadist.engine.meta_gradient import MetaGradient, fixed
from metadist.engine.plan import Device, EngineRequest, Plan, plan_shards
from metadist.learners.base import Learner, Surround
from metadist.learners.dry_run import task_hashes, try_metrics, try_tasks, try_twice
from metadist.learners.dry_run_paths import try_paths
from metadist.learners.evaluation import Evaluation, score_tasks, sources_of
from metadist.learners.sampling import is_padded, refuse_statistics_of_padding, sampled
from metadist.learners.signature import describe, describe_earlier
from metadist.learners.sizes import Sizes

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass
class FewShotLearner(Learner):
    """One experiment's mathematics: algorithm, model, tasks and outer loop. Knows nothing of workers or files.

    ``normalization`` is how batch norm treats the query set in evaluation: ``transductive`` (by the query set's own
    statistics) or ``inductive`` (each query in one batch with the support set). ``non_finite`` says what becomes of a
    task whose contribution has NaN or Inf: ``error``, or ``skip`` (it is left out of the sum and of the weight).
    """

    gradients = ("gradient", "stage")

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
        self.slots = self._declared_slots()
        self.device = torch.device("cpu")
        self._prepared = False
        self.set_engine(self.engine)

    # Where it runs ----------------------------------------------------------------------------------------------------

    def set_engine(self, engine: Engine, around: Surround | None = None) -> None:
        super().set_engine(engine)
        self._meta: MetaGradient | None = None
        self._around, self._stages = around, dict[str, FewShotLearner]()
        self._compiled = Compiled(self.device, around or (lambda name: nullcontext()))
        self._sizes_found: Sizes | None = None

    def __getstate__(self) -> dict[str, Any]:
        made = dict.fromkeys(("_meta", "_around", "_compiled", "_sizes_found"))
        return {**self.__dict__, **made, "_prepared": False, "_stages": {}}

    # What a shard is --------------------------------------------------------------------------------------------------

    def meta_step(self, key: MetaStepKey, state: State) -> Rounds:
        """Make the rounds of the algorithm: a single one, unless it has stages."""

        def shards(computation: Computation) -> list[Shard]:
            return self.shards(key, computation, tasks=self.outer.meta_batch_size)

        step = MetaStep(key.meta_step, state, self.slots, self.outer, shards)
        yield from self.algorithm.rounds(step)
        return step.state, step.report

    def receivers(self, computation: Computation) -> frozenset[str]:
        stage = computation.stage if isinstance(computation, StageSum) else None
        algorithm = self.algorithm if stage is None else self.algorithm.stages()[stage]
        return receivers(algorithm, self.slots) if computation.name in self.gradients else frozenset()

    def at(self, stage: str) -> FewShotLearner:
        """Return the learner of a stage of the algorithm, on the same device and data, under the same engine."""
        if stage not in self._stages:
            other = copy.copy(self)
            other.algorithm, other._prepared = self.algorithm.stages()[stage], self._prepared
            other.set_engine(self.engine, self._around)
            self._stages[stage] = other
        return self._stages[stage]

    @property
    def parts(self) -> list[FewShotLearner]:
        """The learners whose contributions make a meta-step: one for each stage, or this one alone."""
        return [self.at(stage) for stage in self.algorithm.stages()] or [self]

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
        for part in self.parts:
            try_tasks(part, seed)
            try_paths(part, seed)
            try_metrics(part, seed)
            try_twice(part, seed)

    def sampled_hashes(self, seed: int) -> dict[str, str]:
        return task_hashes(self, seed)

    def plan(self, request: EngineRequest, device: Device, sharing: float = 1.0) -> Plan:
        return plan_shards(self.parts[0], request, device, sharing)

    def miscompiled(self, seed: int, memory_bytes: int | None = None) -> str | None:
        return next((text for p in self.parts if (text := compiled_disagrees(p, seed, memory_bytes))), None)

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
        other = FewShotLearner(algorithm, self.model.in_dtype(torch.float64), self.tasks, self.outer)
        other.prepared_like(self)
        return other

    def warm_up(self, seed: int) -> float:
        theta = {n: p.map(lambda t: t.to(self.device)) for n, p in self.initial(seed).theta(self.slots).items()}
        for part in self.parts:
            for keys in part.keys_of_graphs(seed):
                with suppress(NonFiniteError):
                    part.contribute(theta, keys, 0)
        return sum(part._compiled.seconds for part in self.parts)

    @property
    def _sizes(self) -> Sizes:
        if self._sizes_found is None:
            self._sizes_found = Sizes(self.tasks, self.algorithm, self.sample, self.outer.shard_size)
        return self._sizes_found

    def several_graphs(self) -> str | None:
        return self._sizes.several_graphs()

    def keys_of_graphs(self, seed: int) -> list[TaskKey]:
        return self._sizes.keys_of_graphs(seed)

    def sample_largest(self, keys: TaskKey) -> Task:
        return self._sizes.largest(keys)

    def sample(self, keys: TaskKey) -> Task:
        """Return the tasks of ``keys`` on the learner's device. The keys stay on the CPU."""
        task = sampled(self.tasks, keys, self.model, self.device)
        # Groups of one size are computed apart (``contribute``): tasks of several are sampled together for a look only.
        if is_padded(task) and len(keys.runs(self.tasks.group_size(keys.split))) == 1:
            refuse_statistics_of_padding(self.model)
        return task

    def compute(self, shard: Shard, theta: Mapping[str, Tensor], inputs: Sequence[Records] = ()) -> Result:
        keys = TaskKey.of(shard.seed, shard.split, shard.key_step, range(shard.start, shard.start + shard.count))
        named = {name: self.slots[name].layout.unflatten(vector) for name, vector in theta.items()}
        if isinstance(shard.computation, Gradient):
            return self.contribute(named, keys, shard.meta_step)
        if isinstance(shard.computation, StageSum):
            return self.at(shard.computation.stage).contribute(named, keys, shard.meta_step)
        if isinstance(shard.computation, Evaluate):
            return self.evaluate(named, keys, shard.meta_step, shard.computation.inner_steps)
        raise ValueError(f"unknown function '{shard.function}'; expected gradient, stage or evaluate")

    # The mathematics --------------------------------------------------------------------------------------------------

    def bind(self, theta: Mapping[str, Parameters], key: TaskKey | None, training: bool) -> BoundModel:
        replaced = self.model.differentiable(training, self.algorithm.second_order)
        return self.model.bind(fixed(theta), key, training, replacements=replaced)

    @property
    def meta_gradient(self) -> MetaGradient:
        if self._meta is None:
            self._meta = self.meta_gradient_under(self.engine)
        return self._meta

    def meta_gradient_under(self, engine: Engine) -> MetaGradient:
        receiving = receivers(self.algorithm, self.slots)
        learned = tuple(n for n, slot in self.slots.items() if n in receiving and slot.rule == "gradient")
        layouts = {n: slot.layout for n, slot in self.slots.items()}
        gradient = MetaGradient(self.algorithm, self.model, self.tasks, learned, layouts, engine)
        averages = len(learned) < len(receiving)
        if self.algorithm.contribution == "gradient" and not averages and not gradient.in_pieces:
            return gradient
        keys = TaskKey.of(0, "train", 0, range(self.outer.shard_size))  # one task alone would not be padded
        task = torch.utils._pytree.tree_map(lambda t: t[0], self.sample(keys))
        key = keys.each()[0].to(self.device)
        theta = {n: p.map(lambda t: t.to(self.device)) for n, p in self.initial(0).theta(self.slots).items()}
        context = TaskContext(key, 0, True, self.tasks, task_ways=task.ways)
        bound = gradient.bind(theta, key, True)
        given = given_slots(self.algorithm, self.slots, bound, theta, task, context)
        gradient = replace(gradient, learned=tuple(n for n in learned if n not in given), given=given)
        return replace(gradient, held=held_by_steps(gradient, theta, task, key)) if gradient.in_pieces else gradient

    def contribute(self, theta: Mapping[str, Parameters], keys: TaskKey, meta_step: int) -> Contribution:
        """Return the sum of the tasks' gradients (or deltas), with loss and metric on the query sets.

        Where sizes are drawn, tasks of one group are computed together: with their own rows, or compiled in a bucket.
        """
        groups = keys.runs(self.tasks.group_size(keys.split))
        total = TreeSum[Contribution](len(groups), Contribution.absorb)
        for index, group in enumerate(groups):
            tasks = self.sample(group)
            if self.engine.compile and self.tasks.group_size(keys.split) is not None:
                tasks = self._sizes.buckets.pad(tasks)
            total.add(index, self.contribute_tasks(theta, tasks, group, meta_step))
        return total.result()

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
        full, group = self.engine.chunk or self.outer.shard_size, self.tasks.group_size(keys.split)
        missing = (full if group is None else min(full, group)) - count if self.engine.compile else 0
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
        names them, and its number of classes [T] where tasks differ in it.
        """
        groups = keys.runs(self.tasks.group_size(keys.split))
        found = [self._evaluate_together(theta, group, meta_step, inner_steps) for group in groups]
        return found[0] if len(found) == 1 else Records.concatenate(found)

    def _evaluate_together(
        self, theta: Mapping[str, Parameters], keys: TaskKey, meta_step: int, inner_steps: int | None
    ) -> Records:
        algorithm = with_inner_steps(self.algorithm, inner_steps)

        def single(task: Task, index: Tensor) -> tuple[Tensor, Tree]:
            key = replace(keys, tasks=index)
            context = TaskContext(key, meta_step, False, self.tasks, task_ways=task.ways)
            model = self.bind(theta, key, False)
            losses, predictions = [], []
            for phi in algorithm.adapt(model, theta, task.support, context):
                prediction = self._judge(algorithm, model, phi, task.support.x, task.query.x)
                predictions.append(context.possible(prediction))
                losses.append(context.loss(predictions[-1], task.query))
            return torch.stack(losses), stacked(predictions)

        tasks = self.sample(keys)
        with torch.no_grad():
            losses, predictions = self._explained(lambda: torch.func.vmap(single)(tasks, keys.tasks.to(self.device)))
            by_step = [column(predictions, step) for step in range(losses.shape[1])]
            metrics = torch.stack([metric_of_tasks(self.tasks, p, tasks.query) for p in by_step], 1)
            columns = {"loss": losses, self.tasks.metric_name: metrics}
            columns |= {m.name: m.of_tasks(predictions, tasks.query, tasks.ways) for m in self.task_metrics}
        facts = {"task": keys.tasks, "source": sources_of(self.tasks, keys), "ways": tasks.ways}
        known = {n: column.cpu() for n, column in facts.items() if column is not None}
        return Records({**known, **{n: column.double().cpu() for n, column in columns.items()}})

    def _judge(self, algorithm: Algorithm, model: BoundModel, phi: Phi, support: Tree, x: Tree) -> Tree:
        """Return predictions for x [N, …], normalised as ``normalization`` says.

        ``support`` holds the inputs of the support set.
        """
        if self.normalization == "transductive":
            return algorithm.predict(model, phi, x)

        def with_support(single: Tree) -> Tree:
            both = joined(torch.cat, [support, mapped(lambda t: t.unsqueeze(0), single)])
            return mapped(lambda t: t[-1], algorithm.predict(model, phi, both))

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

        ``classes`` is the number of its classes; None for as many as the family's tasks have at most.
        """
        algorithm = with_inner_steps(self.algorithm, inner_steps)
        key = TaskKey.of(0, "test", 0, [0]).each()[0]
        context = TaskContext(key, 0, False, self.tasks, classes)
        theta = state.theta(self.slots)
        with torch.no_grad():
            return algorithm.adapt(self.bind(theta, None, False), theta, support, context)[-1]

    def predict(self, state: State, phi: Phi, x: Tree, support: Examples) -> Tree:
        """Return predictions for x [N, …] with φ.

        Inductive normalisation puts each query into one batch with ``support``.
        """
        with torch.no_grad():
            return self._judge(self.algorithm, self.bind(state.theta(self.slots), None, False), phi, support.x, x)
