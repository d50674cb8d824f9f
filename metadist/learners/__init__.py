"""The mathematics of one experiment: few-shot learning, meta-reinforcement learning and particles with carried state.

``Learner`` is the public name of the few-shot learner. The interface of all learners is ``learners.base.Learner``.
"""

from metadist.core.errors import ConfigError
from metadist.learners.base import Learner as AnyLearner
from metadist.learners.carried import CarriedLearner
from metadist.learners.few_shot import FewShotLearner
from metadist.learners.few_shot import FewShotLearner as Learner
from metadist.learners.trials import TrialLearner


def supervised(learner: AnyLearner) -> FewShotLearner:
    """Return ``learner`` as a few-shot learner. ConfigError where it does not adapt to support sets."""
    if isinstance(learner, CarriedLearner):
        raise ConfigError(f"algorithm: {learner.servable()}; this is for algorithms that adapt to a support set")
    if not isinstance(learner, FewShotLearner):
        name = type(learner.tasks).__name__
        raise ConfigError(f"environment: {name} is a meta-environment; this is for supervised tasks")
    return learner


def of_trials(learner: AnyLearner) -> TrialLearner:
    """Return ``learner`` as a trial learner. ConfigError where it learns from supervised tasks."""
    if not isinstance(learner, TrialLearner):
        name = type(learner.tasks).__name__
        raise ConfigError(f"tasks: {name} is supervised; this (--compare, for example) is for meta-environments")
    return learner


__all__ = ["CarriedLearner", "FewShotLearner", "Learner", "TrialLearner", "of_trials", "supervised"]
