"""Try one task of each split before a run starts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from metadist.core.algorithm import TaskContext, at_most_one_step, with_inner_steps
from metadist.core.computation import Evaluate, Gradient, Rollout
from metadist.core.differences import by_name, difference
from metadist.core.errors import ConfigError, MetadistError, first_line
from metadist.core.random import SPLITS, TaskKey
from metadist.core.round import Shard, WithOutput
from metadist.core.state import Contribution, Records, State
from metadist.core.task import Task, UnlikeTargets, alone
from metadist.core.task_metrics import mixed_rows
from metadist.core.tree import Tree, first, shapes, shown
from metadist.engine.subject import Subject
from metadist.learners.base import Learner
from metadist.learners.culprit import failed, place
from metadist.learners.dry_run_paths import is_known, refusal
from metadist.learners.purity import FROM_KEY, ROUNDING, SALTS, ImpureConfigError, differs_by_shard, impurity
from metadist.learners.signature import check_loss, check_tasks
from metadist.rl.environment import MetaEnvironment
from metadist.rl.journey import journey


def try_tasks(learner: Subject, seed: int) -> None:
    """Sample tasks of every split and adapt to one of training and of validation before a long run starts.

    ConfigError where tasks are no pure function of the key, where the shape of the prediction is not that of the
    targets, or where a learned parameter does not take part.
    """
    state = learner.initial(seed)
    for split in SPLITS:
        # A whole shard: one task alone is never padded.
        keys = _first_keys(learner, seed, split)
        task = _sampled(learner, keys)
        check_tasks(learner, task, split)
        _check_sampling(learner, keys, task)
        if split == "test":
            continue
        one = alone(task, 0)
        try:
            _check_output(learner, state, one, split)
            if split == "train":
                _check_participation(learner, state, one)
        except MetadistError:
            raise
        except Exception as error:  # the user's own code
            if is_known(learner.model, error):
                raise ConfigError(refusal(learner.model, "trained", error)) from error
            raise failed(learner, state, one, split, error) from error


def task_hashes(learner: Subject, seed: int) -> dict[str, str]:
    """Return the SHA-256 of the tensors of each split's first shard, by split and name."""
    return {
        f"{split} tasks ({name})": digest
        for split in SPLITS
        for name, digest in _hashes(by_name(_sampled(learner, _first_keys(learner, seed, split)))).items()
    }


def trial_hashes(learner: Learner, seed: int) -> dict[str, str]:
    """Return the SHA-256 of the columns of the first trial."""
    shard = Shard("check", 0, 0, 0, Rollout(), 0, 1, seed, keeps=True)
    rolled = _rolled(learner, shard, learner.initial(seed).slots)
    return {f"trials ({name})": digest for name, digest in _hashes(_environment_first(rolled)).items()}


