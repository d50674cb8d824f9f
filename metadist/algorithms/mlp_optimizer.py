"""The small-MLP learned optimiser."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from metadist.algorithms.learned_optimizer import LearnedOptimizer, Memory
from metadist.core.coordinates import initial_weights
from metadist.core.errors import at_least
from metadist.core.parameters import Parameters

DECAYS = (0.1, 0.5, 0.9, 0.99, 0.999, 0.9999)
TIMES = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1e3, 3e3, 1e4, 3e4, 1e5)


@dataclass(frozen=True, kw_only=True)
class MLPOptimizer(LearnedOptimizer):
    """The small-MLP optimiser (Metz et al. 2020, "Tasks, stability, architecture, and compute"; Metz et al. 2022).

    A perceptron of ``layers`` × ``hidden`` rectified units sees 19 features of each coordinate: gradient, parameter and
    six momenta m_β ← β m_β + (1 − β) ∇L, each divided by √(mean x² + 1e-5) over its tensor, and tanh(t/τ − 1) for
    eleven τ. Its outputs d and m give the step φ ← φ − ``step_size`` · d · exp(``magnitude`` · m). Meant for
    ``engine.differentiation: pes``. Deviations: none known.
    """

    hidden: int = 32
    layers: int = 2
    step_size: float = 1e-3
    magnitude: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, **{"algorithm.hidden": self.hidden, "algorithm.layers": self.layers})

    def weights(self, dtype: torch.dtype) -> Parameters:
        sizes = [2 + len(DECAYS) + len(TIMES), *[self.hidden] * self.layers, 2]
        shapes: dict[str, tuple[int, ...]] = {}
        for layer, (inputs, outputs) in enumerate(zip(sizes, sizes[1:])):
            shapes |= {f"{layer}.weight": (outputs, inputs), f"{layer}.bias": (outputs,)}
        return initial_weights("mlp_optimizer", shapes, dtype)

    def memory(self, parameters: Tensor) -> Memory:
        momenta = parameters.new_zeros(len(DECAYS), parameters.numel())
        return {"momenta": momenta, "count": parameters.new_zeros(())}

    def update(
        self, weights: Parameters, parameters: Tensor, gradient: Tensor, memory: Memory, sizes: Sequence[int]
    ) -> tuple[Tensor, Memory]:
        decays = torch.tensor(DECAYS, dtype=gradient.dtype, device=gradient.device).unsqueeze(-1)
        momenta = memory["momenta"] * decays + gradient * (1 - decays)
        features = torch.cat((torch.stack((gradient, parameters)), momenta))
        normal = [part * (part.square().mean(-1, keepdim=True) + 1e-5).rsqrt() for part in features.split(sizes, -1)]
        times = torch.tensor(TIMES, dtype=gradient.dtype, device=gradient.device)
        elapsed = torch.tanh(memory["count"] / times - 1)
        # The features of time are the same for all coordinates: their product is computed once.
        own, shared = weights["0.weight"].split((len(features), len(TIMES)), -1)
        x = F.linear(torch.cat(normal, -1).transpose(0, 1), own, shared @ elapsed + weights["0.bias"])
        for layer in range(1, self.layers + 1):
            x = F.linear(x.relu(), weights[f"{layer}.weight"], weights[f"{layer}.bias"])
        direction, magnitude = x.unbind(-1)
        step = direction * (magnitude * self.magnitude).exp() * self.step_size
        return parameters - step, {"momenta": momenta, "count": memory["count"] + 1}
