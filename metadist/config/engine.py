"""The ``engine`` section of a config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Union

from metadist.core.engine import Engine
from metadist.core.errors import ConfigError, at_least


@dataclass(frozen=True)
class EngineSettings:
    """The computation of shards.

    For ``compile``, ``differentiation`` and ``chunk`` (number of tasks in memory at a time), ``auto`` lets metadist
    choose; `metadist plan` shows the choice and its reasons. ``truncated``, ``es`` and ``pes`` are for algorithms with
    carried state, ``unrolled`` and ``mixed`` for all others. ``precision``: ``tf32`` for the matrix products of a GPU,
    ``bfloat16`` for autocast in the inner loop. ``deterministic: false`` allows GPU kernels whose bits vary, which
    ``exact`` forbids. ``wire: bfloat16`` halves the bytes that workers send, with error feedback.

    ``exact`` refuses workers with another numerics fingerprint. ``same_code: false`` resumes a run although the user's
    modules were edited, and marks it inexact. A worker counts as hung after ``shard_timeout`` seconds per shard;
    ``worker_patience`` is the number of seconds to wait for workers. ``non_finite`` is the treatment of a task that
    gives NaN or Inf: ``error``, or ``skip`` (the sum leaves it out).
    """

    dtype: Literal["float32", "float64"] = "float32"
    device: str = "auto"
    compile: Literal["auto", "always", "never"] = "auto"
    differentiation: Literal["auto", "unrolled", "mixed", "implicit", "truncated", "es", "pes"] = "auto"
    precision: Literal["float32", "tf32", "bfloat16"] = "float32"
    chunk: Union[int, Literal["auto"]] = "auto"
    deterministic: bool = True
    wire: Literal["exact", "bfloat16"] = "exact"
    non_finite: Literal["error", "skip"] = "error"
    exact: bool = True
    same_code: bool = True
    shard_timeout: float = 300.0
    worker_patience: float = 120.0

    def __post_init__(self) -> None:
        at_least(1, **{"engine.shard_timeout": self.shard_timeout, "engine.worker_patience": self.worker_patience})
        if isinstance(self.chunk, int):
            Engine(chunk=self.chunk)
        if self.dtype == "float64" and self.precision != "float32":
            raise ConfigError(
                f"engine.precision: {self.precision} rounds what engine.dtype: float64 is for; choose one of them"
            )
        if self.exact and not self.deterministic:
            raise ConfigError(
                "engine.deterministic: false needs engine.exact: false: kernels whose bits vary can't give the same "
                "parameters twice"
            )
        if self.wire == "bfloat16" and self.exact:
            raise ConfigError(
                "engine.wire: bfloat16 with error feedback makes a contribution depend on what its worker sent "
                "before; it needs engine.exact: false"
            )