def _hashes(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    return {n: hashlib.sha256(t.contiguous().cpu().numpy().tobytes()).hexdigest() for n, t in tensors.items()}


def _first_keys(learner: Subject, seed: int, split: str) -> TaskKey:
    return TaskKey.of(seed, split, 0, range(min(learner.outer.shard_size, learner.outer.meta_batch_size)))


def _sampled(learner: Subject, keys: TaskKey) -> Task:
    try:
        return learner.sample(keys)
    except MetadistError:
        raise
    except Exception as error:  # the user's own code
        name = type(learner.tasks).__name__
        raise ConfigError(
            f"tasks: '{name}' can't sample {keys.split} tasks: {first_line(error)}{place(error)}"
        ) from error


def _check_sampling(learner: Subject, keys: TaskKey, task: Task) -> None:
    """Refuse tasks that differ when they are sampled again, with other global random states or in another shard."""
    name, count = f"tasks: '{type(learner.tasks).__name__}'", len(keys.tasks)
    if differs := impurity(lambda: by_name(_sampled(learner, keys)), by_name(task)):
        raise ImpureConfigError(
            name, f"gives other {keys.split} tasks when the same key is sampled again", differs, FROM_KEY
        )
    if count < 2:
        return
    found = differs_by_shard(
        lambda some: _sampled(learner, TaskKey.of(keys.seed, keys.split, 0, list(some))),
        task,
        ([0], [count - 1, 0]),
        ROUNDING,
    )
    if found is not None:
        raise ImpureConfigError(
            name,
            f"gives another {keys.split} task {found[0]} in another shard",
            found[1],
            "compute every task from its own key, and no statistics over the shard",
        )


def try_metrics(learner: Subject, seed: int) -> None:
    """Judge a whole shard, whose tasks may be padded, where losses and metrics could see padding or whole tasks.

    ConfigError where a loss or metric does not fit the tasks.
    """
    theta = learner.initial(seed).theta(learner.slots)
    for split in ("train", "validation"):
        if learner.task_metrics or learner.tasks.sizes(split) is None:
            learner.evaluate(
                theta, _first_keys(learner, seed, split), 0, at_most_one_step(learner.algorithm).inner_steps
            )


def try_twice(learner: Subject, seed: int) -> None:
    """Compute the gradient of a training task and the scores of a validation task twice.

    ConfigError where they are no pure function of the key.
    """
    state = learner.initial(seed)
    for split in ("train", "validation"):
        _check_computation(learner, state, _first_keys(learner, seed, split))


def _check_computation(learner: Subject, state: State, keys: TaskKey) -> None:
    trains = keys.split == "train"
    shard = Shard("check", 0, 0, 0, Gradient() if trains else Evaluate(), 0, 1, keys.seed, keys.split)
    eager = learner.eager()

    def compute() -> Mapping[str, Tensor]:
        result = eager.compute(shard, state.slots)
        if isinstance(result, Contribution):
            return {f"the gradient of slot '{name}'": vector for name, vector in result.slots.items()}
        assert isinstance(result, Records)
        return {f"the {name}": column for name, column in result.columns.items()}

    try:
        differs = impurity(compute)
    except MetadistError:
        raise
    except Exception:  # what fails is explained by ``try_paths``; NaN is treated as engine.non_finite says
        return
    if differs:
        raise ImpureConfigError(
            f"model, algorithm, loss or metric: {'training' if trains else 'evaluation'} of "
            f"'{type(learner.model.module).__name__}'",
            f"on the same {keys.split} task gives another result the second time",
            differs,
            "draw random numbers by torch.nn.Dropout (metadist keys it) or from context.key, and keep nothing from one "
            "call to the next",
        )


def try_trials(learner: Learner, seed: int) -> None:
    """Roll out the first trials of a shard and compute their gradient: shapes, finiteness, every parameter.

    ConfigError where the same trials or their gradient differ the second time, or where a trial depends on its batch.
    """
    vectors = learner.initial(seed).slots
    count = min(2, learner.outer.shard_size, learner.outer.meta_batch_size)
    shard = Shard("check", 0, 0, 0, Rollout(), 0, count, seed, keeps=True)
    rolled = _rolled(learner, shard, vectors)
    _check_rollout(learner, shard, vectors, rolled)
    gradient = Gradient((("deviation", 1.0), ("mean", 0.0)))
    learning = replace(shard, round=1, computation=gradient, keeps=False)

    def contribution() -> Mapping[str, Tensor]:
        found = learner.compute(learning, vectors, [rolled.output])
        assert isinstance(found, Contribution)
        return {f"the gradient of slot '{name}'": vector for name, vector in found.slots.items()}

    if differs := impurity(contribution):
        raise ImpureConfigError(
            f"model or algorithm: '{type(learner.model.module).__name__}'",
            "has another gradient on the same trials the second time",
            differs,
            "draw random numbers from context.keys.stream(name), and keep nothing from one call to the next",
        )


def _rolled(learner: Learner, shard: Shard, vectors: Mapping[str, Tensor]) -> WithOutput:
    with _own_environment(learner):
        rolled = learner.compute(shard, vectors)
    assert isinstance(rolled, WithOutput)
    return rolled


@contextmanager
def _own_environment(learner: Learner) -> Iterator[None]:
    """Explain an error of the user's own code."""
    environment = learner.tasks
    assert isinstance(environment, MetaEnvironment)
    try:
        yield
    except MetadistError:
        raise
    except Exception as error:
        raise ConfigError(
            f"environment: '{environment.title}' can't be rolled out: {first_line(error)}{place(error)}"
        ) from error


def _check_rollout(learner: Learner, shard: Shard, vectors: Mapping[str, Tensor], rolled: WithOutput) -> None:
    """Refuse an environment whose trials differ when they are rolled out again, or in another batch."""
    environment = learner.tasks
    assert isinstance(environment, MetaEnvironment)
    name = f"environment: '{environment.title}'"
    if rolled.result.tasks < shard.count:  # a simulator failed: environment.on_error leaves trials out
        return
    again = partial(_rolled, learner, shard, vectors)
    if differs := impurity(lambda: _environment_first(again()), _environment_first(rolled), SALTS[:1]):
        raise ImpureConfigError(
            name,
            "gives another trial when the same one is rolled out again",
            differs,
            "draw from the key and the noise alone (a simulator: from its np_random, which reset(seed=…) seeds), and "
            "clear everything in reset(), running averages of wrappers too",
        )
    keys = TaskKey.of(shard.seed, "train", 0, list(range(2)))
    with _own_environment(learner):
        among = journey(environment, keys)
        alone = journey(environment, replace(keys, tasks=keys.tasks[1:]))
    if differs := difference({n: v[1:] for n, v in among.items()}, alone, ROUNDING):
        raise ImpureConfigError(
            name,
            "gives another episode in another batch",
            f"among two tasks and alone, {differs}",
            "compute every row from its own task, state, action and noise",
        )


def _environment_first(rolled: WithOutput) -> dict[str, Tensor]:
    """Return the columns of trials, the environment's before the policy's: a difference is told by its cause."""
    columns = rolled.output.columns
    return {n: columns[n] for n in sorted(columns, key=lambda n: n not in ("observation", "reward"))}


def _check_participation(learner: Subject, state: State, task: Task) -> None:
    """Refuse learned parameters without a gradient. Autograd distinguishes None from zero; torch.func does not."""
    names = learner.meta_gradient.learned
    if not names:
        return
    theta = {slot: p.map(torch.clone) for slot, p in state.theta(learner.slots).items()}
    learned = {(s, n): t.requires_grad_() for s in names for n, t in theta[s].items()}
    key = TaskKey.of(0, "train", 0, [0]).each()[0].to(learner.device)
    model = learner.bind(theta, key, True)
    context = TaskContext(key, 0, True, learner.tasks, task_ways=task.ways)
    trajectory = learner.algorithm.adapt(model, theta, task.support, context)
    loss, _ = learner.algorithm.objective(model, theta, trajectory, task, context)
    found = (
        torch.autograd.grad(loss, list(learned.values()), allow_unused=True)
        if loss.requires_grad
        else [None] * len(learned)
    )
    missing = [name if slot == "model" else f"{slot}/{name}" for (slot, name), g in zip(learned, found) if g is None]
    if missing:
        raise ConfigError(
            f"model: the loss does not depend on {', '.join(missing)} (a missing gradient); remove them, name them in "
            "model.freeze, or look for a detach or no_grad on their way"
        )


def _check_output(learner: Subject, state: State, task: Task, split: str) -> None:
    needed = learner.algorithm.outputs(learner.tasks)
    theta = state.theta(learner.slots)
    bound = learner.bind(theta, None, False)
    classes = learner.tasks.kind == "classification"
    ways = learner.tasks.ways(split)
    if needed is not None and classes and (ways != needed if task.ways is None else ways > needed):
        raise ConfigError(
            f"tasks: {split} tasks have {ways} ways and the model {needed} outputs; algorithm "
            f"'{type(learner.algorithm).__name__}' needs them equal (only metric methods can train with more ways)"
        )
    key = TaskKey.of(0, split, 0, [0]).each()[0].to(learner.device)
    context = TaskContext(key, 0, False, learner.tasks, task_ways=task.ways)
    name, rows = type(learner.model.module).__name__, task.query.rows
    logits = ways if needed is None or task.ways is None else needed
    with torch.no_grad():
        if needed is not None and classes:
            output = shapes(bound(theta["model"], task.query.x))
            if output != ((rows, needed),):
                raise ConfigError(
                    f"model: '{name}' puts out shape {_listed(output)} for {rows} inputs; tasks.n_way = {needed} needs "
                    f"[{rows}, {needed}]"
                )
        for steps in sorted({0, min(1, learner.algorithm.inner_steps)}):
            algorithm = with_inner_steps(learner.algorithm, steps)
            phi = algorithm.adapt(bound, theta, task.support, context)[-1]
            prediction = algorithm.predict(bound, phi, task.query.x)
            if classes and shapes(prediction) != ((rows, logits),):
                found = _listed(shapes(prediction))
                raise ConfigError(
                    f"model: '{name}' predicts shape {found} where the {split} tasks need [{rows}, {logits}]"
                )
            try:
                check_loss(learner, task, split, context.loss(prediction, task.query))
                context.metric(prediction, task.query)
            except UnlikeTargets as error:
                raise ConfigError(
                    f"model: '{name}' predicts shape {shown(prediction)} where the {split} tasks need "
                    f"{shown(task.query.y)}: {error}"
                ) from error
            if not classes:
                _check_rows(learner, prediction, task, split)


def _listed(found: tuple[tuple[int, ...], ...]) -> str:
    return " and ".join(str(list(shape)) for shape in found)


def _check_rows(learner: Subject, prediction: Tree, task: Task, split: str) -> None:
    """Refuse a loss or metric of the family's own in which the rows of unlike shapes broadcast against each other."""
    if shapes(prediction) == shapes(task.query.y):
        return
    prediction, target = task.query.real(prediction), task.query.real(task.query.y)
    for name, judge in (("loss", learner.tasks.loss), ("metric", learner.tasks.metric)):
        if (found := mixed_rows(judge, prediction, target)) is not None:
            raise ConfigError(
                f"tasks: the {name} of '{type(learner.tasks).__name__}' of a row depends on other rows where the "
                f"{split} tasks have predictions {shown(prediction)} and targets {shown(target)} (the last row "
                f"among {len(first(target))}: {found[0]:.6g}, alone: {found[1]:.6g}): do they broadcast? give both [N] "
                "or both [N, 1], or compute each row from its own"
            )
