"""RL²: learning to explore with a recurrent policy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from metadist.core.algorithm import Theta
from metadist.core.errors import ConfigError
from metadist.core.parameters import Parameters
from metadist.core.state import Records
from metadist.rl.algorithm import EPISODES_SHOWN, PolicySearch, Settings, Sums, TrialContext
from metadist.rl.policy import Policy, Seen
from metadist.rl.trial import TRIAL_END, VALID, Trials, advantages, rollout
from metadist.rl.windows import roll_window


@dataclass(frozen=True)
class Window:
    """Some steps [B, W] of trials: the policy's outputs for them under θ, and the columns of the rollout."""

    head: Tensor
    value: Tensor
    action: Tensor
    log_probability: Tensor
    old_value: Tensor
    advantage: Tensor
    target: Tensor
    valid: Tensor

    def total(self, x: Tensor) -> Tensor:
        """Return the sum of ``x`` over the valid steps."""
        return torch.where(self.valid, x, torch.zeros_like(x)).sum()


@dataclass(frozen=True)
class RL2(PolicySearch):
    """RL²: a recurrent policy learns to explore; its memory lasts for all episodes of a trial (Duan et al. 2016).

    It learns by PPO (Schulman et al. 2017), with which others have reproduced the paper's tables, or by the paper's
    TRPO. Advantages continue across the ends of episodes and stop at the end of a trial. ``reward_scale`` scales
    rewards only in the loss: the policy sees raw rewards. ``value`` weighs the value's error; ``value_clip`` bounds
    the change of the value, as ``clip`` bounds the change of the ratio. With ``optimizer: trpo``, the value is fitted
    after the step, by ``epochs`` × ``minibatches`` updates of the parameters that actions do not depend on.

    ``bptt``: gradients reach back over this number of steps; the memory continues from one such window to the next.
    With ``bptt_together`` the windows are rows of one batch, which takes less time, and memory for whole trials.

    ``window`` is the number of steps that a meta-step plays and learns from. A longer trial continues in the next
    meta-step with its memory, under the new parameters. Gradients do not cross the border, and the value of the next
    observation replaces the returns beyond it.
    """

    entropy: float = 0.01
    value: float = 0.5
    value_clip: float | None = None
    reward_scale: float = 1.0
    bptt: int | None = None
    bptt_together: bool = False
    window: int | None = None

    fits_value: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._within("above 0", lambda v: v > 0, "reward_scale", "value_clip")
        self._within("0 or more", lambda v: v >= 0, "value")
        self._within("1 or more", lambda v: v >= 1, "bptt", "window")
        if self.bptt_together and self.bptt is None:
            raise ConfigError("algorithm.bptt_together: true needs algorithm.bptt; set it to the length of the windows")

    # What shards compute ----------------------------------------------------------------------------------------------

    def settings_of(self, statistics: Mapping[str, float]) -> dict[str, float]:
        mean = statistics["advantage"]
        return {"mean": mean, "deviation": max(statistics["advantage_squared"] - mean * mean, 0.0) ** 0.5 + 1e-8}

    def rollout(self, theta: Theta, context: TrialContext) -> tuple[Records, Sums, float]:
        environment, policy = context.environment, context.policy(theta)
        if self.window is None:
            trials = rollout(environment, policy, context.keys)
            records, returns, ended = trials.records(), trials.by_episode(environment.episodes), {}
        else:
            trials, going = roll_window(environment, policy, context.keys, self.window, context.before)
            over = trials.flag(TRIAL_END).any(1)
            records, returns, ended = going.records(trials), going.returns[over], {"finished": over.sum()}
        estimate, valid = advantages(trials, self.discount, self.gae_lambda, self.reward_scale), trials.flag(VALID)
        target = estimate + trials.value
        sums = {
            "advantage": _sum(estimate, valid),
            "advantage_squared": _sum(estimate.double().square(), valid),
            "return": returns.sum(),
            **ended,
        }
        episode = trials.episode()
        sums |= _moments(target, trials.value, valid, "")
        for number in [n for n in EPISODES_SHOWN if n < environment.episodes] + [environment.episodes]:
            sums |= _moments(target, trials.value, valid & (episode == number - 1), f"/{number}")
            sums[f"return/{number}"] = returns[:, number - 1].sum()
        sums["left_out"] = (~trials.counted()).sum()
        return records, _floats(sums), float(valid.sum())

    def gradient(
        self, theta: Theta, trials: Records, settings: Settings, context: TrialContext
    ) -> tuple[dict[str, Parameters], Sums, float]:
        policy, batch = self._leaves(theta, context), self._batch(trials, context)
        objective = self.clipped if self.trust_region is None else self.unclipped
        total, sums = theta["model"].zeros(), dict[str, Tensor]()
        for window in self.windows(policy, batch, settings):
            losses = objective(policy, window)
            total = total + _gradient(losses.pop("objective"), policy, unused=self.trust_region is not None)
            sums = {n: sums.get(n, 0.0) + term.detach() for n, term in losses.items()}
        return {"model": total}, _floats(sums), float(batch.flag(VALID).sum())

    def value_gradient(
        self, theta: Theta, trials: Records, settings: Settings, context: TrialContext
    ) -> tuple[dict[str, Parameters], Sums, float]:
        policy, batch = self._leaves(theta, context), self._batch(trials, context)
        total, error = theta["model"].zeros(), 0.0
        for window in self.windows(policy, batch, settings):
            loss = self.value_loss(window)
            total, error = total + _gradient(loss, policy, unused=True), error + float(loss.detach())
        total = total.replace({n: torch.zeros_like(total[n]) for n in _acting(policy, batch)})
        return {"model": total}, {"value_loss": error}, float(batch.flag(VALID).sum())

    def fisher(
        self, theta: Theta, trials: Records, direction: Parameters, context: TrialContext
    ) -> tuple[Parameters, float]:
        policy, batch = self._leaves(theta, context), self._batch(trials, context)
        product = theta["model"].zeros()
        # Backward twice: cuDNN's recurrent kernels have no second derivative, and the CPU's LSTM no forward derivative.
        with torch.backends.cudnn.flags(enabled=False):
            for window in self.windows(policy, batch, {}):
                kl = window.total(policy.distribution.divergence(window.head.detach(), window.head))
                slope = _gradient(kl, policy, unused=True, twice=True)
                along = torch.stack([(slope[n] * v).sum() for n, v in direction.items()]).sum()
                product = product + _gradient(along, policy, unused=True)
        return product, float(batch.flag(VALID).sum())

    @torch.no_grad()
    def surrogate(
        self, theta: Theta, trials: Records, step: Parameters, settings: Settings, context: TrialContext
    ) -> tuple[Sums, float]:
        batch = self._batch(trials, context)
        before, after = (context.policy(theta, p) for p in (theta["model"], theta["model"] + step))
        sums: dict[str, Tensor] = {}
        for old, new in zip(self.windows(before, batch, settings), self.windows(after, batch, settings)):
            gain = self.unclipped(before, old)["objective"] - self.unclipped(after, new)["objective"]
            terms = {"improvement": gain, "kl": new.total(before.distribution.divergence(old.head, new.head))}
            sums = {n: sums.get(n, 0.0) + term for n, term in terms.items()}
        return _floats(sums), float(batch.flag(VALID).sum())

    # The mathematics --------------------------------------------------------------------------------------------------

    def windows(self, policy: Policy, batch: Trials, settings: Settings) -> Iterator[Window]:
        """Yield the trials under ``policy``, ``bptt`` steps at a time; ``settings`` normalise the advantages."""
        estimate = advantages(batch, self.discount, self.gae_lambda, self.reward_scale)
        advantage = (estimate - settings.get("mean", 0.0)) / settings.get("deviation", 1.0)
        columns: tuple[Tensor, ...] = (
            batch.action,
            batch.log_probability,
            batch.value,
            advantage,
            estimate + batch.value,
            batch.flag(VALID),
        )
        features = policy.features(batch.observation, batch.seen(policy))
        memory, length = batch.memory(policy), features.shape[1]
        width = min(self.bptt or length, length)
        if self.bptt_together and length > width:
            columns, features, memory = self._as_rows(policy, features, memory, columns, width)
        for start in range(0, features.shape[1], width):
            part = slice(start, start + width)
            head, value, memory = policy(features[:, part], memory.detach())
            yield Window(head, value, *(column[:, part] for column in columns))

    def _as_rows(
        self, policy: Policy, features: Tensor, memory: Tensor, columns: tuple[Tensor, ...], width: int
    ) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        """Return every window of ``width`` steps as a separate row, padded, with the memory at its start."""
        starts = [memory]
        with torch.no_grad():
            for start in range(0, features.shape[1] - width, width):
                # A copy: without gradients, a policy may write into the memory that it receives.
                starts.append(policy(features[:, start : start + width], starts[-1].clone())[2])

        def rows(t: Tensor) -> Tensor:
            padding = t.new_zeros(len(t), -t.shape[1] % width, *t.shape[2:])
            windows: Tensor = torch.cat([t, padding], 1).unflatten(1, (-1, width))
            return windows.flatten(0, 1)

        return tuple(rows(column) for column in columns), rows(features), torch.stack(starts, 1).flatten(0, 1)

    def clipped(self, policy: Policy, window: Window) -> dict[str, Tensor]:
        """Return sums over valid steps: ``objective``, to minimise (Schulman et al. 2017, eq. 9), and its terms."""
        difference, ratio = self.ratio(policy, window)
        near = ratio.clamp(1 - self.clip, 1 + self.clip)
        policy_loss = -window.total(torch.minimum(ratio * window.advantage, near * window.advantage))
        value_loss, entropy = self.value_loss(window), window.total(policy.distribution.entropy(window.head))
        return {
            "objective": policy_loss + self.value * value_loss - self.entropy * entropy,
            "policy_loss": policy_loss,
            "value_loss": value_loss,
            "entropy": entropy,
            "kl": _k3(window, difference, ratio),
            "clip_fraction": window.total(((ratio - 1).abs() > self.clip).to(ratio.dtype)),
        }

    def unclipped(self, policy: Policy, window: Window) -> dict[str, Tensor]:
        """Return the same sums without bounds and without the value's error (Schulman et al. 2015, eq. 14)."""
        difference, ratio = self.ratio(policy, window)
        policy_loss = -window.total(ratio * window.advantage)
        entropy = window.total(policy.distribution.entropy(window.head))
        return {
            "objective": policy_loss - self.entropy * entropy,
            "policy_loss": policy_loss,
            "entropy": entropy,
            "kl": _k3(window, difference, ratio),
        }

    def ratio(self, policy: Policy, window: Window) -> tuple[Tensor, Tensor]:
        """Return log(π / π_old) and π / π_old [B, W]; 0 and 1 for padding."""
        difference = policy.distribution.log_probability(window.head, window.action) - window.log_probability
        difference = torch.where(window.valid, difference, torch.zeros_like(difference))
        return difference, difference.exp()

    def value_loss(self, window: Window) -> Tensor:
        """Return half the squared error of the value, summed over the valid steps."""
        error = (window.value - window.target).square()
        if self.value_clip is not None:
            near = window.old_value + (window.value - window.old_value).clamp(-self.value_clip, self.value_clip)
            error = torch.maximum(error, (near - window.target).square())
        return 0.5 * window.total(error)

    def evaluate(self, theta: Theta, context: TrialContext, inner_steps: int | None) -> dict[str, Tensor]:
        environment = context.environment
        tasks, policy = environment.sample(context.keys), context.policy(theta)
        returns = {}
        for name in ("greedy", "sampled"):
            trials = rollout(environment, policy, context.keys, greedy=name == "greedy", tasks=tasks)
            returns[name] = trials.by_episode(environment.episodes).masked_fill(
                ~trials.counted().unsqueeze(1), torch.nan
            )
            for measure in trials.measured:
                returns[f"{measure}/{name}"] = trials.highest(measure, environment.episodes)
        return returns

    def _leaves(self, theta: Theta, context: TrialContext) -> Policy:
        return context.policy(theta, theta["model"].map(lambda t: t.detach().requires_grad_()))

    def _batch(self, trials: Records, context: TrialContext) -> Trials:
        return Trials.of(trials).to(context.keys.tasks.device)


