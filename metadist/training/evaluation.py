"""Judge θ on the workers."""

from __future__ import annotations

from metadist.core.round import EvaluationRequest
from metadist.core.state import Records, State
from metadist.learners.base import Learner
from metadist.learners.evaluation import Evaluation
from metadist.training.scheduler import Scheduler


def evaluate(workers: Scheduler, learner: Learner, state: State, request: EvaluationRequest) -> Evaluation:
    """Judge ``state`` on the tasks of ``request``."""
    return judge(workers, learner, state, request)[0]


def judge(workers: Scheduler, learner: Learner, state: State, request: EvaluationRequest) -> tuple[Evaluation, Records]:
    """Judge ``state`` (its averages, where it has some); return the scores and the records, one row per task."""
    records = workers.records(learner.evaluation(request, state.judged()))
    return learner.summarise(request, records), records
