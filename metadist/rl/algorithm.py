"""Define algorithms of meta-reinforcement learning: what their shards compute from θ and trials."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal

from torch import Tensor

from metadist.core.algorithm import Theta as Theta
from metadist.core.engine import RELEASE, Engine
from metadist.core.errors import ConfigError, one_of
from metadist.core.model import Model
from metadist.core.parameters import Layout, Parameters
from metadist.core.random import TaskKey
from metadist.core.state import Records, Slot
from metadist.engine.meta_gradient import fixed
from metadist.rl.environment import MetaEnvironment
from metadist.rl.policy import Policy, PolicyModule
from metadist.rl.trust_region import DIRECTION, TrustRegion

Sums = dict[str, float]
Settings = Mapping[str, Any]
#: numbers of episodes (from 1) whose returns are separate metrics; the last episode's return is one too
EPISODES_SHOWN = (1, 2, 3, 4, 5, 10, 20, 50, 100)


@dataclass(frozen=True)
class TrialContext:
    """The inputs of an algorithm besides θ and the trials."""

    environment: MetaEnvironment
    model: Model
    keys: TaskKey
    meta_step: int
    #: the output of the shard's rollout in the meta-step before, for algorithms with a ``window``
    before: Records | None = None

    def policy(self, theta: Theta, parameters: Mapping[str, Tensor] | None = None) -> Policy:
        """Return the policy under θ, or under ``parameters`` in place of θ's."""
        bound = self.model.bind(fixed(theta), None, True)
        return Policy(bound, theta["model"] if parameters is None else parameters, self.environment.actions)


class TrialAlgorithm:
    """Subclass as a frozen dataclass (its fields are its config). All methods are pure functions of their arguments.

    The driver adds the sums of all shards and divides by the sum of their weights. ``settings`` is the result of
    ``settings_of`` for ``rollout``'s sums.
    """

    #: whether the policy's own value is fitted to the trials after a step within a trust region
    fits_value: ClassVar[bool] = False
    #: whether a trial's returns are numbered by gradient steps from 0; otherwise by episodes from 1
    by_gradient_steps: ClassVar[bool] = False

    epochs: int
    minibatches: int
    kl_limit: float | None
    #: the steps of a trial in one meta-step; longer trials go on in the next one. None: whole trials
    window: int | None = None

    @property
    def trust_region(self) -> TrustRegion | None:
        """Return the bounds of a meta-step's only policy update, or None for updates by minibatches."""
        return None

    def at(self, meta_step: int) -> TrialAlgorithm:
        """Return the algorithm with its settings at ``meta_step``, for settings that change during training.

        The learner calls the other methods on this result, in all rounds of a meta-step and in evaluations, whose
        ``meta_step`` is the number of meta-steps that θ has made.
        """
        return self

    def release(self, engine: Engine) -> int:
        """Return the release of metadist's arithmetic that last changed the bits of this algorithm under ``engine``."""
        return RELEASE

    def slots(self, model: Model, parameters: Parameters) -> dict[str, tuple[Slot, Parameters]]:
        """Return the slots besides ``model``: name → (slot, initial values)."""
        if self.trust_region is None:
            return {}
        return {DIRECTION: (Slot(Layout.of(parameters), "constant"), parameters.zeros())}

    def compatible(self, environment: MetaEnvironment, model: Model) -> str | None:
        """Return the reason why this algorithm cannot learn in this environment with this model, or None."""
        if isinstance(model.module, PolicyModule):
            return None
        return (
            "the model is not a policy: expected a module with memory_size, sees_history and forward(features, memory)"
        )

    def episodes(self, environment: MetaEnvironment) -> int:
        """Return the number of returns of a trial."""
        return environment.episodes

    def total(self, returns: Tensor) -> Tensor:
        """Reduce a trial's ``returns`` [B, episodes] to one score [B]."""
        return returns.sum(1)

    def settings_of(self, statistics: Mapping[str, float]) -> dict[str, float]:
        """Compute the settings of later rounds' shards from all rollouts: ``rollout``'s sums per valid step."""
        return {}

    def rollout(self, theta: Theta, context: TrialContext) -> tuple[Records, Sums, float]:
        """Roll out the shard's trials; return them, sums over them, and the number of valid steps.

        The sums are float64 and include ``return`` and ``return/1``, ``return/2``, … With a ``window``, these are of
        the trials that end, whose number is ``finished``; and the records go to the next meta-step as
        ``context.before``.
        """
        raise NotImplementedError

    def gradient(
        self, theta: Theta, trials: Records, settings: Settings, context: TrialContext
    ) -> tuple[dict[str, Parameters], Sums, float]:
        """Compute the gradient of the minimised objective by slot, sums of metrics (``kl`` too), and the weight."""
        raise NotImplementedError

    def value_gradient(
        self, theta: Theta, trials: Records, settings: Settings, context: TrialContext
    ) -> tuple[dict[str, Parameters], Sums, float]:
        """Compute the gradient of the value's error, its metrics' sums and the weight (``fits_value``).

        The gradient is zero for every parameter that the actions depend on.
        """
        raise NotImplementedError

    def fisher(
        self, theta: Theta, trials: Records, direction: Parameters, context: TrialContext
    ) -> tuple[Parameters, float]:
        """Compute F · ``direction`` and the weight (trust regions).

        F is the Hessian at θ of the KL divergence from θ's policy.
        """
        raise NotImplementedError

    def surrogate(
        self, theta: Theta, trials: Records, step: Parameters, settings: Settings, context: TrialContext
    ) -> tuple[Sums, float]:
        """Compute sums of the objective's ``improvement`` and of ``kl``, and the weight (trust regions).

        ``kl`` is the divergence from θ's policy to the policy at θ + ``step``.
        """
        raise NotImplementedError

    def evaluate(self, theta: Theta, context: TrialContext, inner_steps: int | None) -> dict[str, Tensor]:
        """Compute returns by episode [B, E] float64, under the names ``greedy`` and ``sampled``."""
        raise NotImplementedError


