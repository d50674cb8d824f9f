"""What an algorithm of meta-reinforcement learning is: what its shards compute from θ and trials."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from torch import Tensor

from metadist.core.errors import ConfigError, one_of
from metadist.core.model import Model
from metadist.core.parameters import Layout, Parameters
from metadist.core.random import TaskKey
from metadist.core.state import Records, Slot
from metadist.engine.meta_gradient import fixed
from metadist.rl.environment import MetaEnvironment
from metadist.rl.policy import Policy
from metadist.rl.trust_region import DIRECTION, TrustRegion

Theta = Mapping[str, Parameters]
Sums = dict[str, float]
Settings = Mapping[str, Any]
#: episodes whose returns are metrics of their own, beside the last one
EPISODES_SHOWN = (1, 2, 3, 4, 5, 10, 20, 50, 100)


@dataclass(frozen=True)
class TrialContext:
    """What an algorithm may know besides θ and the trials."""

    environment: MetaEnvironment
    model: Model
    keys: TaskKey
    meta_step: int

    def policy(self, theta: Theta, parameters: Mapping[str, Tensor] | None = None) -> Policy:
        """The policy under θ, or under ``parameters`` in place of θ's."""
        bound = self.model.bind(fixed(theta), None, True)
        return Policy(bound, theta["model"] if parameters is None else parameters, self.environment.actions)


class TrialAlgorithm:
    """Subclass as a frozen dataclass (its fields are its config). All methods are pure functions of θ and of what they are given.

    A shard's sums are added up over shards and divided by the sum of their weights. ``settings`` is what ``rollout``'s sums
    came to, as ``settings_of`` made it.
    """

    #: whether the policy's own value is fitted to the trials after a step within a trust region
    fits_value: ClassVar[bool] = False
    #: what a trial's returns are counted by: its episodes from 1, or gradient steps from 0
    by_gradient_steps: ClassVar[bool] = False

    epochs: int
    minibatches: int
    kl_limit: float | None

    @property
    def trust_region(self) -> TrustRegion | None:
        """The bounds of a meta-step's only policy update, or None for updates by minibatches."""
        return None

    def at(self, meta_step: int) -> TrialAlgorithm:
        """The algorithm as it is at ``meta_step``, where settings of it change on the way."""
        return self

    def slots(self, model: Model, parameters: Parameters) -> dict[str, tuple[Slot, Parameters]]:
        """Slots beyond ``model``: name → (slot, initial values)."""
        return (
            {}
            if self.trust_region is None
            else {DIRECTION: (Slot(Layout.of(parameters), "constant"), parameters.zeros())}
        )

    def compatible(self, environment: MetaEnvironment, model: Model) -> str | None:
        """Why this algorithm can't learn in this environment with this model, or None."""
        missing = [n for n in ("memory_size", "sees_history") if not hasattr(model.module, n)]
        return f"the model is no policy: it has no {' and no '.join(missing)}" if missing else None

    def episodes(self, environment: MetaEnvironment) -> int:
        """How many returns a trial has, one after the other."""
        return environment.episodes

    def total(self, returns: Tensor) -> Tensor:
        """What a trial is judged by [B], of its ``returns`` [B, episodes]."""
        return returns.sum(1)

    def settings_of(self, statistics: Mapping[str, float]) -> dict[str, float]:
        """What the shards of later rounds are told of all rollouts, from the means of ``rollout``'s sums per valid step."""
        return {}

    def rollout(self, theta: Theta, context: TrialContext) -> tuple[Records, Sums, float]:
        """The shard's trials, sums over them (float64; ``return`` and ``return/1``… among them), and the number of valid steps."""
        raise NotImplementedError

    def gradient(
        self, theta: Theta, trials: Records, settings: Settings, context: TrialContext
    ) -> tuple[dict[str, Parameters], Sums, float]:
        """The gradient of what is to be minimised, by slot; sums of metrics (``kl`` among them); the weight."""
        raise NotImplementedError

    def value_gradient(
        self, theta: Theta, trials: Records, settings: Settings, context: TrialContext
    ) -> tuple[dict[str, Parameters], Sums, float]:
        """The gradient of the value's error by what the actions don't depend on; zero for everything else (``fits_value``)."""
        raise NotImplementedError

    def fisher(
        self, theta: Theta, trials: Records, direction: Parameters, context: TrialContext
    ) -> tuple[Parameters, float]:
        """F · ``direction``, F being the Hessian at θ of the KL divergence from θ's policy; the weight (trust regions)."""
        raise NotImplementedError

    def surrogate(
        self, theta: Theta, trials: Records, step: Parameters, settings: Settings, context: TrialContext
    ) -> tuple[Sums, float]:
        """``improvement`` of what is maximised and ``kl`` from θ's policy to that at θ + ``step``; the weight (trust regions)."""
        raise NotImplementedError

    def evaluate(self, theta: Theta, context: TrialContext, inner_steps: int | None) -> dict[str, Tensor]:
        """Returns by episode [B, E] float64: ``greedy`` and ``sampled``."""
        raise NotImplementedError


