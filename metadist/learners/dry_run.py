"""Try one task of each split before a run starts."""

from __future__ import annotations

import traceback
from dataclasses import replace

import torch

from metadist.core.algorithm import TaskContext, at_most_one_step
from metadist.core.computation import Gradient, Rollout
from metadist.core.errors import ConfigError, MetadistError, first_line
from metadist.core.random import TaskKey
from metadist.core.round import Shard, WithOutput
from metadist.core.state import State
from metadist.core.task import Task
from metadist.engine.meta_gradient import fixed
from metadist.engine.subject import Subject
from metadist.learners.base import Learner
from metadist.learners.culprit import failed
from metadist.learners.dry_run_paths import is_known, refusal
from metadist.learners.signature import check_loss, check_tasks


def try_tasks(learner: Subject, seed: int) -> None:
    """Adapt to one task of each split before a long run starts.

    ConfigError where the shape of the prediction is not that of the targets, or a learned parameter does not take part.
    """
    state = learner.initial(seed)
    for split in ("train", "validation"):
        # A whole shard: one task alone is never padded.
        keys = TaskKey.of(seed, split, 0, range(min(learner.outer.shard_size, learner.outer.meta_batch_size)))
        try:
            task = learner.sample(keys)
        except MetadistError:
            raise
        except Exception as error:  # the user's own code
            last = traceback.extract_tb(error.__traceback__)[-1]
            name = type(learner.tasks).__name__
            raise ConfigError(
                f"tasks: '{name}' can't sample {split} tasks: {first_line(error)} ({last.filename}:{last.lineno})"
            ) from error
        check_tasks(learner, task, split)
        one = torch.utils._pytree.tree_map(lambda t: t[0], task)
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


def try_trials(learner: Learner, seed: int) -> None:
    """Roll out the first trials of a shard and compute their gradient: shapes, finiteness, every parameter."""
    vectors = learner.initial(seed).slots
    count = min(2, learner.outer.shard_size, learner.outer.meta_batch_size)
    shard = Shard("check", 0, 0, 0, Rollout(), 0, count, seed, keeps=True)
    name = type(learner.tasks).__name__
    try:
        rolled = learner.compute(shard, vectors)
    except MetadistError:
        raise
    except Exception as error:  # the user's own code
        last = traceback.extract_tb(error.__traceback__)[-1]
        raise ConfigError(
            f"environment: '{name}' can't be rolled out: {first_line(error)} ({last.filename}:{last.lineno})"
        ) from error
    assert isinstance(rolled, WithOutput)
    gradient = Gradient((("deviation", 1.0), ("mean", 0.0)))
    learner.compute(replace(shard, round=1, computation=gradient, keeps=False), vectors, [rolled.output])


def _check_participation(learner: Subject, state: State, task: Task) -> None:
    """Refuse learned parameters without a gradient. Autograd distinguishes None from zero; torch.func does not."""
    if learner.algorithm.contribution == "delta":
        return
    theta = {slot: p.map(torch.clone) for slot, p in state.theta(learner.slots).items()}
    learned = {
        (s, n): t.requires_grad_()
        for s, p in theta.items()
        if learner.slots[s].rule == "gradient"
        for n, t in p.items()
    }
    key = TaskKey.of(0, "train", 0, [0]).each()[0].to(learner.device)
    model, context = learner.model.bind(fixed(theta), key, True), TaskContext(key, 0, True, learner.tasks)
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
    bound = learner.model.bind(fixed(theta), None, False)
    classes = learner.tasks.kind == "classification"
    ways = learner.tasks.ways(split)
    if needed is not None and classes and ways != needed:
        raise ConfigError(
            f"tasks: {split} tasks have {ways} ways and the model {needed} outputs; algorithm "
            f"'{type(learner.algorithm).__name__}' needs them equal (only metric methods can train with more ways)"
        )
    context = TaskContext(TaskKey.of(0, split, 0, [0]).each()[0].to(learner.device), 0, False, learner.tasks)
    with torch.no_grad():
        if needed is not None and classes:
            output = tuple(bound(theta["model"], task.query.x).shape)
            if output != (task.query.x.shape[0], needed):
                raise ConfigError(
                    f"model: '{type(learner.model.module).__name__}' puts out shape {list(output)} for "
                    f"{task.query.x.shape[0]} "
                    f"inputs; tasks.n_way = {needed} needs [{task.query.x.shape[0]}, {needed}]"
                )
        phi = at_most_one_step(learner.algorithm).adapt(bound, theta, task.support, context)[-1]
        prediction = learner.algorithm.predict(bound, phi, task.query.x)
    shape = tuple(prediction.shape)
    expected = (task.query.x.shape[0], ways) if classes else tuple(task.query.y.shape)
    if shape != expected:
        raise ConfigError(
            f"model: '{type(learner.model.module).__name__}' predicts shape {list(shape)} where the {split} tasks "
            f"need {list(expected)}"
        )
    check_loss(learner, task, split, context.loss(prediction, task.query))
    context.metric(prediction, task.query)