@dataclass(frozen=True)
class PolicySearch(TrialAlgorithm):
    """The settings that policy-gradient algorithms share.

    ``discount`` and ``gae_lambda`` are γ and λ. ``optimizer: ppo`` makes ``epochs`` × ``minibatches`` updates of a
    clipped objective by the outer optimiser, and stops early where the mean KL divergence of one passes ``kl_limit``.
    ``trpo`` makes one step within a mean KL divergence of ``kl`` (``cg_steps``, ``damping``, ``backtracks``:
    rl/trust_region.py). ``entropy`` weighs the entropy bonus in both; with ``entropy_steps`` it changes linearly to
    ``final_entropy`` at that meta-step, and then stays constant. ``final_gae_lambda`` and ``gae_lambda_steps`` do the
    same with λ: a low λ learns the first steps of an episode quickly, a high λ learns actions that pay off late.
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
        counts = ("epochs", "minibatches", "cg_steps", "backtracks", "entropy_steps", "gae_lambda_steps")
        self._within("1 or more", lambda v: v >= 1, *counts)
        self._reached("gae_lambda", "entropy")
        if self.optimizer == "trpo" and self.kl_limit is not None:
            raise ConfigError(
                f"algorithm.kl_limit: {self.kl_limit} goes with optimizer: ppo; trpo's step is bounded by algorithm.kl"
            )

    def _within(self, expected: str, holds: Callable[[float], bool], *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and not holds(value):
                raise ConfigError(f"algorithm.{name}: {value}; expected {expected}")

    def _reached(self, *names: str) -> None:
        """Refuse a final value without the number of meta-steps that lead to it: it would have no effect."""
        defaults = {f.name: f.default for f in fields(self)}
        for name in names:
            final = getattr(self, f"final_{name}")
            if getattr(self, f"{name}_steps") is None and final not in (defaults[f"final_{name}"], getattr(self, name)):
                raise ConfigError(
                    f"algorithm.final_{name}: {final} has no effect without algorithm.{name}_steps; set the number of "
                    f"meta-steps from {name} {getattr(self, name)} to this value"
                )

    def release(self, engine: Engine) -> int:
        # The schedule reaches the rollouts.
        return super().release(engine) if self.gae_lambda_steps is None else 2

    def at(self, meta_step: int) -> PolicySearch:
        return replace(
            self,
            entropy=_linear(meta_step, self.entropy, self.final_entropy, self.entropy_steps),
            gae_lambda=_linear(meta_step, self.gae_lambda, self.final_gae_lambda, self.gae_lambda_steps),
        )

    @property
    def trust_region(self) -> TrustRegion | None:
        return TrustRegion(self.kl, self.cg_steps, self.damping, self.backtracks) if self.optimizer == "trpo" else None


def _linear(meta_step: int, start: float, end: float, steps: int | None) -> float:
    """Interpolate from ``start`` to ``end`` over ``steps``; return ``start`` without steps."""
    return start if steps is None else end + max(0.0, 1 - meta_step / steps) * (start - end)
