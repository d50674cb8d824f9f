"""Draw the plots of a run: the learning curve, the adaptation curve, and single tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from metadist.core.algorithm import TaskContext, with_inner_steps
from metadist.core.random import TaskKey
from metadist.core.task import Task
from metadist.experiment.result import AdaptedParameters, Result
from metadist.experiment.trial_reports import draw_trials
from metadist.learners import supervised
from metadist.learners.evaluation import left_out_note
from metadist.rl.environment import MetaEnvironment
from metadist.tasks.sinusoid import Sinusoid
from metadist.tracking import plots


def draw(result: Result, folder: Path) -> list[Path]:
    """Draw every plot that suits the run as a PNG file in ``folder``; return the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    learner, progress = result.experiment.learner, result.outcome.progress
    metric = learner.tasks.metric_name
    drawn = []
    curve = [p for p in progress.curve if metric in p]
    if curve:
        drawn.append(folder / "learning_curve.png")
        validation = [(int(v["meta_step"]), v["mean"], v["ci95"]) for v in progress.validation]
        plots.learning_curve(
            drawn[-1],
            [int(p["meta_step"]) for p in curve],
            [p[metric] for p in curve],
            validation,
            metric,
            _note(result),
        )
    if isinstance(learner.tasks, MetaEnvironment):
        return drawn + draw_trials(result, folder)
    for judged in result.evaluations:
        if len(judged.mean) > 1:
            drawn.append(folder / f"adaptation_{judged.split}.png")
            plots.adaptation_curve(drawn[-1], judged.mean, judged.ci95, metric, judged.split, judged.left_out_note)
    if learner.servable() is not None:  # there is no adaptation to a single task to draw
        return drawn
    if isinstance(learner.tasks, Sinusoid):
        drawn.append(folder / "sinusoid_fits.png")
        plots.sinusoid_fits(drawn[-1], [_sinusoid(result, learner.tasks, index) for index in range(3)])
    elif learner.tasks.kind == "classification" and learner.tasks.input_shape and len(learner.tasks.input_shape) == 3:
        drawn.append(folder / "episode.png")
        task, trajectory = _adapted(result, 0)
        key = TaskKey.of(result.experiment.seed, "test", 0, [0]).each()[0]
        predicted = result.predict(AdaptedParameters(trajectory[-1], task.support), task.query.x).argmax(-1)
        episode = {
            "support": task.support.x,
            "support_labels": task.support.y,
            "query": task.query.x,
            "query_labels": task.query.y,
            "classes": learner.tasks.task_classes(key, "test"),
        }
        plots.episode_sheet(drawn[-1], {**episode, "predicted": predicted, "title": "A held-out episode"})
    return drawn


def _note(result: Result) -> str:
    """Return the note that validations left tasks out: for the one that left out most."""
    entries = [v for v in result.outcome.progress.validation if v.get("left_out")]
    if not entries:
        return ""
    most = max(entries, key=lambda v: v["left_out"])
    return f"up to {left_out_note(most['left_out'], int(most['tasks']))} (validation at {most['meta_step']:.0f})"


def _adapted(result: Result, index: int) -> tuple[Task, Any]:
    """Return a test task and its trajectory φ_0 … φ_k."""
    learner, seed = supervised(result.experiment.learner), result.experiment.evaluation_seed
    keys = TaskKey.of(seed, "test", 0, [index])
    task: Task = torch.utils._pytree.tree_map(lambda t: t[0], learner.sample(keys))
    algorithm = with_inner_steps(learner.algorithm, result.experiment.evaluate.inner_steps)
    theta = result.state.theta(learner.slots)
    with torch.no_grad():
        context = TaskContext(keys.each()[0], 0, False, learner.tasks)
        return task, algorithm.adapt(learner.bind(theta, None, False), theta, task.support, context)


def _sinusoid(result: Result, family: Sinusoid, index: int) -> dict[str, Any]:
    task, trajectory = _adapted(result, index)
    x = torch.linspace(*family.x_range, 200).unsqueeze(-1)
    steps = sorted({0, 1, len(trajectory) - 1} & set(range(len(trajectory))))
    keys = TaskKey.of(result.experiment.evaluation_seed, "test", 0, [index])
    return {
        "x_support": task.support.x[:, 0],
        "y_support": task.support.y[:, 0],
        "x_curve": x[:, 0],
        "y_true": family.curve(keys, x[:, 0])[0],
        "predictions": {
            step: result.predict(AdaptedParameters(trajectory[step], task.support), x)[:, 0] for step in steps
        },
    }
