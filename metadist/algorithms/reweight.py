"""Learning to reweight examples: weights from the agreement of an example's gradient with that of a clean set."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from metadist.core.algorithm import Algorithm, TaskContext, Theta
from metadist.core.meta_step import MetaStep
from metadist.core.model import BoundModel, Model
from metadist.core.parameters import Layout, Parameters
from metadist.core.round import Round
from metadist.core.stages import SharedModel, Stage, TrainingStage, example_losses, slopes
from metadist.core.state import Contribution, Slot
from metadist.core.task import Task

DIRECTION, TOTAL = "direction", "total"


@dataclass(frozen=True)
class Reweight(SharedModel):
    """Learning to reweight (Ren et al., ICML 2018, algorithm 1), for any number of shards.

    Support sets are minibatches of training data, query sets minibatches of a small clean set. At weights ε = 0 the
    look-ahead is θ itself, so that −∂L_clean/∂ε_i is proportional to c · ∇ℓ_i with the mean clean gradient c at θ.
    Round 1 sums c; round 2 sums w̃_i ∇ℓ_i with w̃_i = max(c · ∇ℓ_i, 0), and Σ w̃_i over the whole meta-batch, by which
    the driver divides. Where no weight is above zero, the gradient is zero.
    """

    def slots(self, model: Model, parameters: Parameters) -> dict[str, tuple[Slot, Parameters]]:
        total = Parameters({"weight": next(iter(parameters.values())).new_ones(())})
        return {
            TOTAL: (Slot(Layout.of(total), "average"), total),
            DIRECTION: (Slot(Layout.of(parameters), "constant"), parameters),
        }

    def stages(self) -> Mapping[str, Algorithm]:
        return {"weighted": _Weighted(self), "clean": Stage(self)}

    def rounds(self, step: MetaStep) -> Generator[Round, Contribution, None]:
        clean = yield from step.sum("clean")
        found = yield from step.sum("weighted", direction=clean.mean("model"))
        mean = float(found.mean(TOTAL)) or 1.0  # without weights the sum is zero
        step.update(replace(found, slots={**found.slots, "model": found.slots["model"] / mean}))


@dataclass(frozen=True)
class _Weighted(TrainingStage):
    """The mean of w̃_i ℓ_i over a minibatch, for the model, with constant weights; and the mean of w̃_i."""

    receivers = ("model", TOTAL)
    first_order = True
    second_order = True  # forward mode (``slopes``), which fused attention does not have either

    def objective(
        self,
        model: BoundModel,
        theta: Theta,
        trajectory: Sequence[Mapping[str, Tensor]],
        task: Task,
        context: TaskContext,
    ) -> tuple[Tensor, Tensor]:
        losses, prediction = example_losses(model, trajectory[-1], task.support, context)
        _, along, _ = slopes(model, theta["model"].detach(), theta[DIRECTION], task.support, context)
        return task.support.mean(along.detach().clamp(min=0) * losses), prediction

    def contribute(
        self,
        model: BoundModel,
        theta: Theta,
        trajectory: Sequence[Mapping[str, Tensor]],
        task: Task,
        context: TaskContext,
    ) -> dict[str, Parameters]:
        _, along, _ = slopes(model, theta["model"], theta[DIRECTION], task.support, context)
        return {TOTAL: Parameters({"weight": task.support.mean(along.clamp(min=0))})}
