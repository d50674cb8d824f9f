"""Meta-Weight-Net: a small network that learns the weights of training examples from a clean set."""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from metadist.core.algorithm import Algorithm, TaskContext, Theta
from metadist.core.errors import at_least, within
from metadist.core.meta_step import MetaStep
from metadist.core.model import BoundModel, Model
from metadist.core.parameters import Layout, Parameters
from metadist.core.random import seeded
from metadist.core.round import Round
from metadist.core.stages import SharedModel, Stage, TrainingStage, example_losses, slopes
from metadist.core.state import Contribution, Slot
from metadist.core.task import Task

NET, DIRECTION = "weight_net", "direction"


@dataclass(frozen=True)
class MetaWeightNet(SharedModel):
    """Meta-Weight-Net (Shu et al., NeurIPS 2019, algorithm 1), for any number of shards.

    Support sets are minibatches of training data with wrong labels or few examples of some classes; query sets are
    minibatches of a small clean set. The weight net V (1 – ``hidden`` – 1, a sigmoid at the end) reads the loss ℓ of an
    example as a constant. Rounds of a meta-step, with sums over the whole meta-batch:

    1. g = mean of V(ℓ_i) ∇ℓ_i at θ; the driver looks ahead, θ' = θ − α g;
    2. c = mean clean gradient at θ';
    3. V's gradient, −α mean of (c · ∇ℓ_i) ∂V(ℓ_i), and its outer update;
    4. mean of V(ℓ_i) ∇ℓ_i with the new V, and the model's outer update.

    α is ``look_ahead_lr`` (null: the model's outer rate at the time). V learns at ``lr_of_weight_net`` (null:
    ``outer.lr``) with ``weight_decay_of_weight_net``. Batch norm normalises each minibatch by itself.
    """

    hidden: int = 100
    look_ahead_lr: float | None = None
    lr_of_weight_net: float | None = 1e-3
    weight_decay_of_weight_net: float = 1e-4

    def __post_init__(self) -> None:
        at_least(1, **{"algorithm.hidden": self.hidden})
        rates = ("look_ahead_lr", "lr_of_weight_net", "weight_decay_of_weight_net")
        within(0, math.inf, **{f"algorithm.{name}": getattr(self, name) for name in rates})

    def slots(self, model: Model, parameters: Parameters) -> dict[str, tuple[Slot, Parameters]]:
        net = _initial(self.hidden, next(iter(parameters.values())).dtype)
        slot = Slot(Layout.of(net), lr=self.lr_of_weight_net, weight_decay=self.weight_decay_of_weight_net)
        # Any direction but zero, so that a comparison of engines sees what depends on it.
        return {NET: (slot, net), DIRECTION: (Slot(Layout.of(parameters), "constant"), parameters)}

    def stages(self) -> Mapping[str, Algorithm]:
        return {"train": _Train(self), "clean": Stage(self), "weights": _Weights(self)}

    def rounds(self, step: MetaStep) -> Generator[Round, Contribution, None]:
        rate = step.rate("model") if self.look_ahead_lr is None else self.look_ahead_lr
        train = yield from step.sum("train")
        clean = yield from step.sum("clean", model=step["model"] - train.mean("model") * rate)
        net = yield from step.sum("weights", direction=clean.mean("model"))
        step.update(net.scaled(-rate))
        step.update((yield from step.sum("train")))


def weights(net: Mapping[str, Tensor], losses: Tensor) -> Tensor:
    """Return the weights in (0, 1) of examples with ``losses`` [N], which count as constants: [N]."""
    hidden = torch.relu(losses.detach().unsqueeze(-1) * net["hidden.weight"] + net["hidden.bias"])
    return torch.sigmoid((hidden * net["output.weight"]).sum(-1) + net["output.bias"])


def _initial(hidden: int, dtype: torch.dtype) -> Parameters:
    """Return the net with the initial distribution of ``nn.Linear``, the same one for every seed."""
    generator = seeded(0, NET)

    def uniform(*shape: int, inputs: int) -> Tensor:
        return ((2 * torch.rand(shape, generator=generator) - 1) * inputs**-0.5).to(dtype)

    return Parameters(
        {
            "hidden.weight": uniform(hidden, inputs=1),
            "hidden.bias": uniform(hidden, inputs=1),
            "output.weight": uniform(hidden, inputs=hidden),
            "output.bias": uniform(inputs=hidden),
        }
    )


@dataclass(frozen=True)
class _Train(TrainingStage):
    """The mean of V(ℓ_i) ℓ_i over a minibatch, for the model: the weights are constants."""

    first_order = True

    def objective(
        self,
        model: BoundModel,
        theta: Theta,
        trajectory: Sequence[Mapping[str, Tensor]],
        task: Task,
        context: TaskContext,
    ) -> tuple[Tensor, Tensor]:
        losses, prediction = example_losses(model, trajectory[-1], task.support, context)
        return task.support.mean(weights(theta[NET], losses).detach() * losses), prediction


@dataclass(frozen=True)
class _Weights(TrainingStage):
    """The mean of V(ℓ_i) (c · ∇ℓ_i) over a minibatch, for the weight net; c is the published direction."""

    receivers = (NET,)
    second_order = True  # forward mode (``slopes``), which fused attention does not have either

    def objective(
        self,
        model: BoundModel,
        theta: Theta,
        trajectory: Sequence[Mapping[str, Tensor]],
        task: Task,
        context: TaskContext,
    ) -> tuple[Tensor, Tensor]:
        losses, along, prediction = slopes(model, trajectory[-1], theta[DIRECTION], task.support, context)
        return task.support.mean(weights(theta[NET], losses) * along.detach()), prediction
