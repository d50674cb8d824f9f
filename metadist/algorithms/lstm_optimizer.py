"""The LSTM optimiser: learning to learn by gradient descent by gradient descent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from metadist.algorithms.learned_optimizer import LearnedOptimizer, Memory
from metadist.core.coordinates import initial_weights, log_and_sign, lstm_step
from metadist.core.errors import at_least
from metadist.core.parameters import Parameters


@dataclass(frozen=True, kw_only=True)
class LSTMOptimizer(LearnedOptimizer):
    """The coordinate-wise LSTM optimiser (Andrychowicz et al. 2016, section 2.1 and appendix A).

    All coordinates share the weights of ``layers`` LSTM layers of ``hidden`` units, and each has its own memory h:
    (u, h) ← m(log-and-sign(∇L), h), φ ← φ + ``output`` · u. The reference code unrolls 20 of 100 steps, with Adam at
    1e-3 as outer optimiser. Deviations: the sum of losses of a window is their mean; ``preprocess`` is the paper's
    p = 10 (the reference code has 5).
    """

    hidden: int = 20
    layers: int = 2
    output: float = 0.01
    preprocess: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, **{"algorithm.hidden": self.hidden, "algorithm.layers": self.layers})

    def weights(self, dtype: torch.dtype) -> Parameters:
        shapes: dict[str, tuple[int, ...]] = {}
        for layer in range(self.layers):
            inputs = self.hidden if layer else 2
            shapes[f"{layer}.weight"] = (4 * self.hidden, inputs + self.hidden)
            shapes[f"{layer}.bias"] = (4 * self.hidden,)
        return initial_weights("lstm_optimizer", {**shapes, "output.weight": (1, self.hidden)}, dtype)

    def memory(self, parameters: Tensor) -> Memory:
        return {"lstm": parameters.new_zeros(parameters.numel(), 2 * self.hidden * self.layers)}

    def update(
        self, weights: Parameters, parameters: Tensor, gradient: Tensor, memory: Memory, sizes: Sequence[int]
    ) -> tuple[Tensor, Memory]:
        x, kept = log_and_sign(gradient, self.preprocess), []
        for layer, part in enumerate(memory["lstm"].chunk(self.layers, -1)):
            x, part = lstm_step(x, part, weights[f"{layer}.weight"], weights[f"{layer}.bias"])
            kept.append(part)
        step = (x @ weights["output.weight"].T).squeeze(-1)
        return parameters + step * self.output, {"lstm": torch.cat(kept, -1)}
