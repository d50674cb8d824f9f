"""The networks of conditional neural processes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metadist.core.errors import ConfigError


@dataclass(frozen=True)
class ConditionalNeuralProcess:
    """Encoder and decoder of a conditional neural process (Garnelo et al. 2018): real values to Gaussians."""

    width: int = 128
    representation: int = 128
    minimum_deviation: float = 0.1

    def build(self, input_shape: tuple[int, ...], outputs: int | None) -> nn.Module:
        if outputs is None:
            raise ConfigError("model 'cnp' has no embedding; use it with algorithm 'cnp'")
        return _CNP(math.prod(input_shape), outputs, self)


class _CNP(nn.Module):
    def __init__(self, inputs: int, outputs: int, config: ConditionalNeuralProcess) -> None:
        super().__init__()
        width, self.minimum = config.width, config.minimum_deviation
        self.encoder = nn.Sequential(
            nn.Linear(inputs + outputs, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, config.representation),
        )
        self.decoder = nn.Sequential(
            nn.Linear(inputs + config.representation, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, 2 * outputs),
        )

    def encode(self, x: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
        """Return the mean of the encodings of the real examples: [representation]."""
        each: Tensor = self.encoder(torch.cat([x.flatten(1), y.reshape(len(y), -1)], dim=1))
        if mask is None:
            return each.mean(0)
        return torch.where(mask.bool().unsqueeze(1), each, torch.zeros_like(each)).sum(0) / mask.to(each.dtype).sum()

    def decode(self, representation: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return (mean, standard deviation), each [N, outputs]."""
        flat = x.flatten(1)
        both = self.decoder(torch.cat([flat, representation.expand(flat.shape[0], -1)], dim=1))
        mean, raw = both.chunk(2, dim=1)
        return mean, self.minimum + (1 - self.minimum) * F.softplus(raw)
