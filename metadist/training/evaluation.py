"""Judge θ on the workers."""

from __future__ import annotations

from metadist.core.round import EvaluationRequest
from metadist.core.state import State
from metadist.learners.base import Learner
from metadist.learners.evaluation import Evaluation
from metadist.training.scheduler import Scheduler


def evaluate(workers: Scheduler, learner: Learner, state: State, request: EvaluationRequest) -> Evaluation:
    """Judge ``state`` on the tasks of ``request``."""
    return learner.summarise(request, workers.records(learner.evaluation(request, state)))
