"""Architecture search: weights and architecture of a supernet are meta-learned together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metadist.core.algorithm import TaskContext, Theta
from metadist.core.errors import ConfigError, at_least, within
from metadist.core.inner_loop import Descent, InnerLoop
from metadist.core.model import QUERY, BoundModel, InnerStep, Model
from metadist.core.parameters import Layout, Parameters
from metadist.core.state import Slot
from metadist.core.task import Examples, Task, TaskFamily
from metadist.core.tree import mapped

ARCHITECTURE = "architecture"


@dataclass(frozen=True)
class MetaNAS(InnerLoop):
    """Reptile on the weights w and the architecture α of a supernet (Elsken et al., CVPR 2020).

    An inner step is one of first-order DARTS (Liu et al. 2019) on a task: w by the loss on a random half of the
    support set (or of a minibatch), α, at ``architecture_lr``, by the loss on the other half. The weights of the
    operations are softmax(α / T); T falls geometrically from ``temperature`` to ``final_temperature`` over
    ``temperature_steps`` meta-steps, so that one operation of each cell remains. Contributions: w − w_k and α − α_k,
    and the next T as a statistic. In evaluation α is fixed, and w adapts on the whole support set.
    """

    architecture_lr: float = 1e-2
    temperature: float = 1.0
    final_temperature: float = 0.05
    temperature_steps: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        within(0, math.inf, **{"algorithm.architecture_lr": self.architecture_lr})
        at_least(1, **{"algorithm.temperature_steps": self.temperature_steps})
        for name in ("temperature", "final_temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"algorithm.{name}: {getattr(self, name)} is not above 0")

    def compatible(self, family: TaskFamily, model: Model) -> str | None:
        if model.missing("mixture_shape", "operations"):
            return "the model has no mixture of operations; use model: {name: supernet}"
        shape: Any = model.module.mixture_shape
        if shape[1] == 1:
            return "model.operations fixes the architecture; leave it out, or learn by reptile"
        return super().compatible(family, model)

    def slots(self, model: Model, parameters: Parameters) -> dict[str, tuple[Slot, Parameters]]:
        shape: Any = model.module.mixture_shape
        like = next(iter(parameters.values()))
        logits = Parameters({"logits": like.new_zeros(shape)})
        temperature = Parameters({"value": like.new_full((), self.temperature)})
        return {
            ARCHITECTURE: (Slot(Layout.of(logits)), logits),
            "temperature": (Slot(Layout.of(temperature), "average"), temperature),
        }

    def descent(self, model: BoundModel, theta: Theta, support: Examples, context: TaskContext) -> Descent:
        phi = theta["model"].replace({ARCHITECTURE: theta[ARCHITECTURE]["logits"]})
        temperature = theta["temperature"]["value"]
        rates = {
            n: t.new_full((), self.architecture_lr if n == ARCHITECTURE else self.inner_lr) for n, t in phi.items()
        }

        def loss(phi: Parameters, step: InnerStep) -> Tensor:
            rows = self.minibatch(support, context.key, step)
            if not context.training:
                return context.loss(_outputs(model, phi, phi.detach(), temperature, rows.x, step), rows)
            first, second = _halves(rows, context.key.stream("halves", step).bits(rows.rows))
            weights = _outputs(model, phi, phi.detach(), temperature, first.x, step)
            architecture = _outputs(model, phi.detach(), phi, temperature, second.x, step)
            return context.loss(weights, first) + context.loss(architecture, second)

        def finish(phi: Parameters, moments: object) -> dict[str, object]:
            return {"parameters": phi, "temperature": temperature}

        return Descent(loss, phi, Parameters(rates), self.fresh(phi), finish=finish)

    def predict(self, model: BoundModel, phi: Mapping[str, Any], x: Tensor) -> Tensor:
        parameters = phi["parameters"]
        return _outputs(model, parameters, parameters, phi["temperature"], x)

    def contribute(
        self,
        model: BoundModel,
        theta: Theta,
        trajectory: Sequence[Mapping[str, Any]],
        task: Task,
        context: TaskContext,
    ) -> dict[str, Parameters]:
        phi: Parameters = trajectory[-1]["parameters"]
        logits = theta[ARCHITECTURE]["logits"]
        done = (torch.as_tensor(context.meta_step, device=logits.device) + 1).clamp(max=self.temperature_steps)
        fall = math.log(self.final_temperature / self.temperature) / self.temperature_steps
        following = self.temperature * torch.exp(done.double() * fall)
        return {
            "model": theta["model"] - phi.select(lambda n: n != ARCHITECTURE),
            ARCHITECTURE: Parameters({"logits": logits - phi[ARCHITECTURE]}),
            "temperature": Parameters({"value": following.to(logits.dtype)}),
        }

    def discretised(self, model: Model, theta: Theta) -> dict[str, Any]:
        names: Any = model.module.operations
        return {"operations": [names[i] for i in theta[ARCHITECTURE]["logits"].argmax(1).tolist()]}


def _outputs(
    model: BoundModel,
    weights: Parameters,
    architecture: Parameters,
    temperature: Tensor,
    x: Tensor,
    step: InnerStep = QUERY,
) -> Tensor:
    mixture = torch.softmax(architecture[ARCHITECTURE] / temperature, -1)
    prediction: Tensor = model(weights.select(lambda n: n != ARCHITECTURE), x, mixture, step=step)
    return prediction


def _halves(rows: Examples, words: Tensor) -> tuple[Examples, Examples]:
    """Return two halves in the order of ``words``: rows are sorted by class, and a half may have few of the classes.

    Halves of padded rows are masks of real rows; they are the halves that the rows without padding have.
    """
    if rows.mask is not None:
        real = rows.mask.bool()
        half = real.sum() // 2
        place = torch.where(real, words, 1 << 32).argsort(dim=-1, stable=True).argsort(dim=-1, stable=True)
        first, second = real & ((place < half) | (half == 0)), real & (place >= half)
        return Examples(rows.x, rows.y, first), Examples(rows.x, rows.y, second)
    order = words.argsort(dim=-1, stable=True)
    middle = rows.rows // 2
    return (_chosen(rows, order[:middle]), _chosen(rows, order[middle:])) if middle else (rows, rows)


def _chosen(rows: Examples, order: Tensor) -> Examples:
    x, y = (mapped(lambda t: t[order], part) for part in (rows.x, rows.y))
    return Examples(x, y)
