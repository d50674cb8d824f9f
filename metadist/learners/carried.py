"""The learner of algorithms with carried state: a population of particles that every meta-step advances by a window."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from metadist.core.algorithm import Theta
from metadist.core.carried import CarriedAlgorithm, CarriedContext, CarriedContribution, ParticleState, first_lifetimes
from metadist.core.computation import Advance, Evaluate
from metadist.core.engine import Engine
from metadist.core.errors import ConfigError, NonFiniteError, one_of
from metadist.core.model import Model, Variants
from metadist.core.outer import OuterLoop
from metadist.core.random import TaskKey
from metadist.core.round import EvaluationRequest, MetaStepKey, Result, Round, Rounds, Shard, WithOutput
from metadist.core.state import Contribution, Records, State
from metadist.core.task import Task, TaskFamily, stack
from metadist.core.task_metrics import TaskMetric, metric_of_tasks, task_metrics_of
from metadist.core.tree import Tree, mapped
from metadist.engine.functions import kept_sum
from metadist.engine.plan import USABLE, Device, EngineRequest, Plan, plan_carried
from metadist.learners.base import Learner, Surround, refuse_another_population
from metadist.learners.dry_run_carried import particle_hashes, try_particles
from metadist.learners.estimators import measured_estimators
from metadist.learners.evaluation import Evaluation, score_tasks, sources_of
from metadist.learners.particles import Contexts, Particles, by_particle, stacked
from metadist.learners.sampling import is_padded, refuse_statistics_of_padding, sampled


@dataclass
class CarriedLearner(Learner):
    """The mathematics of one experiment: an algorithm with carried state, model, tasks and outer loop.

    ``outer.meta_batch_size`` is the size of the population. The shards of a meta-step need the states that the shards
    of the meta-step before kept, and keep their own. ``non_finite`` says what becomes of a particle whose contribution
    or state has NaN or Inf: ``error``, or ``skip`` (it does not count, and starts afresh in the next meta-step).
    """

    gradients = ("advance",)

    algorithm: CarriedAlgorithm
    model: Model
    tasks: TaskFamily
    outer: OuterLoop
    non_finite: str = "error"
    engine: Engine = field(default_factory=Engine)

    def __post_init__(self) -> None:
        one_of("engine.non_finite", self.non_finite, ("error", "skip"))
        if self.tasks.metric_name in TaskMetric.reserved:
            raise ConfigError(f"metric: '{self.tasks.metric_name}' is taken; give it another name")
        reason = self.algorithm.compatible(self.tasks, self.model)
        if reason:
            raise ConfigError(
                f"algorithm '{type(self.algorithm).__name__}' does not suit tasks '{type(self.tasks).__name__}' with "
                f"model '{type(self.model.module).__name__}': {reason}"
            )
        self._check_constants()
        self.task_metrics = task_metrics_of(self.tasks)
        self.slots = self._declared_slots()
        self.device = torch.device("cpu")
        self._prepared = False
        self._structures: dict[Model, pytree.TreeSpec] = {}
        for shard in self._advancing(MetaStepKey("check", 0, 0)):
            self._network(_keys(shard))

    def _check_constants(self) -> None:
        """Refuse frozen parameters and buffers that differ in shape between networks: θ has those of one network."""
        factory, constants = self.model.factory, self.model.initial(0)[1:]
        if not isinstance(factory, Variants) or not any(constants):
            return
        for build in factory.factories:
            other = Model(build, dtype=self.model.dtype, freeze=self.model.freeze).initial(0)[1:]
            mine, theirs = ({n: t.shape for part in parts for n, t in part.items()} for parts in (constants, other))
            if mine != theirs:
                name = next(n for n in (*mine, *theirs) if mine.get(n) != theirs.get(n))
                raise ConfigError(
                    f"model: '{name}' is frozen or a buffer, and differs in shape between the networks of the tasks; "
                    "freeze nothing, or let all networks have one shape"
                )

    def set_engine(self, engine: Engine, around: Surround | None = None) -> None:
        super().set_engine(engine)
        self._structures = {}  # the state of a particle depends on the estimator

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prepared": False, "_structures": {}}

    @property
    def has_states(self) -> bool:
        return True

    def _check_outer(self, outer: OuterLoop) -> None:
        refuse_another_population(self.outer, outer, "particles")

    # The rounds of a meta-step ----------------------------------------------------------------------------------------

    def meta_step(self, key: MetaStepKey, state: State) -> Rounds:
        """θ ← outer(θ, Σ contributions / Σ weights), in a single round that advances every particle."""
        total = yield Round(0, state, self._advancing(key))
        new, norms = self.outer.update(self.slots, state, total, key.meta_step)
        return new, {**{n: v / total.weight for n, v in total.metrics.items()}, **norms}

    def _advancing(self, key: MetaStepKey) -> list[Shard]:
        before = key.meta_step - 1
        return [
            replace(shard, keeps=True, needs=((before, 0, shard.index),) if key.meta_step else ())
            for shard in self.shards(key, Advance(), tasks=self.outer.meta_batch_size)
        ]

    def carried(self, key: MetaStepKey) -> Sequence[Shard]:
        return self._advancing(replace(key, meta_step=key.meta_step - 1)) if key.meta_step else ()

    def evaluation(self, request: EvaluationRequest, state: State) -> Round:
        """Return the round that judges θ. Its records have one row per task."""
        listed = self.tasks.listed_tasks(request.split)
        tasks = request.tasks if listed is None else min(request.tasks, listed)
        return Round(0, state, self.evaluation_shards(replace(request, tasks=tasks)), reduce=False)

    def summarise(self, request: EvaluationRequest, records: Records) -> Evaluation:
        protocol = {
            "split": request.split,
            "seed": request.key.seed,
            "tasks": records.rows,
            "normalization": "transductive",
            "inner_steps": self._evaluation_steps(request.inner_steps),
            "family": type(self.tasks).__name__,
            **self.tasks.protocol(request.split),
        }
        listed = self.tasks.listed_tasks(request.split)
        return score_tasks(records, self.tasks.metric_name, self.task_metrics, listed, protocol)

    def _evaluation_steps(self, given: int | None) -> int:
        return self.algorithm.evaluation_steps if given is None else given

    def dry_run(self, seed: int) -> None:
        self.splits()  # refuses splits that share classes
        try_particles(self, seed, self._tried)

    def sampled_hashes(self, seed: int) -> dict[str, str]:
        return particle_hashes(self, seed, self._tried)

    @property
    def _tried(self) -> int:
        """The number of particles that the dry run advances."""
        return min(2, self.outer.shard_size, self.outer.meta_batch_size)

    def plan(self, request: EngineRequest, device: Device, sharing: float = 1.0) -> Plan:
        budget = int(device.memory_bytes * USABLE / sharing)
        return plan_carried(self.algorithm.estimated, request, device, lambda: measured_estimators(self, budget))

    def servable(self) -> str | None:
        return f"'{type(self.algorithm).__name__}' trains networks over many steps, and has no step of adaptation"

    # What a worker does -----------------------------------------------------------------------------------------------

    def compute(self, shard: Shard, theta: Mapping[str, Tensor], inputs: Sequence[Records] = ()) -> Result | WithOutput:
        """Compute a shard: advance particles from the states in ``inputs``, or evaluate θ with particles of its own."""
        keys = _keys(shard)
        named = {name: self.slots[name].layout.unflatten(vector) for name, vector in theta.items()}
        if isinstance(shard.computation, Advance):
            return self.advance(named, keys, inputs[0] if inputs else None)
        if isinstance(shard.computation, Evaluate):
            return self.evaluate(named, keys, self._evaluation_steps(shard.computation.inner_steps))
        raise ValueError(f"unknown function '{shard.function}'; expected advance or evaluate")

    def _contexts(self, theta: Theta, keys: TaskKey) -> Contexts:
        return Contexts(self._network(keys), self.tasks, theta, self.device, self.engine)

    def _network(self, keys: TaskKey) -> Model:
        """Return the network that the particles of a shard train. ConfigError where they are of several shapes."""
        numbers = keys.tasks.tolist()
        first = self.model.variant(keys.split, numbers[0])
        if any(self.model.variant(keys.split, number) is not first for number in numbers):
            raise ConfigError(
                f"outer.shard_size: {self.outer.shard_size}, but {keys.split} tasks {numbers[0]} to {numbers[-1]} of "
                "one shard have networks of several shapes; let model.each be a multiple of outer.shard_size"
            )
        return first

    def optimizer(self, state: State, parameters: Iterable[Any]) -> torch.optim.Optimizer:
        return self.algorithm.optimizer(state.theta(self.slots), parameters)

    def sample(self, keys: TaskKey) -> Task:
        """Return the tasks of ``keys`` on the learner's device. The keys stay on the CPU."""
        task = sampled(self.tasks, keys, self.model, self.device)
        # Particles that started in different meta-steps are padded to one size.
        if is_padded(task) or self.tasks.group_size(keys.split) is not None:
            refuse_statistics_of_padding(self.model)
        return task

    def _task(self, key: TaskKey) -> Task:
        """Return the task of the single particle of ``key``: sampled alone, it does not depend on the shard."""
        sampled = self.sample(replace(key, tasks=key.tasks.view(1)))
        task: Task = pytree.tree_map(lambda t: t[0], sampled)
        return task

    def advance(self, theta: Theta, keys: TaskKey, before: Records | None) -> WithOutput:
        """Advance the particles of ``keys`` from their states ``before`` (None: all start now)."""
        meta_step = int(keys.meta_step)
        contexts = self._contexts(theta, keys)
        particles, tasks = self._continued(contexts, keys, before)

        def single(state: ParticleState, task: Task, index: Tensor, started: Tensor) -> Any:
            context = contexts.of(replace(keys, tasks=index), started, meta_step, task)
            state, contribution = self.algorithm.advance(theta, state, context)
            weight = torch.as_tensor(contribution.weight, dtype=torch.float64, device=self.device)
            return state, CarriedContribution(contribution.slots, contribution.metrics, weight)

        run = by_particle(single, self.algorithm.vectorized)
        with torch.no_grad():
            state, each = run(particles.state, tasks, keys.tasks.to(self.device), particles.started.to(self.device))
        self._check_structure(particles.state, state)
        return self._counted(keys, Particles(particles.started, particles.ends, state), each)

    def _continued(self, contexts: Contexts, keys: TaskKey, before: Records | None) -> tuple[Particles, Task]:
        """Return the particles of this meta-step, with those that start now, and their tasks."""
        meta_step, each = int(keys.meta_step), keys.each()
        there = None if before is None else Particles.of(before, self._known_structure(contexts, each[0]))
        started, ends, states, tasks = [], [], [], []
        for position, key in enumerate(each):
            goes_on = there is not None and int(there.ends[position]) > meta_step
            if there is not None and goes_on:
                started.append(int(there.started[position]))
                ends.append(int(there.ends[position]))
                states.append(there.row(position))
                tasks.append(self._task(replace(key, meta_step=started[-1])))
                continue
            tasks.append(self._task(key))
            context = contexts.starting(key, meta_step, tasks[-1])
            life = self.algorithm.lifetime(context)
            if before is None and self.algorithm.staggered:
                life = int(first_lifetimes(life, key))
            started.append(meta_step)
            ends.append(meta_step + life)
            states.append(self.algorithm.start(contexts.theta, context))
        self._structures.setdefault(contexts.model, pytree.tree_structure(states[0]))
        return Particles(torch.tensor(started), torch.tensor(ends), stacked(states)), stack(tasks)

    def _known_structure(self, contexts: Contexts, key: TaskKey) -> pytree.TreeSpec:
        """Return the structure of a state: that of any start."""
        if contexts.model not in self._structures:
            context = contexts.starting(key, int(key.meta_step), self._task(key))
            state = self.algorithm.start(contexts.theta, context)
            self._structures[contexts.model] = pytree.tree_structure(state)
        return self._structures[contexts.model]

    def _check_structure(self, before: ParticleState, after: ParticleState) -> None:
        """Refuse a state whose structure, shapes or dtypes ``advance`` changes: the next meta-step expects the same."""
        found, expected = pytree.tree_leaves(after), pytree.tree_leaves(before)
        name = type(self.algorithm).__name__
        if pytree.tree_structure(after) != pytree.tree_structure(before):
            raise ConfigError(f"algorithm: '{name}'.advance returns a state of another structure than start")
        for number, (a, b) in enumerate(zip(found, expected)):
            if a.shape != b.shape or a.dtype != b.dtype:
                raise ConfigError(
                    f"algorithm: '{name}'.advance returns tensor {number} of the state as {list(a.shape[1:])} "
                    f"{a.dtype}, and start as {list(b.shape[1:])} {b.dtype}; expected equal shapes and dtypes"
                )

    def _counted(self, keys: TaskKey, particles: Particles, each: CarriedContribution) -> WithOutput:
        """Sum the contributions [P, …] of the particles that are finite."""
        keep = _finite([dict(each.slots), each.weight, particles.state], len(keys.tasks)).to(self.device)
        if not bool(keep.all()):
            bad = tuple(keys.tasks[~keep.cpu()].tolist())
            if self.non_finite == "error":
                raise NonFiniteError(
                    f"particles {list(bad)} gave NaN or Inf (seed {keys.seed}, meta-step {keys.meta_step})", bad
                )
            particles = particles.ending(~keep, int(keys.meta_step) + 1)
        weight = each.weight
        assert isinstance(weight, Tensor)

        def weighted(t: Tensor) -> Tensor:
            return t * weight.to(t.dtype).view(-1, *(1,) * (t.dim() - 1))

        slots = kept_sum(keep, {n: p.map(weighted) for n, p in each.slots.items()})
        metrics = kept_sum(keep, {n: weighted(m.double()) for n, m in each.metrics.items()})
        total = Contribution(
            {n: self.slots[n].layout.flatten(p).cpu() for n, p in slots.items()},
            float(kept_sum(keep, weight)),
            int(keep.sum()),
            {n: float(m) for n, m in metrics.items()},
        )
        return WithOutput(total, particles.records())

    def evaluate(self, theta: Theta, keys: TaskKey, steps: int) -> Records:
        """Return loss and metrics of the query sets after 0, 1, …, ``steps`` inner steps from a fresh start.

        Columns [T, steps + 1] in float64 (tables [T, steps + 1, …]), the index of each task [T], and its number of
        classes [T] where tasks differ in it.
        """
        contexts, now = replace(self._contexts(theta, keys), judging=True), int(keys.meta_step)
        tasks, index = self.sample(keys), keys.tasks.to(self.device)
        begun, each = torch.full_like(index, now), keys.each()
        rows = [pytree.tree_map(lambda t, i=i: t[i], tasks) for i in range(len(each))]
        columns: dict[str, list[Tensor]] = {}

        def at(place: Tensor, started: Tensor, task: Task) -> CarriedContext:
            return contexts.of(replace(keys, tasks=place), started, now, task)

        def judge(state: ParticleState, task: Task, place: Tensor, started: Tensor) -> tuple[Tensor, Tree]:
            context = at(place, started, task)
            prediction = context.possible(self.algorithm.predict(theta, state, task.query.x, context))
            return context.loss(prediction, task.query), prediction

        with torch.no_grad():
            state = stacked(
                [self.algorithm.start(theta, contexts.starting(k, now, t)) for k, t in zip(each, rows, strict=True)]
            )
            judged = by_particle(judge, self.algorithm.vectorized)
            for number in range(steps + 1):
                losses, predictions = judged(state, tasks, index, begun)
                found = {"loss": losses, self.tasks.metric_name: metric_of_tasks(self.tasks, predictions, tasks.query)}
                one = mapped(lambda t: t.unsqueeze(1), predictions)
                found |= {m.name: m.of_tasks(one, tasks.query, tasks.ways)[:, 0] for m in self.task_metrics}
                for name, values in found.items():
                    columns.setdefault(name, []).append(values.double().cpu())
                if number < steps:
                    state = by_particle(
                        lambda s, t, p, b, number=number: self.algorithm.step(theta, s, at(p, b, t), number),
                        self.algorithm.vectorized,
                    )(state, tasks, index, begun)
        facts = {"task": keys.tasks, "source": sources_of(self.tasks, keys), "ways": tasks.ways}
        known = {n: column.cpu() for n, column in facts.items() if column is not None}
        return Records({**known, **{n: torch.stack(c, 1) for n, c in columns.items()}})


def _keys(shard: Shard) -> TaskKey:
    return TaskKey.of(shard.seed, shard.split, shard.key_step, range(shard.start, shard.start + shard.count))


def _finite(tree: Any, count: int) -> Tensor:
    """Return which of ``count`` particles have finite floating-point tensors [P, …] only: bool [P]."""
    tensors = [t for t in pytree.tree_leaves(tree) if t.is_floating_point() and t.numel()]
    return torch.stack([torch.isfinite(t).reshape(count, -1).all(1).cpu() for t in tensors]).all(0)
