"""MAML for reinforcement learning: ProMP, and MAML with TRPO."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, vmap
from torch.utils._pytree import tree_map

from metadist.core.algorithm import Theta
from metadist.core.model import Model
from metadist.core.parameters import Parameters
from metadist.core.state import Records
from metadist.engine.functions import jvp, tree_sum, vjp
from metadist.rl.algorithm import EPISODES_SHOWN, PolicySearch, Settings, Sums, TrialContext
from metadist.rl.baseline import linear_baseline, returns_to_go
from metadist.rl.environment import MetaEnvironment
from metadist.rl.policy import Policy, PolicyPerTask
from metadist.rl.trial import VALID, Repetition, Trials, advantages, rollout

Data = dict[str, Tensor]
"""Trajectories by column: observation [N, T, O], action [N, T] or [N, T, A], and log_probability, advantage, valid
[N, T].

For a shard, tasks are the first dimension, and for whole trials the stages are the second: [B, K + 1, N, T, …].
"""


@dataclass(frozen=True)
class MAMLRL(PolicySearch):
    """MAML for reinforcement learning (Finn et al. 2017, algorithm 3) by ProMP (Rothfuss et al. 2019) or by TRPO.

    A task's trial has ``inner_steps`` + 1 stages of ``rollouts_per_task`` episodes. The policy of stage k has
    parameters φ_k, and φ_{k+1} = φ_k + ``inner_lr`` · ∇ mean_t [π_φ / π_φold · A] (ProMP, eq. 12). This step has the
    Hessian of the low-variance curvature estimator: its gradient is unbiased, and its curvature lacks the terms H12 +
    H12ᵀ of section 5. The meta-gradient omits the effect of θ on the *distribution* of trajectories before adaptation
    ("formulation I").

    ``optimizer: ppo`` is ProMP: the clipped objective under φ_K, minus ``kl_penalty`` times the KL divergences of the
    earlier policies. ``trpo`` is the outer step of MAML, with a bound on the mean KL divergence of the adapted
    policies. Advantages use a linear baseline that is fitted to each stage of each task; with ``normalize`` they have
    mean 0 and deviation 1 within the stage. The policy's own value is not used, and ``environment.episodes`` has no
    effect.
    """

    gae_lambda: float = 1.0
    clip: float = 0.3
    epochs: int = 5
    minibatches: int = 1
    inner_lr: float = 0.1
    inner_steps: int = 1
    rollouts_per_task: int = 20
    kl_penalty: float = 5e-4
    normalize: bool = True

    by_gradient_steps: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._within("0 or more", lambda v: v >= 0, "inner_lr", "kl_penalty")
        self._within("1 or more", lambda v: v >= 1, "inner_steps", "rollouts_per_task")
        self._within(f"below {1 << 14}", lambda v: v < 1 << 14, "inner_steps", "rollouts_per_task")

    def compatible(self, environment: MetaEnvironment, model: Model) -> str | None:
        reason = super().compatible(environment, model)
        if reason is None and (model.module.memory_size or model.module.sees_history):
            return "it adapts by gradient steps and needs a policy without memory (model: {name: reactive})"
        return reason

    def episodes(self, environment: MetaEnvironment) -> int:
        return self.inner_steps + 1

    def total(self, returns: Tensor) -> Tensor:
        return returns[:, -1]

    # Trials -----------------------------------------------------------------------------------------------------------

    def stages(
        self, theta: Theta, context: TrialContext, inner_steps: int, tasks: Mapping[str, Tensor]
    ) -> Iterator[tuple[Policy, Trials, Data]]:
        """Yield the policy under φ_k, its trials [B · N, …] and their columns, for k = 0 … ``inner_steps``."""
        count, each = len(context.keys.tasks), self.rollouts_per_task
        repeated = {n: t.repeat_interleave(each, 0) for n, t in tasks.items()}
        keys = replace(context.keys, tasks=context.keys.tasks.repeat_interleave(each))
        serial = torch.arange(each, device=keys.tasks.device).repeat(count).unsqueeze(1)
        bound = context.policy(theta)
        phi = theta["model"].map(lambda t: t.expand(count, *t.shape))
        for stage in range(inner_steps + 1):
            policy = PolicyPerTask(bound.model, phi, bound.actions)
            repetition = Repetition(episodes=1, stage=stage, serial=serial)
            trials = rollout(context.environment, policy, keys, tasks=repeated, repetition=repetition)
            data = self.examined(trials, context.environment.horizon)
            yield policy, trials, data
            if stage < inner_steps:
                phi = vmap(lambda phi, data: self.adapted(bound, phi, data)[0])(phi, data)

    def examined(self, trials: Trials, horizon: int) -> Data:
        """Return the trajectories of ``trials`` [B · N, T', …] with advantages, padded to the horizon: [B, N, T, …]."""

        def apart(t: Tensor) -> Tensor:
            padded = F.pad(t, (0, 0) * (t.dim() - 2) + (0, horizon - t.shape[1]))
            by_task: Tensor = padded.unflatten(0, (-1, self.rollouts_per_task))
            return by_task

        valid, observation = apart(trials.flag(VALID)), apart(trials.observation)
        target = returns_to_go(apart(trials.reward), valid, self.discount)
        baseline = linear_baseline(observation, target, valid).flatten(0, 1)[:, : trials.reward.shape[1]]
        advantage = apart(advantages(replace(trials, value=baseline), self.discount, self.gae_lambda, 1.0))
        if self.normalize:
            count, dims = valid.sum((1, 2), keepdim=True).clamp(min=1), (1, 2)
            mean = advantage.sum(dims, keepdim=True) / count
            centred = torch.where(valid, advantage - mean, torch.zeros_like(advantage))
            advantage = centred / ((centred.square().sum(dims, keepdim=True) / count).sqrt() + 1e-8)
        found = {
            "observation": observation,
            "action": apart(trials.action),
            "log_probability": apart(trials.log_probability),
        }
        return {**found, "valid": valid, "advantage": advantage.to(trials.log_probability.dtype)}

    def rollout(self, theta: Theta, context: TrialContext) -> tuple[Records, Sums, float]:
        data, returns, steps = [], [], 0.0
        for _, trials, found in self.stages(theta, context, self.inner_steps, context.environment.sample(context.keys)):
            data.append(found)
            returns.append(self._mean(trials.by_episode(1)))
            steps += float(found["valid"].sum())
        columns = {n: torch.stack([d[n] for d in data], 1) for n in data[0]}
        last = self.inner_steps + 1
        sums = {f"return/{k}": float(returns[k - 1].sum()) for k in [n for n in EPISODES_SHOWN if n < last] + [last]}
        return Records({**columns, "task": context.keys.tasks}), {"return": float(returns[-1].sum()), **sums}, steps

    @torch.no_grad()
    def evaluate(self, theta: Theta, context: TrialContext, inner_steps: int | None) -> dict[str, Tensor]:
        """Return the returns [B, k + 1] after 0 … k gradient steps, each on the sampled actions of one stage.

        ``sampled`` is the mean return of the stage; ``greedy`` is the return of one greedy episode under the same φ.
        """
        tasks, columns = context.environment.sample(context.keys), dict[str, list[Tensor]](greedy=[], sampled=[])
        steps = self.inner_steps if inner_steps is None else inner_steps
        for stage, (policy, trials, _) in enumerate(self.stages(theta, context, steps, tasks)):
            repetition = Repetition(episodes=1, stage=stage)
            greedy = rollout(context.environment, policy, context.keys, greedy=True, tasks=tasks, repetition=repetition)
            columns["greedy"].append(greedy.by_episode(1).squeeze(1))
            columns["sampled"].append(self._mean(trials.by_episode(1)))
        return {n: torch.stack(c, 1) for n, c in columns.items()}

    def _mean(self, returns: Tensor) -> Tensor:
        """Average ``returns`` [B · N, 1] over the episodes of each task: [B]."""
        return returns.view(-1, self.rollouts_per_task).mean(1)

    # One task, under vmap ---------------------------------------------------------------------------------------------

    def adapted(self, bound: Policy, phi: Parameters, data: Data) -> tuple[Parameters, Tensor]:
        """Return φ after one step on a stage's trajectories, and the KL divergence before the step (see ``ratio``)."""

        def loss(phi: Parameters) -> tuple[Tensor, Tensor]:
            ratio, kl = self.ratio(bound, _head(replace(bound, parameters=phi), data), data)
            return -_mean(ratio * data["advantage"], data), kl

        gradient: Any
        gradient, kl = grad(loss, has_aux=True)(phi)
        return phi - gradient * self.inner_lr, kl

    def adapt(self, bound: Policy, theta: Parameters, data: Data) -> tuple[Policy, Tensor]:
        """Return the policy under φ_K, and the sum of the KL divergences of the earlier policies."""
        phi, divergence = theta, data["advantage"].new_zeros(())
        for stage in range(self.inner_steps):
            phi, kl = self.adapted(bound, phi, _stage(data, stage))
            divergence = divergence + kl
        return replace(bound, parameters=phi), divergence

    def ratio(self, bound: Policy, head: Tensor, data: Data) -> tuple[Tensor, Tensor]:
        """Return π / π_old [N, T], and an unbiased estimate of the mean KL(π_old ‖ π) on the actions of π_old.

        The estimator is k3 of Schulman 2020, "Approximating KL divergence".
        """
        difference = bound.distribution.log_probability(head, data["action"]) - data["log_probability"]
        difference = torch.where(data["valid"], difference, torch.zeros_like(difference))
        return difference.exp(), _mean(difference.exp() - 1 - difference, data)

    def objective(self, bound: Policy, theta: Parameters, data: Data) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the objective to minimise (ProMP, eq. 13, 14; for TRPO without bounds and penalty), and its terms."""
        policy, divergence = self.adapt(bound, theta, data)
        last = _stage(data, self.inner_steps)
        head = _head(policy, last)
        ratio, kl = self.ratio(bound, head, last)
        gain, bounded = ratio * last["advantage"], self.optimizer == "ppo"
        if bounded:
            gain = torch.minimum(gain, ratio.clamp(1 - self.clip, 1 + self.clip) * last["advantage"])
        policy_loss, entropy = -_mean(gain, last), _mean(bound.distribution.entropy(head), last)
        penalty = self.kl_penalty * divergence if bounded else 0.0
        clipped = _mean(((ratio - 1).abs() > self.clip).to(ratio.dtype), last)
        metrics = {
            "policy_loss": policy_loss,
            "entropy": entropy,
            "kl": kl,
            "inner_kl": divergence,
            "clip_fraction": clipped,
        }
        return policy_loss + penalty - self.entropy * entropy, metrics

    # What shards compute ----------------------------------------------------------------------------------------------

    def gradient(
        self, theta: Theta, trials: Records, settings: Settings, context: TrialContext
    ) -> tuple[dict[str, Parameters], Sums, float]:
        bound, data = context.policy(theta), _data(trials, context)
        single = grad(lambda theta, data: self.objective(bound, theta, data), has_aux=True)
        gradients, metrics = vmap(single, in_dims=(None, 0))(theta["model"], data)
        return {"model": tree_map(tree_sum, gradients)}, _floats(metrics), float(trials.rows)

    def fisher(
        self, theta: Theta, trials: Records, direction: Parameters, context: TrialContext
    ) -> tuple[Parameters, float]:
        """Return Σ Jᵀ M J ``direction``, with J = ∂ head(φ_K) / ∂θ and M the Hessian of the divergence in the head."""
        bound, data = context.policy(theta), _data(trials, context)

        def single(data: Data) -> Parameters:
            last = _stage(data, self.inner_steps)

            def head(theta: Parameters) -> Tensor:
                return _head(self.adapt(bound, theta, data)[0], last)

            def divergence(after: Tensor) -> Tensor:
                return _mean(bound.distribution.divergence(now, after), last)

            now, tangent = jvp(head, (theta["model"],), (direction,))
            product: Parameters = vjp(head, theta["model"])[1](jvp(grad(divergence), (now,), (tangent,))[1])[0]
            return product

        return tree_map(tree_sum, vmap(single)(data)), float(trials.rows)

    @torch.no_grad()
    def surrogate(
        self, theta: Theta, trials: Records, step: Parameters, settings: Settings, context: TrialContext
    ) -> tuple[Sums, float]:
        bound, data = context.policy(theta), _data(trials, context)

        def single(data: Data) -> dict[str, Tensor]:
            last = _stage(data, self.inner_steps)
            before, after = (
                _head(self.adapt(bound, p, data)[0], last) for p in (theta["model"], theta["model"] + step)
            )
            gain = (
                self.objective(bound, theta["model"], data)[0] - self.objective(bound, theta["model"] + step, data)[0]
            )
            return {"improvement": gain, "kl": _mean(bound.distribution.divergence(before, after), last)}

        return _floats(vmap(single)(data)), float(trials.rows)


def _head(policy: Policy, data: Data) -> Tensor:
    observation = data["observation"].to(policy.model.model.dtype)
    return policy(observation, observation.new_zeros(len(observation), 0))[0]


def _stage(data: Data, stage: int) -> Data:
    return {n: t[stage] for n, t in data.items()}


def _mean(values: Tensor, data: Data) -> Tensor:
    """Return the mean of ``values`` over the valid steps."""
    valid = data["valid"]
    return torch.where(valid, values, torch.zeros_like(values)).sum() / valid.sum().clamp(min=1)


def _data(trials: Records, context: TrialContext) -> Data:
    device = context.keys.tasks.device
    return {n: t.to(device) for n, t in trials.columns.items() if n != "task"}


def _floats(metrics: Mapping[str, Tensor]) -> Sums:
    """Return the sums over tasks [B] in float64, with one transfer from the device."""
    return dict(zip(metrics, torch.stack([tree_sum(t.double()) for t in metrics.values()]).tolist()))
