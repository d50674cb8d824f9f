"""Check an algorithm: of few-shot learning, of meta-reinforcement learning, or with carried state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from metadist.config.components import model_factory
from metadist.core.algorithm import Algorithm
from metadist.core.carried import CarriedAlgorithm
from metadist.core.errors import ConfigError
from metadist.core.task import TaskFamily
from metadist.core.threads import one_thread
from metadist.learners.base import AnyAlgorithm
from metadist.learners.few_shot import FewShotLearner
from metadist.models import GRU, MLP, ConditionalNeuralProcess, Reactive
from metadist.rl.algorithm import TrialAlgorithm
from metadist.rl.environment import MetaEnvironment
from metadist.testing import few_shot, particles, trials
from metadist.testing.failures import UnusableError, usable
from metadist.testing.gradients import check_autograd, check_finite_differences, is_exact
from metadist.testing.quadratics import Linear, Quadratics
from metadist.testing.toys import Blobs, Chance, Curves

_SMOOTH = MLP(hidden=(8,), activation="tanh")


@one_thread()
def check_algorithm(
    algorithm: AnyAlgorithm,
    *,
    tasks: TaskFamily | MetaEnvironment | None = None,
    model: object | None = None,
    exact_gradient: bool | None = None,
) -> None:
    """Check an algorithm: pure in the key, exact across shards, right gradient in float64, shapes, round trips.

    ``tasks`` and ``model`` (an ``nn.Module``, a function that builds one, or a model config) are small toys by default,
    the first ones that the algorithm does not refuse. ``exact_gradient=False``: the contribution is an approximation of
    the gradient on purpose, and is not compared with finite differences; by default ``algorithm.first_order`` decides.
    Raises a PropertyError that names the property, the values and the remedy.
    """
    if isinstance(algorithm, TrialAlgorithm):
        environments = [tasks] if tasks is not None else [Chance()]
        policies = [model] if model is not None else [GRU(hidden=8), Reactive((8,))]
        trial_learner = _first(algorithm, environments, policies)
        with usable(trial_learner, "shards can be computed"):
            for trial_property in trials.TRIAL_PROPERTIES.values():
                trial_property(trial_learner)
        return
    families = [tasks] if tasks is not None else [Curves(), Blobs()]
    if isinstance(algorithm, CarriedAlgorithm):
        carried = _first(algorithm, families, [model] if model is not None else [_SMOOTH])
        with usable(carried, "particles can be advanced"):
            for carried_property in particles.CARRIED_PROPERTIES.values():
                carried_property(carried)
        return
    learner = _first(algorithm, families, [model] if model is not None else [_SMOOTH, ConditionalNeuralProcess(8, 8)])
    with usable(learner, "shards can be computed"):
        for part in learner.parts:
            _check_part(part, exact_gradient)
        if algorithm.contribution == "delta" and (quadratic := _on_quadratics(algorithm)):
            few_shot.points_downhill(quadratic)


def _check_part(learner: FewShotLearner, exact_gradient: bool | None) -> None:
    """Check the learner of one stage, or the whole learner where the algorithm has no stages."""
    for name, property in few_shot.FEW_SHOT_PROPERTIES.items():
        if name != "right_gradient":
            property(learner)
    check_autograd(learner)
    if is_exact(learner) if exact_gradient is None else exact_gradient:
        check_finite_differences(learner)


def _first(algorithm: Any, families: Sequence[Any], models: Sequence[Any]) -> Any:
    """Make the learner of the first combination that the algorithm accepts."""
    refusals = []
    for family in families:
        for model in models:
            try:
                return _build(algorithm)(algorithm, family, model_factory(model, family, algorithm))
            except ConfigError as error:
                refusals.append(str(error))
    raise UnusableError(
        algorithm,
        "it learns some tasks with some model",
        f"it refuses all that were tried: {'; '.join(dict.fromkeys(refusals))}",
        "pass tasks=… and model=… that it learns with",
    )


def _build(algorithm: AnyAlgorithm) -> Callable[[Any, Any, Any], Any]:
    if isinstance(algorithm, TrialAlgorithm):
        return trials.build
    return particles.build if isinstance(algorithm, CarriedAlgorithm) else few_shot.build


def _on_quadratics(algorithm: Algorithm) -> FewShotLearner | None:
    """Make the learner of quadratic tasks, or None where the algorithm refuses them."""
    family = Quadratics()
    try:
        return few_shot.build(algorithm, family, model_factory(Linear(), family, algorithm))
    except ConfigError:
        return None