@dataclass(frozen=True)
class PolicySearch(TrialAlgorithm):
    """What policy-gradient algorithms have in common.

    ``discount`` and ``gae_lambda`` are γ and λ. ``optimizer: ppo`` makes ``epochs`` × ``minibatches`` updates of a clipped
    objective by the outer optimiser, fewer where the mean KL divergence of one passes ``kl_limit``. ``trpo`` makes one step
    within a mean KL divergence of ``kl`` (``cg_steps``, ``damping``, ``backtracks``: core/trust_region.py). ``entropy`` weighs the
    entropy bonus in both; with ``entropy_steps`` it falls on a line to ``final_entropy`` at that meta-step, and stays there.
    ``final_gae_lambda`` and ``gae_lambda_steps`` do the same with λ: a low one learns first steps quickly, a high one what pays late.
    """

    discount: float = 0.99
    gae_lambda: float = 0.95
    final_gae_lambda: float = 0.95
    gae_lambda_steps: int | None = None
    entropy: float = 0.0
    final_entropy: float = 0.0
    entropy_steps: int | None = None
    optimizer: Literal["ppo", "trpo"] = "ppo"
    clip: float = 0.2
    epochs: int = 4
    minibatches: int = 4
    kl_limit: float | None = None
    kl: float = 0.01
    cg_steps: int = 10
    damping: float = 1e-2
    backtracks: int = 10

    def __post_init__(self) -> None:
        one_of("algorithm.optimizer", self.optimizer, ("ppo", "trpo"))
        self._within("[0, 1]", lambda v: 0 <= v <= 1, "discount", "gae_lambda", "final_gae_lambda")
        self._within("above 0", lambda v: v > 0, "clip", "kl", "kl_limit")
        self._within("0 or more", lambda v: v >= 0, "entropy", "final_entropy", "damping")
        self._within(
            "1 or more",
            lambda v: v >= 1,
            "epochs",
            "minibatches",
            "cg_steps",
            "backtracks",
            "entropy_steps",
            "gae_lambda_steps",
        )
        if self.optimizer == "trpo" and self.kl_limit is not None:
            raise ConfigError(
                f"algorithm.kl_limit: {self.kl_limit} goes with optimizer: ppo; the bound of trpo's step is algorithm.kl"
            )

    def _within(self, expected: str, holds: Any, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and not holds(value):
                raise ConfigError(f"algorithm.{name}: {value}; expected {expected}")

    def at(self, meta_step: int) -> PolicySearch:
        return replace(
            self,
            entropy=_on_the_way(meta_step, self.entropy, self.final_entropy, self.entropy_steps),
            gae_lambda=_on_the_way(meta_step, self.gae_lambda, self.final_gae_lambda, self.gae_lambda_steps),
        )

    @property
    def trust_region(self) -> TrustRegion | None:
        return TrustRegion(self.kl, self.cg_steps, self.damping, self.backtracks) if self.optimizer == "trpo" else None


def _on_the_way(meta_step: int, start: float, end: float, steps: int | None) -> float:
    """On the line from ``start`` to ``end`` over ``steps``; ``start`` where there is none."""
    return start if steps is None else end + max(0.0, 1 - meta_step / steps) * (start - end)
