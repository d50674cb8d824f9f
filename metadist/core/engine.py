"""The settings of an engine: how a worker computes a shard. Every field changes the bits of the result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from metadist.core.errors import ConfigError, one_of

DIFFERENTIATIONS = ("unrolled", "mixed", "implicit", "truncated", "es", "pes")
PRECISIONS = ("float32", "tf32", "bfloat16")

#: The release of metadist's own arithmetic, a fact of the numerics fingerprint. Raise it with a change after which all
#: algorithms give other bits, and ``Algorithm.release`` with a change that concerns some: runs and workers of the
#: earlier release are then refused, unless ``engine.exact: false``. 1 is the arithmetic of version 0.1, whose
#: fingerprints do not state it.
RELEASE = 1

Differentiation = Literal["unrolled", "mixed", "implicit", "truncated", "es", "pes"]
Hessian = Literal["forward", "reverse"]


@dataclass(frozen=True)
class Engine:
    """Resolved settings: no field is ``auto``. The driver resolves them once; workers and resumed runs use the same.

    ``compile``: run shards as compiled graphs.
    ``differentiation``: ``unrolled`` differentiates through the recorded inner loop. ``mixed`` goes back over the
    inner steps and computes each of them a second time, so that a step adds only φ and the moments to the memory
    (Kemaev et al. 2025). ``implicit`` takes φ_k for the minimum of the inner loss and differentiates the condition of
    a minimum, with the solver that the algorithm states (Rajeswaran et al. 2019). ``truncated``, ``es`` and ``pes``
    estimate the gradient of an unroll that is longer than a meta-step (``engine/estimators.py``).
    ``hessian``: how ``mixed`` and ``implicit`` multiply by the inner Hessian: ``forward`` over reverse, or ``reverse``
    over reverse where the forward derivative of an operator is missing or wrong.
    ``precision``: ``tf32`` lets a GPU round the inputs of matrix products to 10 bits of mantissa; ``bfloat16`` runs
    the model's passes in the inner loop under autocast.
    ``deterministic``: allow only GPU kernels that give the same bits every time.
    ``chunk``: number of tasks of a shard that are in memory at one time, a power of two; None for all. The sum over
    tasks has the same tree for every chunk size, but its terms may differ by rounding, because libraries choose
    kernels by batch size (a chunk of one task does so for MLPs and conv4). The numerics fingerprint has the chunk.
    """

    compile: bool = False
    differentiation: Differentiation = "unrolled"
    hessian: Hessian = "forward"
    precision: Literal["float32", "tf32", "bfloat16"] = "float32"
    deterministic: bool = True
    chunk: int | None = None

    def __post_init__(self) -> None:
        one_of("engine.differentiation", self.differentiation, DIFFERENTIATIONS)
        one_of("engine.precision", self.precision, PRECISIONS)
        if self.chunk is not None and (self.chunk < 1 or self.chunk & (self.chunk - 1)):
            raise ConfigError(
                f"engine.chunk: {self.chunk} is not a power of two; use 1, 2, 4, … or null: only these chunks are "
                "complete subtrees of the sum over tasks"
            )
