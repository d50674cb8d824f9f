"""Draw the plots of a run in a meta-environment: returns by episode, regret, and single trials."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from metadist.core.errors import ConfigError
from metadist.core.random import TaskKey
from metadist.core.state import State
from metadist.environments import Gridworld, HalfCheetahVel, Navigation
from metadist.experiment.result import Result
from metadist.learners import of_trials
from metadist.learners.evaluation import TrialEvaluation
from metadist.learners.trials import TrialLearner
from metadist.oracles import Row, compare, possible
from metadist.rl.algorithm import TrialContext
from metadist.rl.trial import EPISODE_END, VALID, Trials, rollout
from metadist.tracking import trial_plots as plots

#: The number of trials of which the curves of known methods are means.
TRIALS = 1000
#: The number of tasks whose speeds are drawn: a simulator steps them one by one.
RUNS = 32
#: Methods whose planning takes longer than the training of a small run.
SLOW = ("psrl", "opsrl", "ucrl2", "beb")


def draw_trials(result: Result, folder: Path) -> list[Path]:
    """Draw every plot that suits the run as a PNG file in ``folder``; return the paths."""
    learner, drawn = of_trials(result.experiment.learner), []
    for judged in result.evaluations:
        assert isinstance(judged, TrialEvaluation)
        rows = _known(learner, result.experiment.evaluation_seed, judged.split, max(2, min(TRIALS, judged.tasks)))
        note = f" ({judged.left_out_note})" if judged.left_out else ""
        ours = {f"this policy, {judged.policy}{note}": (judged.mean, judged.ci95)}
        drawn.append(folder / f"returns_{judged.split}.png")
        curves = {**ours, **{r.name: (r.by_episode, None) for r in rows}}
        plots.returns_by_episode(
            drawn[-1], curves, judged.metric, judged.split, first=0 if judged.by_gradient_steps else 1
        )
        if rows:
            drawn.append(folder / f"regret_{judged.split}.png")
            # The known methods played the first TRIALS trials.
            best, same = torch.tensor(rows[0].by_episode), judged.trials[judged.policy][:TRIALS].mean(0)
            regrets = {f"this policy, {judged.policy}": same, **{r.name: torch.tensor(r.by_episode) for r in rows[1:]}}
            plots.regret(drawn[-1], {name: best - curve for name, curve in regrets.items()}, rows[0].name)
    if isinstance(learner.tasks, Gridworld):
        drawn.append(folder / "trial.png")
        _grid(result, learner, learner.tasks, drawn[-1])
    elif isinstance(learner.tasks, Navigation) and learner.model.module.sees_history:
        drawn.append(folder / "trials.png")
        _plane(result, learner, drawn[-1])
    elif isinstance(learner.tasks, HalfCheetahVel) and learner.model.module.sees_history:
        drawn.append(folder / "speeds.png")
        _speeds(result, learner, learner.tasks, drawn[-1])
    return drawn


def _known(learner: TrialLearner, seed: int, split: str, trials: int) -> list[Row]:
    """Return the scores of the known methods, the oracle first.

    The list is empty where no method is known, and for a policy that is judged after gradient steps.
    """
    if learner.algorithm.by_gradient_steps:
        return []
    try:
        names = [name for name in possible(learner.tasks) if name not in SLOW]
    except ConfigError:
        return []
    return compare(learner.tasks, names, trials=trials, seed=seed, split=split)


def _played(result: Result, learner: TrialLearner, state: State, count: int) -> Trials:
    keys = TaskKey.of(result.experiment.evaluation_seed, "test", 0, range(count))
    theta = state.theta(learner.slots)
    policy = TrialContext(learner.tasks, learner.model, keys, 0).policy(theta)
    return rollout(learner.tasks, policy, keys, greedy=learner.policy == "greedy")


def _episodes(trials: Trials, index: int) -> list[Tensor]:
    """Return the observations of one trial, [steps, O] for each episode."""
    ends = (trials.flag(EPISODE_END)[index].nonzero().flatten() + 1).tolist()
    return list(trials.observation[index][: ends[-1]].tensor_split(ends[:-1]))


def _grid(result: Result, learner: TrialLearner, environment: Gridworld, path: Path) -> None:
    goal = int(environment.sample(TaskKey.of(result.experiment.evaluation_seed, "test", 0, [0]))["goal"])
    size = environment.size
    rows = {}
    for label, state in (("before", learner.initial(result.experiment.seed)), ("after", result.state)):
        cells = [episode.argmax(-1).tolist() for episode in _episodes(_played(result, learner, state, 1), 0)]
        rows[f"{label} training"] = [[(cell % size, cell // size) for cell in episode] for episode in cells]
    plots.grid_trials(path, size, (goal % size, goal // size), rows)


def _plane(result: Result, learner: TrialLearner, path: Path) -> None:
    keys = TaskKey.of(result.experiment.evaluation_seed, "test", 0, range(3))
    goals = [tuple(goal) for goal in learner.tasks.sample(keys)["goal"].tolist()]
    trials = _played(result, learner, result.state, 3)
    plots.planar_trials(path, goals, [_episodes(trials, i) for i in range(3)])


def _speeds(result: Result, learner: TrialLearner, environment: HalfCheetahVel, path: Path) -> None:
    targets = environment.sample(TaskKey.of(result.experiment.evaluation_seed, "test", 0, range(RUNS)))["target"]
    trials = _played(result, learner, result.state, RUNS)
    speed, episode, valid = trials.measured["x_velocity"], trials.episode(), trials.flag(VALID)
    means = []
    for number in range(environment.episodes):
        here = valid & (episode == number)
        means.append(torch.where(here, speed, 0.0).sum(1) / here.sum(1))
    plots.speeds_against_targets(path, targets, means)
