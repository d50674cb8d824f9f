"""The Meta-LSTM of few-shot learning: optimisation as a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import grad_and_value

from metadist.core.algorithm import Algorithm, TaskContext, Theta
from metadist.core.coordinates import initial_weights, log_and_sign, lstm_step
from metadist.core.errors import at_least
from metadist.core.model import BoundModel, Model
from metadist.core.parameters import Layout, Parameters
from metadist.core.state import Slot
from metadist.core.task import Examples


@dataclass(frozen=True)
class MetaLSTM(Algorithm):
    """The LSTM meta-learner (Ravi & Larochelle 2017, section 3): the inner loop c_t = f_t · c_{t−1} − i_t · ∇L_t.

    The network's parameters are the cell state c of an LSTM; the slot ``model`` is c_0, which is learned. A first LSTM
    of ``units`` units, shared by all coordinates, reads log-and-sign(∇L) and log-and-sign(L) and gives x_t; then
    i_t = σ(W_I [x_t, c_{t−1}, i_{t−1}] + b_I), and f_t likewise (eq. 2 and 3). The slot ``meta_lstm`` holds all these
    weights. b_F starts in [4, 6] and b_I in [−5, −4], so that c starts as gradient descent with a small rate; all other
    weights start within ±0.01. Losses and gradients count as constants (``first_order``; section 3.4). Deviation: every
    inner step sees the whole support set.
    """

    inner_steps: int = 8
    units: int = 20
    first_order: bool = True

    def __post_init__(self) -> None:
        at_least(0, **{"algorithm.inner_steps": self.inner_steps})
        at_least(1, **{"algorithm.units": self.units})

    def slots(self, model: Model, parameters: Parameters) -> dict[str, tuple[Slot, Parameters]]:
        shapes = {"lstm.weight": (4 * self.units, 4 + self.units), "gates.weight": (2, self.units + 2)}
        drawn = initial_weights("meta_lstm", shapes, next(iter(parameters.values())).dtype)
        # Within two deviations: at most ±0.01.
        weights = drawn.map(lambda t: t * t.shape[-1] ** 0.5 * 0.005)
        like = drawn["gates.weight"]
        weights = weights.replace(
            {
                "lstm.bias": like.new_zeros(4 * self.units),
                "input": like.new_tensor(-4.5),
                "forget": like.new_tensor(5.0),
            }
        )
        return {"meta_lstm": (Slot(Layout.of(weights)), weights)}

    def adapt(self, model: BoundModel, theta: Theta, support: Examples, context: TaskContext) -> Sequence[Parameters]:
        weights, phi = theta["meta_lstm"], theta["model"]
        layout = Layout.of(phi)
        c = layout.flatten(Parameters(dict(phi)))
        memory = c.new_zeros(c.numel(), 2 * self.units)
        i, f = torch.zeros_like(c), torch.ones_like(c)
        trajectory = [phi]
        for step in range(self.inner_steps):
            gradient, loss = self._gradient(model, layout, c, support, context, step)
            seen = torch.cat((log_and_sign(gradient), log_and_sign(loss).expand(c.numel(), 2)), -1)
            x, memory = lstm_step(seen, memory, weights["lstm.weight"], weights["lstm.bias"])
            w_i, w_f = weights["gates.weight"].unbind(0)
            i = torch.sigmoid(torch.cat((x, torch.stack((c, i), -1)), -1) @ w_i + weights["input"])
            f = torch.sigmoid(torch.cat((x, torch.stack((c, f), -1)), -1) @ w_f + weights["forget"])
            c = f * c - i * gradient
            trajectory.append(Parameters(dict(layout.unflatten(c))))
        return trajectory

    def _gradient(
        self, model: BoundModel, layout: Layout, c: Tensor, support: Examples, context: TaskContext, step: int
    ) -> tuple[Tensor, Tensor]:
        """Return ∇L [n] and L on the support set."""

        def loss_of(vector: Tensor) -> Tensor:
            return context.loss(model(layout.unflatten(vector), support.x, step=step), support)

        gradient, loss = grad_and_value(loss_of)(c.detach() if self.first_order else c)
        return (gradient.detach(), loss.detach()) if self.first_order else (gradient, loss)

    def predict(self, model: BoundModel, phi: Parameters, x: Tensor) -> Tensor:
        prediction: Tensor = model(phi, x)
        return prediction
