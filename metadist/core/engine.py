"""How a shard is computed. Every field enters the bits of the result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from metadist.core.errors import ConfigError, one_of

DIFFERENTIATIONS = ("unrolled", "mixed")
PRECISIONS = ("float32", "tf32", "bfloat16")


Differentiation = Literal["unrolled", "mixed"]
Hessian = Literal["forward", "reverse"]


@dataclass(frozen=True)
class Engine:
    """Resolved: nothing here says ``auto``. The driver resolves it once; workers and resumes obey.

    ``compile``: shards run as compiled graphs. ``differentiation``: ``unrolled`` differentiates through the recorded inner
    loop; ``mixed`` walks back over its steps and recomputes each, so memory grows by φ alone per step (Kemaev et al. 2025).
    ``hessian``: how mixed multiplies by the inner Hessian, ``forward`` over reverse, or ``reverse`` over reverse where an
    operator's forward derivative is missing or wrong. ``precision``: ``tf32`` lets a GPU's matrix products round their
    inputs to 10 bits of mantissa; ``bfloat16`` runs the model's passes in the inner loop under autocast. ``deterministic``:
    a GPU may use only kernels that give the same bits every time. ``chunk``: tasks of a shard that are in memory at once, a
    power of two; None for all. The sum over tasks keeps its bits for any chunk, but libraries choose kernels by the batch:
    found equal for the transformer, and for an MLP in mixed mode; equal to 1e-6 for conv4.
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
                f"engine.chunk: {self.chunk} is no power of two; only those cut the sum over tasks at the joints of its tree, "
                "so that the result keeps its bits"
            )