def _gradient(loss: Tensor, policy: Policy, *, unused: bool = False, twice: bool = False) -> Parameters:
    """Return ∂ loss / ∂ parameters.

    ``unused`` allows parameters that the loss does not depend on, with gradient zero; without it they are an error.
    ``twice`` allows a second derivative.
    """
    leaves = list(policy.parameters.values())
    found = torch.autograd.grad(loss, leaves, create_graph=twice, allow_unused=unused)
    return Parameters(
        {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(policy.parameters.items(), found)}
    )


def _acting(policy: Policy, batch: Trials) -> list[str]:
    """Return the names of the parameters that actions depend on, from one step of one trial."""
    device = batch.observation.device
    seen = Seen.nothing(1, policy.actions.size, device)
    head, _, _ = policy.step(batch.observation[:1, 0], seen, policy.start(1, device))
    found = torch.autograd.grad(head.sum(), list(policy.parameters.values()), allow_unused=True)
    return [n for n, g in zip(policy.parameters, found) if g is not None]


def _k3(window: Window, difference: Tensor, ratio: Tensor) -> Tensor:
    """Return an unbiased, non-negative estimate of Σ KL(π_old ‖ π) on the actions of π_old.

    The estimator is k3 of Schulman 2020, "Approximating KL divergence".
    """
    return window.total(ratio - 1 - difference)


def _floats(sums: Mapping[str, Tensor]) -> Sums:
    """Return ``sums`` in float64, with one transfer from the device."""
    return dict(zip(sums, torch.stack([t.double() for t in sums.values()]).tolist()))


def _sum(values: Tensor, where: Tensor) -> Tensor:
    return torch.where(where, values.double(), 0.0).sum()


def _moments(target: Tensor, value: Tensor, where: Tensor, name: str) -> dict[str, Tensor]:
    """Return the sums over ``where`` that explained variance needs."""
    error = target.double() - value.double()
    return {
        f"target{name}": _sum(target, where),
        f"target_squared{name}": _sum(target.double().square(), where),
        f"error{name}": _sum(error, where),
        f"error_squared{name}": _sum(error.square(), where),
        f"target_count{name}": where.sum(),
    }
